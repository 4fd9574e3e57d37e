"""The dense solve: exact, for as many parameters as a square matrix of them fits in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_forget.curvature.determinism import resolution
from pyro_forget.curvature.operator import LinearOperator, as_matrix, from_vector
from pyro_forget.params import Params, flatten
from pyro_forget.solvers.result import Result, Solution


@dataclass(frozen=True)
class Cholesky:
    """The operator written out as a matrix, symmetrised, and factorised in float64.

    Dead coordinates, whose row and column are zero, are left where they are: the matrix that a guide unconstrains to
    a triangular scale has more entries than the scale, and no energy depends on the rest.

    Attributes:
        rtol: converged when ‖A x − b‖ ≤ rtol ‖b‖. A force on a dead coordinate counts: no step can answer it.
        dead_rtol: a row is dead if no entry exceeds this fraction of the largest entry of A.
    """

    rtol: float = 1e-6
    dead_rtol: float = 1e-14

    def solve(self, operator: LinearOperator, rhs: Params) -> Solution:
        """Solve A x = rhs, at the price of as many products as `rhs` has entries."""
        target = flatten(rhs).detach().double()
        length = torch.linalg.vector_norm(target)
        value = torch.zeros_like(target)
        if not bool(torch.isfinite(length)):
            return _solution(value, rhs, Result.NON_FINITE, 0, float(length))
        if length == 0:
            return _solution(value, rhs, Result.CONVERGED, 0, 0.0)
        matrix = as_matrix(operator, rhs).double()
        matrix = 0.5 * (matrix + matrix.T)
        if not bool(torch.isfinite(matrix).all()):
            return _solution(value, rhs, Result.NON_FINITE, len(target), 1.0)
        live = matrix.abs().amax(dim=1) > self.dead_rtol * matrix.abs().max()
        result, value[live] = _solve_definite(matrix[live][:, live], target[live], resolution(rhs))
        residual = float(torch.linalg.vector_norm(target - matrix @ value) / length)
        if result is Result.CONVERGED and not residual <= self.rtol:
            result = Result.SINGULAR
        return _solution(value, rhs, result, len(target), residual)


def _solve_definite(matrix: Tensor, target: Tensor, eps: float) -> tuple[Result, Tensor]:
    """The solution for a positive-definite matrix without dead rows; zero and why for any other."""
    zero = torch.zeros_like(target)
    diagonal = matrix.diagonal()
    if len(diagonal) == 0:
        return Result.SINGULAR, zero
    if bool((diagonal <= 0).any()):
        return Result.NEGATIVE_CURVATURE, zero
    # A unit diagonal takes the units of the parameters out of the condition number.
    root = diagonal.rsqrt()
    scaled = matrix * root[:, None] * root
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if bool(failed):
        smallest = float(torch.linalg.eigvalsh(scaled)[0])
        return Result.NEGATIVE_CURVATURE if smallest < -len(root) * eps else Result.SINGULAR, zero
    # Rounding can lift a zero pivot well above the machine precision; the condition number it cannot hide.
    condition = torch.linalg.matrix_norm(scaled, 1) * torch.linalg.matrix_norm(torch.cholesky_inverse(factor), 1)
    if not float(condition) * len(root) * torch.finfo(scaled.dtype).eps < 1:
        return Result.SINGULAR, zero
    return Result.CONVERGED, root * torch.cholesky_solve((root * target)[:, None], factor)[:, 0]


def _solution(value: Tensor, like: Params, result: Result, num_steps: int, residual: float) -> Solution:
    return Solution(from_vector(value, like), result, num_steps, residual)
