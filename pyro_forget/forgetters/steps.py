"""Newton steps of draws: H⁻¹∇h, with H the mean over the draws of the retained Hessian."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_forget.curvature import LinearOperator, as_matrix
from pyro_forget.curvature.hessian import Hessian
from pyro_forget.data import Data
from pyro_forget.forgetters.cloud import Cloud
from pyro_forget.solvers import ConjugateGradient, Result

DENSE = 500  # dimensions up to which the Hessian is written out, at one product each
_CURVATURE_NUMBERS = 4096  # draws times dimensions that the Hessian is a mean over: it only has to start a search
_CURVATURE_DRAWS = (8, 64)
_RTOL = 1e-3  # of conjugate gradients: the mean over few draws is no better


@dataclass(frozen=True)
class Steps:
    """H⁻¹ times some forces.

    Attributes:
        value: one row for each force, (row, d).
        solver: how the system was solved, and with what result.
        num_products: products with H.
        residual: the largest ‖Hx − b‖ / ‖b‖; None where H was not used.
        usable: whether the steps are worth trying.
    """

    value: Tensor
    solver: str
    num_products: int
    residual: float | None
    usable: bool = True


def newton_steps(cloud: Cloud, retained: Data, forces: Tensor) -> Steps:
    """H⁻¹ of each force, (row, d): by a Cholesky factor of H up to 500 dimensions, by conjugate gradients beyond.

    Where the mean Hessian is not positive definite there is no step to a minimum. With enough draws their covariance
    stands in for its inverse, which it approaches for data without end.
    """
    num_draws, dim = cloud.matrix.shape
    fewest, most = _CURVATURE_DRAWS
    energy = cloud.mean_energy(max(fewest, min(most, _CURVATURE_NUMBERS // dim)))
    like = cloud.shift(torch.zeros_like(cloud.matrix[0]))
    operator = Hessian(energy, like, retained)
    if dim > DENSE:
        return _iterative(cloud, operator, forces)
    matrix = as_matrix(operator, like).to(forces)
    factor, failed = torch.linalg.cholesky_ex(0.5 * (matrix + matrix.T))
    if not bool(failed) and bool(factor.isfinite().all()):
        value = torch.cholesky_solve(forces.T, factor).T
        return Steps(value, "Cholesky: converged", dim, _residual(value @ matrix, forces))
    if num_draws <= dim + 1:
        return Steps(torch.zeros_like(forces), f"Cholesky: {Result.NEGATIVE_CURVATURE}", dim, 1.0, usable=False)
    return Steps(forces @ cloud.matrix.T.cov(), "covariance of the draws, for H is indefinite", dim, None)


def _iterative(cloud: Cloud, operator: LinearOperator, forces: Tensor) -> Steps:
    """Conjugate gradients, preconditioned by the draws' own variances."""
    variances = cloud.matrix.var(0) if len(cloud.matrix) >= _CURVATURE_DRAWS[0] else torch.ones_like(forces[0])
    positive = variances.clamp(min=float(variances.mean()) * 1e-6 + torch.finfo(variances.dtype).tiny)
    solver = ConjugateGradient(rtol=_RTOL, max_steps=100, preconditioner=cloud.shift(positive))
    solutions = solver.solve_many(operator, cloud.params(forces, (len(forces),)))
    value = torch.stack([cloud.vector(solution.value) for solution in solutions])
    results = {solution.result for solution in solutions}
    return Steps(
        value=value,
        solver=f"conjugate gradients: {', '.join(sorted(results))}",
        num_products=sum(solution.num_steps for solution in solutions),
        residual=max(solution.residual for solution in solutions),
        usable=bool(value.isfinite().all()) and bool(value.any()),
    )


def _residual(products: Tensor, forces: Tensor) -> float:
    lengths = torch.linalg.vector_norm(forces, dim=1)
    gaps = torch.linalg.vector_norm(products - forces, dim=1)
    return float((gaps / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)).max())
