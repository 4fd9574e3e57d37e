"""The Gauss-Newton matrix of a Gaussian guide's location: E_q[JᵀΛJ] over the data sites plus the prior's curvature."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_forget.curvature.fisher import SAMPLED, Family, family_of, outputs_of, sampled_outputs
from pyro_forget.curvature.prior import PriorCurvature
from pyro_forget.data import Batch, Data
from pyro_forget.effects.noise import Noise
from pyro_forget.effects.program import Run, quiet
from pyro_forget.energy import GaussianEnergy
from pyro_forget.gaussian import Gaussian
from pyro_forget.params import Params, add, zeros_like

MAX_COUPLED = 64
PROBED_ROWS = 64


class GaussNewton:
    """C = E_q[JᵀΛJ] + prior curvature at one Gaussian, J the Jacobian of the model's outputs in the location.

    Positive by construction in the data. A product is one pass forward and back over outputs whose graph is kept
    when the data are one batch, and made anew batch by batch when they are more, so that memory does not grow with
    the data. Where J is the same for every draw (outputs linear in the latents), Λ is averaged over the draws first
    and a product costs one draw.

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
        self._linear = self._closed and _is_linear(energy, self.gaussian, _some_rows(data))
        self._keep = data.num_data <= data.batch_size
        self._kept: dict[int, _Pieces] = {}
        self.num_products = 0

    def mv(self, vector: Params) -> Params:
        """C · vector, by site."""
        self.num_products += 1
        start = add(zeros_like(vector), self._prior.mv(vector))
        return self.data.reduce(lambda batch: self._pieces(batch).product(vector), start=start)

    def _pieces(self, batch: Batch) -> "_Pieces":
        key = int(batch.rows[0])
        if key in self._kept:
            return self._kept[key]
        make = _linear_pieces if self._linear else _pieces
        pieces = make(self.energy, self.gaussian, batch, self._closed)
        if self._keep:
            self._kept[key] = pieces
        return pieces


@dataclass(frozen=True)
class _Pieces:
    """One batch's outputs with their graph, and Λ."""

    leaves: Params
    outputs: tuple[Tensor, ...]
    fisher: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
    transposed: list[Any] = field(default_factory=list)

    def product(self, vector: Params) -> Params:
        """JᵀΛJ · vector."""
        return self._pull(self.fisher(self._push(vector)))

    @property
    def live(self) -> list[Tensor]:
        """The outputs that the location moves: a fixed noise scale is none of them."""
        return [value for value in self.outputs if value.requires_grad]

    def _push(self, vector: Params) -> tuple[Tensor, ...]:
        """J · vector, as the derivative of Jᵀu in u: double backward, whose graph is kept."""
        if not self.live:
            return tuple(torch.zeros_like(value) for value in self.outputs)
        if not self.transposed:
            dummies = [torch.zeros_like(value, requires_grad=True) for value in self.live]
            self.transposed.append((dummies, _grad(self.live, list(self.leaves.values()), dummies, create_graph=True)))
        dummies, pulled = self.transposed[0]
        pairs = [(p, vector[name]) for p, name in zip(pulled, self.leaves, strict=True) if p.requires_grad]
        tangents = iter(_grad([p for p, _ in pairs], dummies, [v for _, v in pairs]))
        return tuple(next(tangents) if value.requires_grad else torch.zeros_like(value) for value in self.outputs)

    def _pull(self, cotangents: tuple[Tensor, ...]) -> Params:
        """Jᵀ · cotangents."""
        if not self.live:
            return zeros_like(self.leaves)
        wanted = [part for part, value in zip(cotangents, self.outputs, strict=True) if value.requires_grad]
        return dict(zip(self.leaves, _grad(self.live, list(self.leaves.values()), wanted), strict=True))


def _grad(
    outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor], create_graph: bool = False
) -> tuple[Tensor, ...]:
    """The vector-Jacobian product; zeros for inputs that play no part. The graph stays for the next product."""
    return torch.autograd.grad(
        outputs,
        inputs,
        cotangents,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


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


def _pieces(energy: GaussianEnergy, gaussian: Gaussian, batch: Batch, closed: bool) -> _Pieces:
    """The outputs of a batch as a function of the location, at fixed scale and noise."""
    leaves = {name: value.detach().requires_grad_(True) for name, value in gaussian.loc.items()}
    read = _Read()
    with torch.enable_grad():
        sites, weights = energy.over_noise(Gaussian(leaves, gaussian.scale), batch, read, one_by_one=not closed)
    return _Pieces(leaves, _outputs(sites), _fisher(read.families, sites, weights))


def _linear_pieces(energy: GaussianEnergy, gaussian: Gaussian, batch: Batch, closed: bool) -> _Pieces:
    """The same where J is one for all draws: the outputs of one draw, Λ averaged over all."""
    leaves = {name: value.detach().requires_grad_(True) for name, value in gaussian.loc.items()}
    read = _Read()
    with torch.no_grad():
        sites, weights = energy.over_noise(gaussian, batch, read)
    with torch.enable_grad():
        # Whichever draw: its noise need not belong to its rows.
        one = energy.with_noise(Noise.fresh(energy.noise.seed, 1))
        alone, _ = one.over_noise(Gaussian(leaves, gaussian.scale), batch, _Read())
    return _Pieces(leaves, _outputs(alone), _mean_fisher(read.families, sites, weights))


def _outputs(sites: Any) -> tuple[Tensor, ...]:
    return tuple(value for outputs, _ in sites for value in outputs)


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
    (probability,) = factors
    mean = (by_draw * probability).sum(0)
    return [torch.diag_embed(mean) - torch.einsum("s...i,s...j->...ij", by_draw * probability, probability)]


def _by_draw(weights: Tensor, output: Tensor, weight: Tensor) -> Tensor:
    """The draws' weights times the site's own, in a shape that multiplies an output."""
    return weights.reshape(-1, *(1,) * (output.ndim - 1)) * weight


def _zip(families: list[Family], sites: Any) -> list[tuple[Family, Any]]:
    return list(zip(families, sites, strict=True))
