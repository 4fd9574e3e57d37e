"""The Gauss-Newton matrix of a Gaussian guide's location: E_q[JᵀΛJ] over the data sites plus the prior's curvature."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from pyro_forget.curvature.fisher import SAMPLED, Family, family_of, outputs_of, sampled_outputs
from pyro_forget.curvature.jacobian import Jacobian
from pyro_forget.curvature.prior import PriorCurvature
from pyro_forget.curvature.tape import MAX_KEPT_BATCHES, pays
from pyro_forget.data import Batch, Data
from pyro_forget.effects.noise import Noise
from pyro_forget.effects.program import Run, quiet
from pyro_forget.energy import GaussianEnergy
from pyro_forget.gaussian import Gaussian
from pyro_forget.params import Params, add, size, zeros_like

MAX_COUPLED = 64
PROBED_ROWS = 64


class GaussNewton:
    """C = E_q[JᵀΛJ] + prior curvature at one Gaussian, J the Jacobian of the model's outputs in the location.

    Positive by construction in the data. A product is one pass forward and back over outputs whose graph is kept for
    up to four batches, and made anew batch by batch when they are more, so that memory does not grow with the data.
    Of networks the pass forward is played from a `Tape`, as in `Hessian`. Where J is the same for every draw (outputs
    linear in the latents), Λ is averaged over the draws first and a product costs one draw.

    Args:
        energy: with its noise pinned.
        gaussian: where.
        data: the rows of the curvature.

    References:
        N. N. Schraudolph (2002), Fast curvature matrix-vector products; J. Martens (2020), New insights and
        perspectives on the natural gradient method, section 8.
    """

    def __init__(self, energy: GaussianEnergy, gaussian: Gaussian, data: Data) -> None:
        self.energy, self.gaussian, self.data = energy, gaussian.detach(), data
        self._prior = PriorCurvature(energy, self.gaussian)
        self._closed = _is_closed(energy, self.gaussian)
        several = energy.noise.num_draws > 1
        self._linear = several and self._closed and _is_linear(energy, self.gaussian, _some_rows(data))
        self._keep = data.num_data <= MAX_KEPT_BATCHES * data.batch_size
        self._kept: list[_Pieces] = []
        self.num_products = 0

    def mv(self, vector: Params) -> Params:
        """C · vector, by site."""
        self.num_products += 1
        start = add(zeros_like(vector), self._prior.mv(vector))
        if self._kept:
            return reduce(add, (pieces.product(vector) for pieces in self._kept), start)
        return self.data.reduce(lambda batch: self._product(batch, vector), start=start)

    def _product(self, batch: Batch, vector: Params) -> Params:
        make = _linear_pieces if self._linear else _pieces
        pieces = make(self.energy, self.gaussian, batch, self._way(batch))
        if self._keep:
            self._kept.append(pieces)
        return pieces.product(vector)

    def _way(self, batch: Batch) -> str:
        """How J · v is made; what is sampled is neither recorded nor differentiated forward."""
        if not self._closed:
            return "sampled"
        if not self._keep:
            return "forward"
        num_draws = 1 if self._linear else self.energy.noise.num_draws
        return "tape" if pays(size(self.gaussian.loc) * num_draws, len(batch)) else "graph"


@dataclass(frozen=True)
class _Pieces:
    """One batch's outputs as a function of the location, and Λ."""

    jacobian: Jacobian
    fisher: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]

    def product(self, vector: Params) -> Params:
        """JᵀΛJ · vector."""
        tangents = self.jacobian.push(vector)
        return self.jacobian.pull(dict(zip(tangents, self.fisher(tuple(tangents.values())), strict=True)))


@dataclass
class _Read:
    """Which families a run's data sites have; filled by the first run."""

    families: list[Family] = field(default_factory=list)

    def __call__(self, run: Run) -> list[tuple[tuple[Tensor, ...], Tensor]]:
        sites = [site for site in run.sites if site.is_data]
        self.families = [family_of(site) or SAMPLED for site in sites]
        return [
            sampled_outputs(site) if family is SAMPLED else outputs_of(site, family)
            for site, family in zip(sites, self.families, strict=True)
        ]


def _is_closed(energy: GaussianEnergy, gaussian: Gaussian) -> bool:
    """Whether all data sites' Fisher matrices are closed-form; sampling needs one draw at a time."""
    with torch.no_grad(), quiet():
        sites = energy.run_prior(gaussian.loc).sites
    return all(family_of(site) is not None for site in sites if site.is_data)


def _is_linear(energy: GaussianEnergy, gaussian: Gaussian, batch: Batch) -> bool:
    """Whether all draws' outputs move alike when the location moves: then J does not depend on the draw."""
    shift = {name: 0.37 * gaussian.deviation(name) * _wave(value) for name, value in gaussian.loc.items()}
    with torch.no_grad():
        before, _ = energy.over_noise(gaussian, batch, _Read())
        after, _ = energy.over_noise(Gaussian(add(gaussian.loc, shift), gaussian.scale), batch, _Read())
    for (old, _), (new, _) in zip(before, after, strict=True):
        for mine, theirs in zip(old, new, strict=True):
            move = theirs - mine
            tolerance = 1e4 * torch.finfo(move.dtype).eps * float(mine.abs().max().clamp(min=1.0))
            if float((move - move[:1]).abs().max()) > tolerance:
                return False
    return True


