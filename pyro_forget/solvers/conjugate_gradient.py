"""Conjugate gradients, for one right-hand side or many at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from pyro_forget.curvature.determinism import resolution
from pyro_forget.curvature.operator import FlatOperator, FunctionOperator, LinearOperator, from_rows, to_rows
from pyro_forget.params import Params, map_params
from pyro_forget.solvers.result import Result, Solution


@dataclass(frozen=True)
class ConjugateGradient:
    """Preconditioned conjugate gradients with vectors and dot products in float64, whatever the operator's type.

    It differs from the textbook in three ways. It stops at a direction of negative curvature and returns the iterate
    so far (zero at the first step: the right-hand side is not a step). A step whose curvature is below the machine
    precision of the largest one met is called singular. Convergence is judged by the true residual, at one product
    more than `num_steps`: where the recursion's own residual was too hopeful, it starts again from the true one for
    as long as that halves.

    Attributes:
        rtol: converged when ‖A x − b‖ ≤ rtol ‖b‖.
        max_steps: for each right-hand side; None for ten times the size, as SciPy does.
        preconditioner: an approximate inverse of A, symmetric and positive: a function, or the diagonal to multiply
            by, such as a guide's own variances.

    Example:
        >>> from pyro_forget.curvature import MatrixOperator
        >>> rhs = {"loc": torch.tensor([3.0, 2.0])}
        >>> hessian = MatrixOperator(torch.tensor([[2.0, 0.0], [0.0, -1.0]]), rhs)
        >>> str(ConjugateGradient().solve(hessian, rhs).result)
        'negative_curvature'

    References:
        Hestenes and Stiefel 1952; Steihaug 1983, for the stop at negative curvature; the norm of the directions in
        the preconditioner's metric by recursion: Conn, Gould and Toint 2000, section 7.5.1.
    """

    rtol: float = 1e-6
    max_steps: int | None = None
    preconditioner: Callable[[Params], Params] | Params | None = None

    def __post_init__(self) -> None:
        if not self.rtol >= 0:
            raise ValueError(f"`rtol` is {self.rtol}: pass a number that is not negative, such as 1e-6.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"`max_steps` is {self.max_steps}: pass a positive number, or None.")

    def solve(self, operator: LinearOperator, rhs: Params) -> Solution:
        """Solve A x = rhs."""
        return self.solve_many(operator, map_params(lambda value: value[None], rhs))[0]

    def solve_many(self, operator: LinearOperator, rhs: Params) -> tuple[Solution, ...]:
        """One solution for each row of `rhs`, whose tensors have one more leading dimension.

        The right-hand sides advance together and each stops on its own, so that an operator with a fast `matmat`
        multiplies all of them in one call.
        """
        like = {name: value[0].detach() for name, value in rhs.items()}
        target = to_rows(rhs, like).detach().double()
        length = torch.linalg.vector_norm(target, dim=1)
        system = _System(
            FlatOperator(operator, like).matmat,
            _flat_preconditioner(self.preconditioner, like),
            self.rtol,
            self.max_steps or 10 * target.shape[1],
            resolution(like),
        )
        # Unit right-hand sides: tolerances and underflow do not depend on the units of b.
        state = _solve_units(system, target / length.clamp(min=torch.finfo(length.dtype).tiny)[:, None])
        values = from_rows(state.value * torch.nan_to_num(length)[:, None], like)
        return tuple(
            Solution({name: value[row] for name, value in values.items()}, *outcome)
            for row, outcome in enumerate(
                zip(state.results, state.num_steps.tolist(), state.residual_norm().tolist(), strict=True)
            )
        )


class _System(NamedTuple):
    product: Callable[[Tensor], Tensor]
    precondition: Callable[[Tensor], Tensor]
    rtol: float
    max_steps: int
    eps: float


class _State(NamedTuple):
    """All right-hand sides; tensors and the list are filled in place."""

    value: Tensor
    residual: Tensor
    num_steps: Tensor
    results: list[Result]

    @classmethod
    def at_zero(cls, residual: Tensor) -> Self:
        num_rows = len(residual)
        num_steps = torch.zeros(num_rows, dtype=torch.int64, device=residual.device)
        return cls(torch.zeros_like(residual), residual.clone(), num_steps, [Result.MAX_STEPS] * num_rows)

    def residual_norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.residual, dim=1)

    def record(self, rows: Tensor, result: Result) -> None:
        for row in rows.tolist():
            self.results[row] = result


class _Front(NamedTuple):
    """The right-hand sides that still advance; every tensor has one row for each."""

    rows: Tensor
    residual: Tensor
    direction: Tensor
    force: Tensor  # ⟨r, M⁻¹r⟩
    metric: Tensor  # ⟨p, M p⟩
    peak: Tensor  # the largest |⟨p, A p⟩| / ⟨p, M p⟩ met
    limit: Tensor  # on ‖r‖
    budget: Tensor

    def keep(self, mask: Tensor) -> Self:
        return self if bool(mask.all()) else type(self)(*(value[mask] for value in self))


def _solve_units(system: _System, target: Tensor) -> _State:
    """Descents from the true residual until it is small, or no longer halves."""
    state = _State.at_zero(target)
    length = state.residual_norm()
    state.record((length <= system.rtol).nonzero()[:, 0], Result.CONVERGED)
    state.record((~torch.isfinite(length)).nonzero()[:, 0], Result.NON_FINITE)
    rows = (torch.isfinite(length) & (length > system.rtol)).nonzero()[:, 0]
    while len(rows):
        before = state.residual_norm()[rows]
        descent = _descend(system, state.residual[rows], system.max_steps - state.num_steps[rows])
        state.value[rows] += descent.value
        state.num_steps[rows] += descent.num_steps
        moved = rows[(descent.num_steps > 0).nonzero()[:, 0]]
        if len(moved):
            state.residual[moved] = target[moved] - system.product(state.value[moved])
        after = state.residual_norm()[rows]
        again = [
            _judge(state, row, result, falls, system)
            for row, result, falls in zip(rows.tolist(), descent.results, (after < 0.5 * before).tolist(), strict=True)
        ]
        rows = rows[torch.tensor(again, device=rows.device)]
    return state


def _judge(state: _State, row: int, result: Result, falls: bool, system: _System) -> bool:
    """Record how the descent of one right-hand side ended; whether another one may help."""
    residual = float(torch.linalg.vector_norm(state.residual[row]))
    hopeful = result is Result.CONVERGED and residual > system.rtol
    again = hopeful and falls and int(state.num_steps[row]) < system.max_steps
    if hopeful and not again:
        result = Result.STAGNATED if not falls else Result.MAX_STEPS
    state.results[row] = result if residual < float("inf") else Result.NON_FINITE
    return again


def _descend(system: _System, residual: Tensor, budget: Tensor) -> _State:
    """Conjugate gradients for A x = residual from x = 0, by the recursion's own residual."""
    state = _State.at_zero(residual)
    front = _start(system, residual, budget)
    while len(front.rows):
        image = system.product(front.direction)
        curvature = (front.direction * image).sum(dim=1)
        ratio = curvature / front.metric
        front = front._replace(peak=torch.maximum(front.peak, ratio.abs()))
        positive = ratio > system.eps * front.peak
        if not bool(positive.all()):
            _record_curvature(state, front.keep(~positive), ratio[~positive], system.eps)
            front, image, curvature = front.keep(positive), image[positive], curvature[positive]
        if len(front.rows):
            front = _advance(system, state, front, front.force / curvature, image)
    return state


