"""Lanczos: one Krylov space from which the solutions for every damping come."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_forget.curvature.determinism import resolution
from pyro_forget.curvature.operator import FlatOperator, LinearOperator, from_vector
from pyro_forget.params import Params, flatten, zeros_like
from pyro_forget.solvers.result import Result, Solution


@dataclass(frozen=True)
class Lanczos:
    """Lanczos with full reorthogonalisation; without damping its solution is that of conjugate gradients.

    Attributes:
        num_steps: products with A, at most the size; the basis holds num_steps vectors.
        rtol: converged when ‖(A + λI) x − b‖ ≤ rtol ‖b‖.

    Example:
        >>> from pyro_forget.curvature import MatrixOperator
        >>> rhs = {"loc": torch.tensor([1.0, 4.0])}
        >>> space = Lanczos().expand(MatrixOperator(torch.diag(torch.tensor([1.0, 4.0])), rhs), rhs)
        >>> [space.solve(damping).value["loc"].round(decimals=4) for damping in (0.0, 1.0)]
        [tensor([1., 1.]), tensor([0.5000, 0.8000])]

    References:
        Lanczos 1950; Parlett 1998, sections 6.9 (twice is enough) and 13.1.
    """

    num_steps: int = 20
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"`num_steps` is {self.num_steps}: pass a positive number.")

    def solve(self, operator: LinearOperator, rhs: Params) -> Solution:
        """Solve A x = rhs, projected on the Krylov space."""
        return self.expand(operator, rhs).solve()

    def expand(self, operator: LinearOperator, rhs: Params) -> "KrylovSpace":
        """The space spanned by b, A b, A² b, … for the right-hand side b; it stops early where A maps it to itself."""
        start = flatten(rhs).detach()
        length = _length(start)
        if length == 0 or not math.isfinite(length):
            return _space(start.new_zeros(0, len(start)), [], [], length, rhs, self.rtol, Result.MAX_STEPS)
        basis = start.new_empty(min(self.num_steps, len(start)), len(start))
        basis[0] = start / length
        diagonal, coupling, result = _fill(basis, FlatOperator(operator, rhs), resolution(rhs))
        return _space(basis, diagonal, coupling, length, rhs, self.rtol, result)


@dataclass(frozen=True)
class KrylovSpace:
    """An orthonormal basis Q of a Krylov space, and A projected on it: QᵀAQ = V diag(θ) Vᵀ.

    Attributes:
        basis: rows are the vectors of Q, shape (step, size), in the type of the right-hand side.
        ritz_values: θ, shape (step,), ascending, float64 on the CPU: A's curvature as seen from this space.
        ritz_vectors: V, shape (step, step), columns belong to `ritz_values`.
        length: ‖b‖.
        remainder: the norm of what A moves out of the space.
        like: the right-hand side b.
        rtol: see `Lanczos`.
        outcome: MAX_STEPS where the space can still grow, STAGNATED where A maps it to itself, NON_FINITE.
    """

    basis: Tensor
    ritz_values: Tensor
    ritz_vectors: Tensor
    length: float
    remainder: float
    like: Params
    rtol: float
    outcome: Result

    @property
    def num_steps(self) -> int:
        """The dimension of the space: the products it took."""
        return len(self.basis)

    @property
    def smallest_ritz(self) -> float:
        """The smallest curvature seen; infinite in an empty space. Damping must exceed its negative."""
        return float(self.ritz_values[0]) if self.num_steps else math.inf

    def solve(self, damping: float = 0.0) -> Solution:
        """Solve (A + damping·I) x = b, without another product.

        Negative or vanishing curvature in the space gives x = 0, as such a system has no minimum to step to. The
        residual is the one that Lanczos' recursion implies; it costs nothing and sees all but the rounding.
        """
        result = self._definiteness(damping)
        if result is not Result.CONVERGED or self.length == 0:
            return Solution(zeros_like(self.like), result, self.num_steps, 1.0 if self.length else 0.0)
        coefficients = self.ritz_vectors @ self._along_ritz(damping)
        value = coefficients.to(self.basis) @ self.basis
        residual = self.remainder * abs(float(coefficients[-1])) / self.length
        return Solution(
            from_vector(value, self.like),
            Result.CONVERGED if residual <= self.rtol else self.outcome,
            self.num_steps,
            residual,
        )

    def quadratic(self, damping: float = 0.0) -> float:
        """⟨x, A x⟩ for x of `solve(damping)`, with the undamped A."""
        return float((self.ritz_values * self._along_ritz(damping).square()).sum())

    def predicted_fall(self, damping: float = 0.0) -> float:
        """⟨b, x⟩ − ½⟨x, A x⟩: how far the quadratic with force b and curvature A falls along x of `solve(damping)`."""
        along = self._along_ritz(damping)
        return float((self._force() * along).sum()) - 0.5 * self.quadratic(damping)

    def _definiteness(self, damping: float) -> Result:
        if self.outcome is Result.NON_FINITE:
            return Result.NON_FINITE
        smallest = self.smallest_ritz + damping
        # The projection of num_steps products is known to about their number times the machine precision.
        largest = float(self.ritz_values.abs().max()) + damping if self.num_steps else 0.0
        floor = self.num_steps * resolution(self.like) * largest
        if smallest < -floor:
            return Result.NEGATIVE_CURVATURE
        return Result.CONVERGED if smallest > floor else Result.SINGULAR

    def _force(self) -> Tensor:
        """The right-hand side in the Ritz basis: Vᵀ‖b‖e₁."""
        return self.length * self.ritz_vectors[0] if self.num_steps else self.ritz_values

    def _along_ritz(self, damping: float) -> Tensor:
        """The solution in the Ritz basis: (θ + λ)⁻¹Vᵀ‖b‖e₁; zero where there is none."""
        if self._definiteness(damping) is not Result.CONVERGED:
            return torch.zeros_like(self.ritz_values)
        return self._force() / (self.ritz_values + damping)


def _fill(basis: Tensor, operator: FlatOperator, eps: float) -> tuple[list[float], list[float], Result]:
    """Fill `basis` from its first row on; the diagonal and the off-diagonal of QᵀAQ, the last entry leading out."""
    diagonal: list[float] = []
    coupling: list[float] = []
    for step in range(len(basis)):
        image = operator.mv(basis[step])
        curvature = float(torch.dot(basis[step].double(), image.double()))
        if not math.isfinite(curvature):
            return diagonal, coupling, Result.NON_FINITE
        # The last two vectors first, as in the three-term recursion: what that leaves along the others is rounding,
        # and one more pass takes it out. Two passes over all of them cost twice as much and gain nothing.
        for known in (basis[max(step - 1, 0) : step + 1], basis[: step + 1]):
            image = image - (known @ image) @ known
        diagonal.append(curvature)
        coupling.append(_length(image))
        # What is left of an image inside the space is rounding: a few units of the products' own size.
        if step + 1 == basis.shape[1] or coupling[-1] <= 10 * eps * max(map(abs, diagonal + coupling)):
            return diagonal, coupling, Result.STAGNATED
        if step + 1 < len(basis):
            basis[step + 1] = image / coupling[-1]
    return diagonal, coupling, Result.MAX_STEPS


def _space(
    basis: Tensor,
    diagonal: list[float],
    coupling: list[float],
    length: float,
    rhs: Params,
    rtol: float,
    outcome: Result,
) -> KrylovSpace:
    num_steps = len(diagonal)
    projected = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
    if num_steps > 1:
        inner = torch.tensor(coupling[: num_steps - 1], dtype=torch.float64, device="cpu")
        projected = projected + torch.diag(inner, 1) + torch.diag(inner, -1)
    ritz_values, ritz_vectors = torch.linalg.eigh(projected)
    remainder = coupling[-1] if coupling else 0.0
    outcome = outcome if math.isfinite(length) else Result.NON_FINITE
    return KrylovSpace(basis[:num_steps], ritz_values, ritz_vectors, length, remainder, rhs, rtol, outcome)


def _length(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))
