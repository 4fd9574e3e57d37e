"""The output layer alone: a convex problem in the features that a network's body gives a pool of rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from pyro_forget.data import Batch
from pyro_forget.inference.last_layer import Features, LastLayer, features, joined
from pyro_forget.inference.pairing import SHARED_DRAWS, Beta, Problem
from pyro_forget.params import Params

POOL = 2000
PROXIMAL = 0.05  # keeps a pool of few rows from being fitted to itself, in units of its own curvature
_ROUGH = 0.2
_ROUNDS = 2  # of solving and measuring β
_FLOOR = 1e-6  # of a curvature, relative to the largest


@dataclass(frozen=True)
class PoolEnergy:
    """The tilted energy of the last layer's step u, (unit, feature), over a pool of rows.

    E(u) = w·Σ ℓ(output₀ + Φuᵀ) + prior(γ₀ + u) − ⟨tilt, u⟩ + 0.05·w·‖u‖², the norm that of the Fisher matrix of the
    outputs times the second moments of the features.

    Attributes:
        features: of the pool.
        weight: w, retained rows for each row of the pool.
        prior: −log prior as a function of the step.
        tilt: β∘(g − t), (unit, feature).
        proximal: the factor 0.05.
    """

    features: Features
    weight: float
    prior: Callable[[Tensor], Tensor]
    tilt: Tensor
    proximal: float = PROXIMAL

    def __post_init__(self) -> None:
        phi, natural = self.features.phi, self.features.natural
        rows = len(phi)
        object.__setattr__(self, "_fisher", natural.fisher(natural.output) / rows)
        object.__setattr__(self, "_moments", phi.T @ phi / rows)

    def gradient(self, step: Tensor) -> tuple[float, Tensor]:
        """(E(u), ∇E(u)), the value in float64."""
        phi, natural = self.features.phi, self.features.natural
        loss, residual = natural.loss_and_residual(torch.addmm(natural.output, phi, step.T))
        leaf = step.detach().requires_grad_(True)
        with torch.enable_grad():
            prior = self.prior(leaf)
        (pull,) = torch.autograd.grad(prior, leaf, allow_unused=True, materialize_grads=True)
        strength = self.proximal * self.weight * len(phi)
        near = self._fisher @ step @ self._moments  # type: ignore[attr-defined]
        value = self.weight * loss.sum(dtype=torch.float64) + prior.detach()
        value = value + (step * (strength * near - self.tilt)).sum(dtype=torch.float64)
        return float(value), self.weight * (residual.T @ phi) + pull + 2 * strength * near - self.tilt

    def residual_gradient(self, step: Tensor) -> Tensor:
        """w·Σ δφᵀ, the data's slope, (unit, feature)."""
        phi, natural = self.features.phi, self.features.natural
        return self.weight * natural.residual(torch.addmm(natural.output, phi, step.T)).T @ phi

    def minimum(self, start: Tensor, max_steps: int, rtol: float) -> tuple[Tensor, int]:
        """(the minimiser, evaluations): L-BFGS in coordinates where the Kronecker factors are the identity."""
        whiten = self._whitening()
        leaf = whiten.inverse(start).detach().requires_grad_(True)
        evaluations = 0

        def closure() -> float:
            nonlocal evaluations
            evaluations += 1
            value, slope = self.gradient(whiten(leaf.detach()))
            leaf.grad = whiten.transposed(slope)
            return value

        closure()
        size = float(leaf.grad.abs().max()) if leaf.grad is not None else 0.0
        optimiser = torch.optim.LBFGS(
            [leaf],
            max_iter=max_steps,
            history_size=20,
            tolerance_grad=rtol * size,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        if size > 0:
            optimiser.step(closure)
        return whiten(leaf.detach()), evaluations

    def _whitening(self) -> "_Whitening":
        around = torch.zeros_like(self.tilt)
        along = torch.randn(around.shape, generator=torch.Generator().manual_seed(0)).to(around)
        pull = (self._pull(along) - self._pull(around)).double()
        prior = float((pull * along).sum() / along.double().square().sum())
        fisher, units = torch.linalg.eigh(self._fisher)  # type: ignore[attr-defined]
        moments, axes = torch.linalg.eigh(self._moments)  # type: ignore[attr-defined]
        rows = self.weight * len(self.features.phi) * (1 + 2 * self.proximal)
        curvature = rows * fisher.clamp(min=0)[:, None] * moments.clamp(min=0) + max(prior, 0.0)
        floor = _FLOOR * curvature.max().clamp(min=1e-12)
        return _Whitening(units, axes, curvature.clamp(min=float(floor)).rsqrt())

    def _pull(self, step: Tensor) -> Tensor:
        leaf = step.detach().requires_grad_(True)
        with torch.enable_grad():
            value = self.prior(leaf)
        (slope,) = torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)
        return slope