def _some_rows(data: Data) -> Batch:
    """A few rows from all over the data."""
    chosen = torch.linspace(0, data.num_data - 1, min(data.num_data, PROBED_ROWS)).round().long()
    return next(data.split(data.ids[chosen])[0].with_batch_size(PROBED_ROWS).batches())


def _wave(like: Tensor) -> Tensor:
    return torch.cos(torch.arange(like.numel(), dtype=like.dtype, device=like.device)).reshape(like.shape)


def _pieces(energy: GaussianEnergy, gaussian: Gaussian, batch: Batch, way: str) -> _Pieces:
    """The outputs of a batch as a function of the location, at fixed scale and noise."""
    read, (sites, weights), jacobian = _jacobian(energy, gaussian, batch, way)
    return _Pieces(jacobian, _fisher(read.families, sites, weights))


def _linear_pieces(energy: GaussianEnergy, gaussian: Gaussian, batch: Batch, way: str) -> _Pieces:
    """The same where J is one for all draws: the outputs of one draw, Λ averaged over all."""
    read = _Read()
    with torch.no_grad():
        sites, weights = energy.over_noise(gaussian, batch, read)
    # Whichever draw: its noise need not belong to its rows.
    _, _, jacobian = _jacobian(energy.with_noise(Noise.fresh(energy.noise.seed, 1)), gaussian, batch, way)
    return _Pieces(jacobian, _mean_fisher(read.families, sites, weights))


def _jacobian(
    energy: GaussianEnergy, gaussian: Gaussian, batch: Batch, way: str
) -> tuple[_Read, tuple[Any, Tensor], Jacobian]:
    """(families, what `over_noise` gave, the Jacobian of the outputs in the location)."""
    read, first = _Read(), list[tuple[Any, Tensor]]()

    def outputs(loc: Params) -> Params:
        sites, weights = energy.over_noise(Gaussian(loc, gaussian.scale), batch, read, one_by_one=way == "sampled")
        if not first:
            first.append((sites, weights))
        values = (value for outputs, _ in sites for value in outputs)
        return {str(place): value for place, value in enumerate(values)}

    jacobian = Jacobian(outputs, gaussian.loc, "graph" if way == "sampled" else way)
    return read, first[0], jacobian


def _fisher(families: list[Family], sites: Any, weights: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """Λ of every draw, weighted by the draw."""
    held = [
        (family.factors(tuple(value.detach() for value in outputs)), _by_draw(weights, outputs[0], weight))
        for family, (outputs, weight) in _zip(families, sites)
    ]

    def product(tangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for family, (factors, by_draw) in zip(families, held, strict=True):
            own, tangents = tangents[: len(factors)], tangents[len(factors) :]
            found += [by_draw * value for value in family.product(factors, own)]
        return tuple(found)

    return product


def _mean_fisher(families: list[Family], sites: Any, weights: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """Λ averaged over the draws, to multiply the tangents of a single one."""
    if any(family.coupled and outputs[0].shape[-1] > MAX_COUPLED for family, (outputs, _) in _zip(families, sites)):
        every = _fisher(families, sites, weights)
        return lambda tangents: tuple(
            value.sum(0, keepdim=True) for value in every(tuple(t.expand(len(weights), *t.shape[1:]) for t in tangents))
        )
    means = [_mean_of(family, outputs, weight, weights) for family, (outputs, weight) in _zip(families, sites)]

    def product(tangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for (family, (outputs, _)), mean in zip(_zip(families, sites), means, strict=True):
            own, tangents = tangents[: len(outputs)], tangents[len(outputs) :]
            if family.coupled:
                found.append(torch.einsum("...ij,z...j->z...i", mean[0], own[0]))
            else:
                found += [factor * value for factor, value in zip(mean, own, strict=True)]
        return tuple(found)

    return product


def _mean_of(family: Family, outputs: tuple[Tensor, ...], weight: Tensor, weights: Tensor) -> list[Tensor]:
    """Λ's mean: elementwise factors, or matrices over the last dim."""
    by_draw, factors = _by_draw(weights, outputs[0], weight), family.factors(outputs)
    if not family.coupled:
        return [(by_draw * factor).sum(0) for factor in factors]
    weighted = (by_draw.sqrt() * factors[0]).movedim(0, -2)
    outer = weighted.mT @ weighted
    # Rows of ppᵀ sum to p.
    return [torch.diag_embed(outer.sum(-1)) - outer]


def _by_draw(weights: Tensor, output: Tensor, weight: Tensor) -> Tensor:
    """The draws' weights times the site's own, in a shape that multiplies an output."""
    return weights.reshape(-1, *(1,) * (output.ndim - 1)) * weight


def _zip(families: list[Family], sites: Any) -> list[tuple[Family, Any]]:
    return list(zip(families, sites, strict=True))
