"""What stochastic forgetting on networks starts from: the force of the erased data, and the tilt of the retained."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_forget.curvature.natural import natural_of
from pyro_forget.data import Batch, Data
from pyro_forget.effects.program import Run
from pyro_forget.energy.points import Points, over_points, prior_gradient
from pyro_forget.inference.last_layer import LastLayer
from pyro_forget.params import Params, add, scale

HELD_OUT = 1000
SHARED_DRAWS = 8  # where all rows of a batch see one draw: batches that an expectation is spread over
_HELD_OUT_SHARE = 5  # at most one row in so many
_DECAY = 0.9
_SEED_PRIOR, _SEED_SHARE, _SEED_HELD_OUT = 11, 12, 13


@dataclass(frozen=True)
class Problem:
    """The tilted energy of the retained data, sampled.

    Attributes:
        points: the posterior.
        origin: γ₀, with a leading dim of copies (draws, or a single guide).
        tilt: t, what the retained data's gradient at γ₀ would be were γ₀ stationary for all data: −∇h − ∇prior; nats.
        rows: retained rows to descend on.
        held_out: other retained rows, to accept on.
        num_data: retained rows in all.
        seed: of everything.
        stationary: whether γ₀ is meant to be a minimum. A draw is not: its own deviation is to be kept.
    """

    points: Points
    origin: Params
    tilt: Params
    rows: Data
    held_out: Data
    num_data: int
    seed: int
    stationary: bool

    @staticmethod
    def of(points: Points, origin: Params, force: Params, retained: Data, seed: int, stationary: bool) -> "Problem":
        """From ∇h(γ₀) of the erased data: the tilt, and rows set aside."""
        pull = prior_gradient(points, origin, seed + _SEED_PRIOR)
        size = max(1, min(HELD_OUT, retained.num_data // _HELD_OUT_SHARE))
        order = torch.randperm(retained.num_data, generator=torch.Generator().manual_seed(seed + _SEED_HELD_OUT))
        held_out, rows = retained.split(retained.ids[order[:size]])
        if not rows.num_data:
            rows = held_out
        if points.shares_noise:
            held_out = held_out.with_batch_size(-(-size // SHARED_DRAWS))
        tilt = scale(add(force, pull), -1.0)
        return Problem(points, origin, tilt, rows, held_out, retained.num_data, seed, stationary)

    @property
    def copies(self) -> int:
        """How many points move."""
        return len(next(iter(self.origin.values())))


@dataclass(frozen=True)
class Beta:
    """The share of a tilt that each output unit keeps.

    β = Σ δδ⁰ / Σ δ⁰² over rows, δ and δ⁰ the residuals at γ and γ₀: 1 where a unit's residuals are as they were, 0
    where they have nothing in common any more. Entries of the output layer go by their unit, all others by the sum
    over units.

    Attributes:
        products, squares: running sums by unit, then their total.
    """

    layer: LastLayer | None
    products: Tensor
    squares: Tensor

    @staticmethod
    def one(layer: LastLayer | None, num_units: int, like: Tensor) -> "Beta":
        """1 everywhere."""
        ones = torch.ones(num_units + 1, dtype=torch.float64, device=like.device)
        return Beta(layer, ones * 1e-12, ones * 1e-12)

    def after(self, residual: Tensor, before: Tensor, decay: float = _DECAY) -> "Beta":
        """With one more batch of residuals, (row, unit)."""
        product, square = ((residual * before).sum(0).double(), before.square().sum(0).double())
        products = decay * self.products + torch.cat([product, product.sum()[None]])
        return Beta(self.layer, products, decay * self.squares + torch.cat([square, square.sum()[None]]))

    @property
    def values(self) -> Tensor:
        """By unit, then of everything else; (unit + 1,)."""
        return (self.products / self.squares.clamp(min=1e-300)).clamp(0.0, 1.0)

    def paired(self, here: Tensor, there: Tensor, aim: Tensor, name: str) -> Tensor:
        """Here − β∘(there − aim) of one entry, a new tensor of the aim's layout."""
        units = self.layer.units.get(name) if self.layer is not None else None
        if units is None:
            factor = float(self.values[-1])
            return torch.sub(here, there, alpha=factor, out=torch.empty_like(aim)).add_(aim, alpha=factor)
        return torch.addcmul(here, self.values.to(aim.dtype)[units], aim - there, out=torch.empty_like(aim))

    def times(self, params: Params) -> Params:
        """β∘params."""
        values = self.values
        found = {}
        for name, value in params.items():
            units = self.layer.units.get(name) if self.layer is not None else None
            factor = values[-1] if units is None else values[units]
            found[name] = value * factor.to(value.dtype)
        return found


