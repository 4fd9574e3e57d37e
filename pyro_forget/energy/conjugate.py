"""Normal priors that no latent changes: their part of the energy is closed-form."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_forget.effects.site import Site
from pyro_forget.gaussian import Gaussian

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Conjugate:
    """A site whose prior is Normal with parameters that no latent changes.

    Attributes:
        loc, scale: of the site's unconstrained shape; without dims, and on the CPU, where all entries share them.
    """

    loc: Tensor
    scale: Tensor

    @staticmethod
    def of(loc: Tensor, scale: Tensor) -> "Conjugate":
        """One number each where all entries are the same: sums over the site are then dot products."""
        if loc.numel() and bool((loc == loc.flatten()[0]).all()) and bool((scale == scale.flatten()[0]).all()):
            return Conjugate(loc.flatten()[0].cpu(), scale.flatten()[0].cpu())
        return Conjugate(loc.clone(), scale.clone())

    def gap(self, loc: Tensor) -> Tensor:
        """`loc` minus the prior's."""
        return loc if self.loc.ndim == 0 and float(self.loc) == 0 else loc - self.loc

    def half_square(self, loc: Tensor) -> Tensor:
        """½ Σ ((loc − the prior's)/scale)²: −log prior at `loc` up to a constant, nats, float64."""
        gap = self.gap(loc)
        if self.scale.ndim:
            return 0.5 * (gap / self.scale).square().sum().double()
        return 0.5 * _square(gap).double() / float(self.scale) ** 2

    def add_gradient(self, value: Tensor, gradient: Tensor) -> Tensor:
        """`gradient` + value/scale²: the prior's pull on a gap, or on a standard deviation."""
        if self.scale.ndim:
            return gradient + value * self.scale.square().reciprocal()
        return torch.add(gradient, value, alpha=float(self.scale) ** -2)


def cross_entropy(priors: Mapping[str, Conjugate], gaussian: Gaussian) -> Tensor:
    """E_q[−log p] summed over these sites, scalar, nats, float64.

    Dot products make no arrays, and sites of one prior scale share the rest of the arithmetic.
    """
    squares: dict[float, list[Tensor]] = {}
    found, constant = [], 0.0
    for name, prior in priors.items():
        loc = gaussian.loc[name]
        constant += 0.5 * loc.numel() * _LOG_2PI
        if prior.scale.ndim:
            weighted = (prior.gap(loc).square() + gaussian.variance[name]) * prior.scale.square().reciprocal()
            found.append((0.5 * weighted + prior.scale.log()).sum().double())
        else:
            scale = float(prior.scale)
            constant += loc.numel() * math.log(scale)
            squares.setdefault(scale, []).extend((_square(prior.gap(loc)), _square(gaussian.root_of(name))))
    found += [0.5 * scale**-2 * torch.stack(terms).double().sum() for scale, terms in squares.items()]
    return torch.stack(found).sum() + constant


def _square(value: Tensor) -> Tensor:
    """The sum of squares: a dot product makes no array of them."""
    flat = value.reshape(-1)
    return torch.dot(flat, flat)


def conjugate_of(first: Site, second: Site) -> Conjugate | None:
    """The prior of a site from two runs with different latents; None where it is no Normal, or changes with them."""
    normals = [_normal_of(site) for site in (first, second)]
    if normals[0] is None or normals[1] is None:
        return None
    same = all(torch.equal(mine, theirs) for mine, theirs in zip(normals[0], normals[1], strict=True))
    return Conjugate.of(*normals[0]) if same else None


def _normal_of(site: Site) -> tuple[Tensor, Tensor] | None:
    fn = site.fn
    while type(fn).__name__ in ("Independent", "ExpandedDistribution"):
        fn = fn.base_dist
    plain = site.mask is None and not isinstance(site.scale, Tensor) and site.scale == 1
    if type(fn).__name__ != "Normal" or not plain:
        return None
    return fn.loc.detach().expand(site.value.shape), fn.scale.detach().expand(site.value.shape)