@dataclass(frozen=True)
class _Whitening:
    """u = U (v ⊙ d) Aᵀ."""

    units: Tensor
    axes: Tensor
    lengths: Tensor

    def __call__(self, value: Tensor) -> Tensor:
        return self.units @ (value * self.lengths) @ self.axes.T

    def transposed(self, value: Tensor) -> Tensor:
        return (self.units.T @ value @ self.axes) * self.lengths

    def inverse(self, value: Tensor) -> Tensor:
        return (self.units.T @ value @ self.axes) / self.lengths


@dataclass(frozen=True)
class Solved:
    """The output layer's solution.

    Attributes:
        params: the points with it, a leading dim of copies.
        evaluations: of the pool's energy.
        beta: as the residuals left it.
    """

    params: Params
    evaluations: int
    beta: Beta


def draw_pool(problem: Problem, size: int | None, seed: int) -> list[Batch]:
    """Rows for the output layer, in as many batches as draws of noise are wanted.

    Raises:
        ValueError: more are asked for than there are.
    """
    if size is not None and size > problem.num_data:
        raise ValueError(f"`pool` is {size}, the retained data have {problem.num_data} rows: ask for fewer.")
    generator = torch.Generator().manual_seed(seed)
    whole = min(size or POOL, problem.rows.num_data)
    parts = min(SHARED_DRAWS, whole) if problem.points.shares_noise else 1
    return list(islice(problem.rows.minibatches(whole // parts, generator), parts))


def solve_output_layer(
    problem: Problem, layer: LastLayer, pool: Sequence[Batch], seed: int, max_steps: int = 20, rtol: float = 0.1
) -> Solved:
    """Minimise the pool's tilted energy over the last layer of every point, the body as it is."""
    order = layer.order()
    found: list[Params] = []
    evaluations, beta = 0, None
    for copy in range(problem.copies):
        point = {name: value[copy] for name, value in problem.origin.items()}
        seen = joined([features(problem.points, point, layer, b, seed + i) for i, b in enumerate(pool)])
        energy, target = _energy(problem, layer, point, seen, copy)
        step, beta, used = _solved(energy, target, layer, problem.stationary, max_steps, rtol)
        evaluations += used
        found.append(point | _stepped(point, layer, order, step))
    params = {name: torch.stack([point[name] for point in found]) for name in problem.origin}
    if beta is None:
        raise ValueError("There is no point to solve the output layer of.")
    return Solved(params, evaluations, beta)


def _energy(problem: Problem, layer: LastLayer, point: Params, seen: Features, copy: int) -> tuple[PoolEnergy, Tensor]:
    """(the energy with the whole tilt, t by unit and feature)."""
    order = layer.order()
    joined = torch.cat([problem.tilt[name][copy].reshape(-1) for name in layer.units])
    target = joined[order]

    def prior(step: Tensor) -> Tensor:
        return problem.points.prior(point | _stepped(point, layer, order, step), problem.seed)

    weight = problem.num_data / len(seen.phi)
    energy = PoolEnergy(seen, weight, prior, torch.zeros_like(target))
    return replace(energy, tilt=energy.residual_gradient(torch.zeros_like(target)) - target), target


def _solved(
    energy: PoolEnergy, target: Tensor, layer: LastLayer, measured: bool, max_steps: int, rtol: float
) -> tuple[Tensor, Beta, int]:
    """(u, β, evaluations): β is 1 at first, then what the residuals at the solution say."""
    natural, whole = energy.features.natural, energy.tilt
    before = natural.residual(natural.output)
    # Of a first solution only the residuals are wanted.
    step, used = energy.minimum(torch.zeros_like(target), max_steps, max(rtol, _ROUGH) if measured else rtol)
    beta = Beta.one(layer, layer.num_units, before)
    for _ in range(_ROUNDS - 1 if measured else 0):
        output = torch.addmm(natural.output, energy.features.phi, step.T)
        beta = Beta.one(layer, layer.num_units, before).after(natural.residual(output), before)
        tilted = replace(energy, tilt=beta.values[:-1, None].to(whole.dtype) * whole)
        step, more = tilted.minimum(step, max_steps, rtol)
        used += more
    return step, beta, used


def _stepped(point: Params, layer: LastLayer, order: Tensor, step: Tensor) -> Params:
    """The last layer's entries after a step (unit, feature)."""
    # A sum of one: `order` names every place once.
    flat = torch.zeros(order.numel(), dtype=step.dtype, device=step.device).index_put(
        (order.reshape(-1),), step.reshape(-1)
    )
    sizes = [point[name].numel() for name in layer.units]
    pieces = flat.split(sizes)
    return {
        name: point[name] + piece.reshape(point[name].shape) for name, piece in zip(layer.units, pieces, strict=True)
    }