def share_gradient(points: Points, stacked: Params, data: Data, seed: int) -> Params:
    """Σ ∇h(γ, z) over the data at each point, under one antithetic pair of noise for each row; nats."""
    return data.reduce(lambda batch: _pair_gradient(points, stacked, batch, seed), start=scale(stacked, 0.0))


def _pair_gradient(points: Points, stacked: Params, batch: Batch, seed: int) -> Params:
    noise = points.noise(batch, _batch_seed(seed + _SEED_SHARE, batch))
    there = batch_gradient(points, stacked, batch, noise, _nothing)[0]
    if not noise:
        return there
    back = {name: -value for name, value in noise.items()}
    return scale(add(there, batch_gradient(points, stacked, batch, back, _nothing)[0]), 0.5)


def _nothing(run: Run) -> tuple[Tensor, ...]:
    return ()


def batch_gradient(
    points: Points,
    stacked: Params,
    batch: Batch,
    noise: dict[str, Tensor],
    read: Callable[[Run], tuple[Tensor, ...]],
    weight: float = 1.0,
    fixed: Params | None = None,
) -> tuple[Params, tuple[Tensor, ...]]:
    """(weight · Σ ∇(−log likelihood) over the batch at each point, what `read` gives)."""
    leaves = {name: value.detach().requires_grad_(True) for name, value in stacked.items()}

    def of(run: Run) -> tuple[Tensor, ...]:
        return run.log_likelihood().sum(), *read(run)

    with torch.enable_grad():
        value, *found = over_points(points, leaves, batch, noise, of, fixed)
        slopes = torch.autograd.grad(
            value, list(leaves.values()), torch.full_like(value, -weight), allow_unused=True, materialize_grads=True
        )
    return dict(zip(leaves, slopes, strict=True)), tuple(part.detach() for part in found)


def residuals(run: Run) -> tuple[Tensor, ...]:
    """δ, (row, unit)."""
    natural = natural_of(run)
    return (natural.residual(natural.output.detach()),)


@dataclass(frozen=True)
class Verdict:
    """What held-out rows say of a move.

    Attributes:
        rise: φ, the change of the tilted energy, nats for the whole data set; negative if it fell.
        untilted: the change of the retained energy itself, nats.
    """

    rise: float
    untilted: float

    @property
    def accepted(self) -> bool:
        """Whether the energy fell."""
        return self.rise < 0


def judge(problem: Problem, end: Params, beta: Beta | None, aim: Params | None = None) -> Verdict:
    """φ = ΔF − ⟨β∘(g − N·aim), Δγ⟩ on the held-out rows under pinned noise, the mean over the points.

    `aim` is what the retained data's gradient at γ₀ is taken for, per datum, t/N by default. Then φ is the change of
    the energy that paired descent minimises: the part of ΔF that is noise of these rows is in g too and cancels.
    """
    points, origin = problem.points, problem.origin
    step = {name: end[name] - value for name, value in origin.items()}
    weighted = step if beta is None else beta.times(step)
    target = problem.tilt if aim is None else scale(aim, problem.num_data)
    weight = problem.num_data / problem.held_out.num_data
    # What did not move is run once for both points.
    moved = [name for name, value in step.items() if problem.copies > 1 or bool(value.any())]
    fixed = {name: value[0] for name, value in origin.items() if name not in moved}

    def of(batch: Batch) -> tuple[Tensor, Params]:
        noise = points.noise(batch, _batch_seed(problem.seed + _SEED_HELD_OUT, batch))
        start, stop = ({name: place[name] for name in moved} for place in (origin, end))
        slope, (before,) = batch_gradient(points, start, batch, noise, _rows, fixed=fixed)
        with torch.no_grad():
            after = over_points(points, stop, batch, noise, lambda run: run.log_likelihood(), fixed)
        return (before.double() - after.double()).mean(0).sum(), slope

    if not moved:
        return Verdict(0.0, 0.0)
    total, slope = problem.held_out.reduce(of)
    with torch.no_grad():
        priors = [
            _prior(points, {name: value[copy] for name, value in end.items()}, problem.seed)
            - _prior(points, {name: value[copy] for name, value in origin.items()}, problem.seed)
            for copy in range(problem.copies)
        ]
    untilted = weight * float(total) + sum(priors) / problem.copies
    tilted = sum(float(((weight * slope[n].double() - target[n].double()) * weighted[n].double()).sum()) for n in moved)
    return Verdict(untilted - tilted / problem.copies, untilted)


def _rows(run: Run) -> tuple[Tensor, ...]:
    return (run.log_likelihood(),)


def _prior(points: Points, point: Params, seed: int) -> float:
    return float(points.prior(point, seed + _SEED_PRIOR))


def _batch_seed(seed: int, batch: Batch) -> int:
    """The same noise for the same rows, whatever batches come before."""
    return seed * 1_000_003 + int(batch.rows[0])
