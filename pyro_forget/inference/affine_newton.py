"""Newton's method over affine maps of a cloud of draws: location and scale in turn, as for a Gaussian guide."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_forget.inference.affine import Affine

_FRACTIONS = (1.0, 0.5, 0.25, 0.125)
_LEAST_FALL = 0.25  # realised over predicted
_SMALL_FALL = 0.01  # of the fall so far: below, a further sweep is not worth its Hessian
_FLAT = 1e-9  # of the largest eigenvalue


@dataclass(frozen=True)
class AffineProblem:
    """F(T) = E[−log p(Tθ)] − ⟨tilt, E[Tθ]⟩ − log|det T|, which is KL(cloud under T ‖ p) but for the tilt.

    Attributes:
        draws: θ, (draw, d), float64.
        log_target: (log p, its gradient) at rows: (draw,) and (draw, d), nats.
        hessian: the mean over rows of ∇²(−log p), (d, d).
        tilt: E[∇(−log p₀)(θ)] under the density p₀ that the draws were meant for, (d,): what keeps them in place if
            nothing changes.
        hessian_before: the mean of ∇²(−log p₀) over the draws, (d, d).
    """

    draws: Tensor
    log_target: Callable[[Tensor], tuple[Tensor, Tensor]]
    hessian: Callable[[Tensor], Tensor]
    tilt: Tensor
    hessian_before: Tensor


@dataclass(frozen=True)
class AffineNewton:
    """Sweeps of location, then scale, each kept only if F falls by a quarter of what the location's step promises.

    The location takes the Newton step of the mean Hessian H over the moved draws. The scale becomes the symmetric map
    A with A H₀⁻¹ A = H⁻¹, H₀ the Hessian before: where the draws follow a Gaussian of precision H₀ they then follow one
    of precision H, and where a sampler made them wider, they stay as much wider.

    Attributes:
        max_sweeps: at most.
    """

    max_sweeps: int = 8

    def run(self, problem: AffineProblem) -> tuple[Affine, float]:
        """(the map, the fall of F in nats)."""
        here = _Place.at(problem, problem.draws.mean(0), torch.eye(problem.draws.shape[1]).to(problem.draws))
        root, total = _power(problem.hessian_before, 0.5), 0.0
        for _ in range(self.max_sweeps):
            hessian = problem.hessian(here.moved)
            step, predicted = _newton(hessian, problem.hessian_before, here.slope)
            if not predicted > _SMALL_FALL * total:
                break
            scale = _transport(root, hessian, here.scale)
            there = next(_lower(problem, here, step, scale, predicted), None)
            if there is None:
                break
            total, here = total + here.value - there.value, there
        return here.map(problem), total


@dataclass(frozen=True)
class _Place:
    """One map: θ ↦ loc + scale·(θ − the draws' mean)."""

    loc: Tensor
    scale: Tensor
    moved: Tensor
    value: float
    slope: Tensor

    @staticmethod
    def at(problem: AffineProblem, loc: Tensor, scale: Tensor) -> "_Place":
        moved = loc + (problem.draws - problem.draws.mean(0)) @ scale.T
        log_density, gradient = problem.log_target(moved)
        value = -log_density.mean() - problem.tilt @ loc - torch.linalg.slogdet(scale).logabsdet
        return _Place(loc, scale, moved, float(value), -gradient.mean(0) - problem.tilt)

    def map(self, problem: AffineProblem) -> Affine:
        return Affine(self.scale, self.loc - self.scale @ problem.draws.mean(0))


def _lower(problem: AffineProblem, here: _Place, step: Tensor, scale: Tensor, predicted: float) -> Iterator[_Place]:
    """Places that lie lower by enough: with the new scale, or else the old."""
    for fraction in _FRACTIONS:
        for size in (scale,) if scale is here.scale else (scale, here.scale):
            there = _Place.at(problem, here.loc + fraction * step, size)
            # A quadratic falls by fraction·(2 − fraction) of what the whole step promises.
            if here.value - there.value >= _LEAST_FALL * fraction * (2 - fraction) * predicted:
                yield there


def _newton(hessian: Tensor, before: Tensor, slope: Tensor) -> tuple[Tensor, float]:
    """(the step, the fall it promises); where H is not positive definite, of H + λH₀ that is."""
    damping, smallest = 0.0, float(torch.linalg.eigvalsh(hessian)[0])
    if smallest <= _FLAT * float(hessian.diagonal().abs().max()):
        damping = 2 * abs(smallest) / max(float(torch.linalg.eigvalsh(before)[0]), 1e-300) + 1e-3
    factor, failed = torch.linalg.cholesky_ex(hessian + damping * before)
    if bool(failed):
        return torch.zeros_like(slope), 0.0
    step = -torch.cholesky_solve(slope[:, None], factor)[:, 0]
    return step, float(-0.5 * slope @ step)


def _transport(root: Tensor | None, hessian: Tensor, otherwise: Tensor) -> Tensor:
    """A = H₀^½ (H₀^½ H H₀^½)^−½ H₀^½; as it is where a Hessian is not positive definite."""
    if root is None:
        return otherwise
    inner = _power(root @ hessian @ root, -0.5)
    return otherwise if inner is None else root @ inner @ root


def _power(matrix: Tensor, exponent: float) -> Tensor | None:
    """Of a positive definite matrix; None of another."""
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.T))
    if not float(values[0]) > _FLAT * float(values[-1]):
        return None
    return (vectors * values.pow(exponent)) @ vectors.T