def _start(system: _System, residual: Tensor, budget: Tensor) -> _Front:
    direction = system.precondition(residual)
    force = (residual * direction).sum(dim=1)
    _require_positive(force)
    rows = torch.arange(len(residual), device=residual.device)
    # Below float64's precision of where it starts, the recursion's residual means nothing.
    limit = torch.finfo(residual.dtype).eps * torch.linalg.vector_norm(residual, dim=1)
    return _Front(
        rows, residual, direction, force, force, torch.zeros_like(force), limit.clamp(min=system.rtol), budget
    )


def _advance(system: _System, state: _State, front: _Front, length: Tensor, image: Tensor) -> _Front:
    """One step of `length` along each direction, and the next directions of those that go on."""
    state.value.index_add_(0, front.rows, length[:, None] * front.direction)
    state.num_steps[front.rows] += 1
    front = front._replace(residual=front.residual - length[:, None] * image)
    small = torch.linalg.vector_norm(front.residual, dim=1) <= front.limit
    state.record(front.rows[small], Result.CONVERGED)
    front = front.keep(~small & (state.num_steps[front.rows] < front.budget))
    return _turn(system, front) if len(front.rows) else front


def _turn(system: _System, front: _Front) -> _Front:
    steepest = system.precondition(front.residual)
    force = (front.residual * steepest).sum(dim=1)
    _require_positive(force)
    ratio = force / front.force
    return front._replace(
        direction=steepest + ratio[:, None] * front.direction,
        force=force,
        metric=force + ratio.square() * front.metric,
    )


def _record_curvature(state: _State, front: _Front, ratio: Tensor, eps: float) -> None:
    floor = eps * front.peak
    state.record(front.rows[~torch.isfinite(ratio)], Result.NON_FINITE)
    state.record(front.rows[ratio < -floor], Result.NEGATIVE_CURVATURE)
    state.record(front.rows[ratio.abs() <= floor], Result.SINGULAR)


def _require_positive(force: Tensor) -> None:
    if bool((force <= 0).any()):
        raise ValueError(
            f"`preconditioner` is not positive definite: ⟨r, M⁻¹r⟩ is {float(force.min()):.1e}. "
            "Pass an approximate inverse of the operator, such as variances, all positive."
        )


def _flat_preconditioner(
    preconditioner: Callable[[Params], Params] | Params | None, like: Params
) -> Callable[[Tensor], Tensor]:
    if preconditioner is None:
        return lambda rows: rows
    if callable(preconditioner):
        return FlatOperator(FunctionOperator(preconditioner), like).matmat
    diagonal = to_rows(map_params(lambda value: value[None], preconditioner), like).detach().double()
    if not bool((diagonal > 0).all()):
        raise ValueError(
            f"`preconditioner` has an entry {float(diagonal.min()):.1e}: "
            "pass a diagonal of positive numbers that approximates the inverse, such as variances."
        )
    return lambda rows: rows * diagonal
