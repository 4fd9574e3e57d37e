"""Newton steps of draws: H⁻¹∇h, with H the mean over the draws of the retained Hessian."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_forget.curvature import Congruence, as_matrix
from pyro_forget.curvature.hessian import Hessian
from pyro_forget.data import Data
from pyro_forget.forgetters.cloud import Cloud
from pyro_forget.solvers import ConjugateGradient, Lanczos, Result

DENSE = 500  # dimensions up to which the Hessian is written out, at one product each
_CURVATURE_NUMBERS = 4096  # draws times dimensions that the Hessian is a mean over: it only has to start a search
_CURVATURE_DRAWS = (8, 64)
_RTOL = 1e-3  # of a solve: the mean over few draws is no better
_PRODUCTS = 40  # of a common shift: in the draws' own metric the spectrum is near 1 but for a few directions
DAMPINGS = (0.0, 0.5, 2.0, 8.0, 32.0)


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


@dataclass(frozen=True)
class Shift:
    """A common step of all draws, x of (H + λD)x = force, D the draws' own precisions.

    Attributes:
        value: x, (d,).
        damping: λ.
        predicted: by how much the tilted energy falls if it is quadratic, nats.
        num_products: products with H.
        residual: ‖(H + λD)x − force‖ / ‖force‖ in the metric of D.
    """

    value: Tensor
    damping: float
    predicted: float
    num_products: int
    residual: float


def newton_steps(cloud: Cloud, retained: Data, forces: Tensor) -> Steps:
    """H⁻¹ of each force, (row, d): by a Cholesky factor of H up to 500 dimensions, by conjugate gradients beyond.

    Where the mean Hessian is not positive definite there is no step to a minimum. With enough draws their covariance
    stands in for its inverse, which it approaches for data without end.
    """
    num_draws, dim = cloud.matrix.shape
    if dim > DENSE:
        return _iterative(cloud, retained, forces)
    operator = _hessian(cloud, retained)
    matrix = as_matrix(operator, operator.params).to(forces)
    factor, failed = torch.linalg.cholesky_ex(0.5 * (matrix + matrix.T))
    if not bool(failed) and bool(factor.isfinite().all()):
        value = torch.cholesky_solve(forces.T, factor).T
        return Steps(value, "Cholesky: converged", dim, _residual(value @ matrix, forces))
    if num_draws <= dim + 1:
        return Steps(torch.zeros_like(forces), f"Cholesky: {Result.NEGATIVE_CURVATURE}", dim, 1.0, usable=False)
    return Steps(forces @ cloud.matrix.T.cov(), "covariance of the draws, for H is indefinite", dim, None)


def common_shifts(cloud: Cloud, retained: Data, force: Tensor) -> Iterator[Shift]:
    """The step of a mean force (d,) under growing damping, all from one Krylov space; none where H outweighs it."""
    root = _variances(cloud).sqrt()
    operator = Congruence(_hessian(cloud, retained), cloud.shift(root))
    space = Lanczos(_PRODUCTS, rtol=_RTOL).expand(operator, cloud.shift(root * force))
    for damping in DAMPINGS:
        solution = space.solve(damping)
        if solution.result in (Result.CONVERGED, Result.MAX_STEPS, Result.STAGNATED):
            yield Shift(
                value=root * cloud.vector(solution.value),
                damping=damping,
                predicted=space.predicted_fall(damping),
                num_products=space.num_steps,
                residual=solution.residual,
            )


def mean_hessian(cloud: Cloud, rows: Tensor, data: Data) -> Tensor:
    """The mean Hessian of −log joint over some of the rows (draw, d), written out: (d, d), float64."""
    some = torch.linspace(0, len(rows) - 1, min(len(rows), _num_curved(rows.shape[1]))).round().long()
    energy = cloud.posterior.energy.shifted(cloud.params(rows[some]))
    operator = Hessian(energy, cloud.shift(torch.zeros_like(rows[0])), data)
    matrix = as_matrix(operator, operator.params).to(rows)
    return 0.5 * (matrix + matrix.T)


def _hessian(cloud: Cloud, retained: Data) -> Hessian:
    """H as an operator: over as many draws as its dimensions allow."""
    energy = cloud.mean_energy(_num_curved(cloud.matrix.shape[1]))
    return Hessian(energy, cloud.shift(torch.zeros_like(cloud.matrix[0])), retained)


def _num_curved(dim: int) -> int:
    fewest, most = _CURVATURE_DRAWS
    return max(fewest, min(most, _CURVATURE_NUMBERS // dim))


def _iterative(cloud: Cloud, retained: Data, forces: Tensor) -> Steps:
    """Conjugate gradients, preconditioned by the draws' own variances."""
    solver = ConjugateGradient(rtol=_RTOL, max_steps=100, preconditioner=cloud.shift(_variances(cloud)))
    solutions = solver.solve_many(_hessian(cloud, retained), cloud.params(forces, (len(forces),)))
    value = torch.stack([cloud.vector(solution.value) for solution in solutions])
    results = {solution.result for solution in solutions}
    return Steps(
        value=value,
        solver=f"conjugate gradients: {', '.join(sorted(results))}",
        num_products=sum(solution.num_steps for solution in solutions),
        residual=max(solution.residual for solution in solutions),
        usable=bool(value.isfinite().all()) and bool(value.any()),
    )


def _variances(cloud: Cloud) -> Tensor:
    """Of each coordinate over the draws, kept away from 0; 1 where there are too few draws to tell."""
    if len(cloud.matrix) < _CURVATURE_DRAWS[0]:
        return torch.ones_like(cloud.matrix[0])
    variances = cloud.matrix.var(0)
    return variances.clamp(min=float(variances.mean()) * 1e-6 + torch.finfo(variances.dtype).tiny)


def _residual(products: Tensor, forces: Tensor) -> float:
    lengths = torch.linalg.vector_norm(forces, dim=1)
    gaps = torch.linalg.vector_norm(products - forces, dim=1)
    return float((gaps / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)).max())
