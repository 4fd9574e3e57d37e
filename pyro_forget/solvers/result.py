"""What a solver returns: failure is a value, raised once at the top."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, Self

from pyro_forget.curvature.operator import LinearOperator
from pyro_forget.params import Params


class Result(StrEnum):
    """How a solve ended."""

    CONVERGED = "converged"
    MAX_STEPS = "max_steps"
    NEGATIVE_CURVATURE = "negative_curvature"
    DIVERGED = "diverged"
    STAGNATED = "stagnated"
    SINGULAR = "singular"
    NON_FINITE = "non_finite"

    @property
    def message(self) -> str:
        """What happened and what to do, in plain words."""
        return _MESSAGES[self]


_MESSAGES = {
    Result.CONVERGED: "The residual fell below its tolerance.",
    Result.MAX_STEPS: (
        "The steps ran out before the residual fell below its tolerance. "
        "Allow more steps, loosen `rtol`, add damping, or precondition."
    ),
    Result.NEGATIVE_CURVATURE: (
        "The operator is not positive definite: it has a direction of negative curvature, so no minimum to step to. "
        "Raise the damping, or use a curvature that is positive by construction, such as Gauss-Newton."
    ),
    Result.DIVERGED: (
        "The recursion grows instead of settling: its scaling is too large for this operator, or the operator has "
        "negative curvature. Lower the scaling, or let the solver choose it with `scaling='power'`."
    ),
    Result.STAGNATED: (
        "The residual stopped falling before it reached its tolerance: the products carry no more digits. "
        "Use float64, add damping, precondition, or loosen `rtol`."
    ),
    Result.SINGULAR: (
        "The operator is singular to working precision, so the system has no solution or no single one. "
        "Add damping, or a prior that reaches every parameter."
    ),
    Result.NON_FINITE: (
        "The right-hand side or a product with the operator has NaN or infinite entries. "
        "Check the parameters, the data and the energy's gradient for overflow."
    ),
}


@dataclass(frozen=True)
class Solution:
    """What became of A x = b.

    Attributes:
        value: x, with the names, shapes and types of b; the last finite iterate when the solve did not converge.
        result: how the solve ended.
        num_steps: iterations spent, each one product with A; 0 for a zero right-hand side.
        residual: ‖A x − b‖ / ‖b‖; 0 for a zero right-hand side.
    """

    value: Params
    result: Result
    num_steps: int
    residual: float

    def require(self) -> Self:
        """This solution if it converged.

        Raises:
            SolverError: otherwise, with this solution attached.
        """
        if self.result is not Result.CONVERGED:
            raise SolverError(self)
        return self


class SolverError(ValueError):
    """A linear solve failed and the caller asked for success.

    Attributes:
        solution: what the solver had when it gave up.
    """

    def __init__(self, solution: Solution) -> None:
        super().__init__(
            f"{solution.result.message} (result {solution.result.value!r} after {solution.num_steps} steps, "
            f"relative residual {solution.residual:.1e})"
        )
        self.solution = solution


class Solver(Protocol):
    """A method for A x = b with a symmetric A."""

    def solve(self, operator: LinearOperator, rhs: Params) -> Solution:
        """Solve A x = rhs, or say how far the method came."""
        ...
