"""The curvature that the prior adds to a Gaussian guide's location, in unconstrained space."""

from typing import Any

import torch
from torch import Tensor

from pyro_forget.curvature.fisher import unwrapped
from pyro_forget.effects.site import Site
from pyro_forget.energy import GaussianEnergy
from pyro_forget.gaussian import Gaussian
from pyro_forget.params import Params, add, map_params


class PriorCurvature:
    """E_q of the prior's curvature, log-Jacobian included.

    Normal priors of fixed parameters: 1/s². Normal priors whose loc or scale is latent: the conditional Fisher form
    (dv − dloc)²/s² + 2 (d log s)², positive by construction. Other families: the Hessian of −log p, exact but not
    always positive.

    Args:
        energy: with its noise pinned.
        gaussian: where.
    """

    def __init__(self, energy: GaussianEnergy, gaussian: Gaussian) -> None:
        self.energy, self.gaussian = energy, gaussian
        self._diagonal = {
            name: energy.conjugate[name].scale.reciprocal().square() if name in energy.conjugate else None
            for name in gaussian.loc
        }
        self._graph = None if len(energy.conjugate) == len(gaussian.loc) else self._build()

    def mv(self, vector: Params) -> Params:
        """The product, by site."""
        fixed = {name: value * diagonal for (name, value), diagonal in self._entries(vector)}
        return fixed if self._graph is None else add(fixed, self._open(self._graph, vector))

    def _entries(self, vector: Params) -> list[tuple[tuple[str, Tensor], Tensor]]:
        return [
            ((name, value), torch.zeros_like(value) if self._diagonal[name] is None else self._diagonal[name])  # type: ignore[misc]
            for name, value in vector.items()
        ]

    def _build(self) -> Any:
        """The open sites' residuals and their remaining log densities, with the graph of two derivatives."""
        leaves = {name: value.detach().requires_grad_(True) for name, value in self.gaussian.loc.items()}
        skip = frozenset(self.energy.conjugate)

        def parts(values: Params) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
            run = self.energy.run_prior(values)
            normals = {site.name: site for site in run.sites if _is_open_normal(site, skip)}
            rest = -run.log_prior(skip=skip | frozenset(normals))
            return {name: _residual(site) for name, site in normals.items()}, rest

        with torch.enable_grad():
            stacked, rest = self.energy.expected_parts(Gaussian(leaves, self.gaussian.scale), parts)
            first = (
                torch.autograd.grad(
                    rest, list(leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
                )
                if rest.requires_grad
                else [torch.zeros_like(leaf) for leaf in leaves.values()]
            )
            residuals, weights = _stack(stacked, self.energy.noise.num_draws)
            dummies = [torch.zeros_like(value, requires_grad=True) for value in residuals]
            pulled = (
                torch.autograd.grad(
                    residuals,
                    list(leaves.values()),
                    dummies,
                    create_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                if residuals
                else []
            )
        return leaves, first, residuals, weights, dummies, pulled

    def _open(self, graph: Any, vector: Params) -> Params:
        leaves, first, residuals, weights, dummies, pulled = graph
        product = _pull(first, leaves, [vector[name] for name in leaves])
        if not residuals:
            return product
        tangents = _grad(pulled, dummies, [vector[name] for name in leaves])
        weighted = [weight * tangent for weight, tangent in zip(weights, tangents, strict=True)]
        found = _grad(residuals, list(leaves.values()), weighted)
        return add(product, dict(zip(leaves, found, strict=True)))


def _residual(site: Site) -> tuple[Tensor, Tensor]:
    """(v − loc, log s) of a Normal site, of the value's shape."""
    fn, _ = unwrapped(site.fn)
    gap, log_scale = torch.broadcast_tensors(site.value - fn.loc, fn.scale.log())
    return gap, log_scale


def _is_open_normal(site: Site, skip: frozenset[str]) -> bool:
    plain = site.mask is None and not isinstance(site.scale, Tensor) and site.scale == 1
    return not site.observed and site.name not in skip and plain and type(unwrapped(site.fn)[0]).__name__ == "Normal"


def _stack(stacked: dict[str, tuple[Tensor, Tensor]], num_draws: int) -> tuple[list[Tensor], list[Tensor]]:
    """Residuals and their weights: 1/s² for v − loc, 2 for log s, each divided by the number of draws."""
    residuals, weights = [], []
    for gap, log_scale in stacked.values():
        residuals += [gap, log_scale]
        weights += [torch.exp(-2 * log_scale.detach()) / num_draws, torch.full_like(log_scale, 2.0 / num_draws)]
    kept = [(value, weight.detach()) for value, weight in zip(residuals, weights, strict=True) if value.requires_grad]
    return [value for value, _ in kept], [weight for _, weight in kept]


def _pull(first: Any, leaves: Params, vector: list[Tensor]) -> Params:
    pairs = [(gradient, part) for gradient, part in zip(first, vector, strict=True) if gradient.requires_grad]
    if not pairs:
        return map_params(torch.zeros_like, leaves)
    found = _grad([gradient for gradient, _ in pairs], list(leaves.values()), [part for _, part in pairs])
    return dict(zip(leaves, found, strict=True))


def _grad(outputs: Any, inputs: Any, cotangents: Any) -> tuple[Tensor, ...]:
    live = [(value, cotangent) for value, cotangent in zip(outputs, cotangents, strict=True) if value.requires_grad]
    return torch.autograd.grad(
        [value for value, _ in live],
        inputs,
        [cotangent for _, cotangent in live],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
