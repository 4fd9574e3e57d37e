"""One damped Newton step, its damping chosen from one Krylov space and its acceptance under held-out noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyro_forget.curvature import Congruence, LinearOperator
from pyro_forget.params import Params, axpy
from pyro_forget.solvers import Lanczos
from pyro_forget.solvers.lanczos import KrylovSpace
from pyro_forget.tilt import TiltedEnergy

ACCEPT = 0.25
GOOD = 0.9
# The two small ones are for ridges, flat beside the guide's own scales: 0 overshoots there and 0.5 hardly moves.
DAMPINGS = (0.0, 0.02, 0.1, 0.5, 2.0, 8.0, 32.0)
Root = tuple[Callable[[Params], Params], Callable[[Params], Params]]


@dataclass(frozen=True)
class Step:
    """A step that was kept.

    Attributes:
        params: where it leads.
        damping: λ, in units of the metric that the curvature was seen in.
        predicted: fall of the quadratic, nats.
        realised, held_out: falls of the tilted energy under the step's own and under the held-out noise, nats.
        residual: of the solve.
        gradient: of the tilted energy there, under the step's own noise.
    """

    params: Params
    damping: float
    predicted: float
    realised: float
    held_out: float
    residual: float
    gradient: Params


def krylov(operator: LinearOperator, rhs: Params, root: Root, num_products: int) -> KrylovSpace:
    """The Krylov space of LᵀCL and Lᵀ·rhs: the curvature in the metric of L."""
    return Lanczos(num_products).expand(Congruence(operator, root), root[1](rhs))


def best_step(
    space: KrylovSpace,
    move: Callable[[Params], Params],
    pair: tuple[TiltedEnergy, TiltedEnergy],
    values: tuple[float, float],
    dampings: Sequence[float] = DAMPINGS,
) -> Step | None:
    """The damping whose fall under held-out noise is largest, among those that keep what they promise.

    A step is acceptable when realised/predicted ≥ ¼ under the step's noise and under the held-out noise; the former
    alone is worthless on networks, whose steps can fit their own noise.

    Args:
        space: of the force at the present params.
        move: a solution in the space to the params it leads to.
        pair: tilted energies under the step's noise and the held-out noise.
        values: of both at the present params.
        dampings: λ ascending, so predicted falls descend.
    """
    best: Step | None = None
    for damping in dampings:
        if space.smallest_ritz + damping <= 0:
            continue
        solution = space.solve(damping)
        predicted = space.predicted_fall(damping)
        if not predicted > 0 or (best is not None and best.held_out >= GOOD * predicted):
            # Falls beyond the prediction are rare and small: the more damped steps have little to win any more.
            continue
        step = measured(move(solution.value), pair, values, ACCEPT * predicted, damping, predicted, solution.residual)
        if step is not None and (best is None or step.held_out > best.held_out):
            best = step
    return best


def moved(params: Params, step: Params) -> Params:
    """Params + step for the entries that the step has."""
    return params | axpy(1.0, step, {name: params[name] for name in step})


def measured(
    params: Params,
    pair: tuple[TiltedEnergy, TiltedEnergy],
    values: tuple[float, float],
    least: float,
    damping: float = 0.0,
    predicted: float = 0.0,
    residual: float = 0.0,
) -> Step | None:
    """The step to `params`, unless the fall that it brings is `least` nats or less under either noise.

    Args:
        params: where it leads.
        pair: tilted energies under the step's noise and the held-out noise.
        values: of both where it starts.
        least: nats.
        damping: of the step, for the record, as the rest.
        predicted: likewise.
        residual: likewise.
    """
    # The held-out noise first: there most bad steps show, and cost one pass instead of two.
    held_out = values[1] - pair[1].value(params)
    if not held_out > least:
        return None
    # Nearly all that come here are kept, and the next step starts from the gradient where they lead.
    value, gradient = pair[0].value_and_gradient(params)
    realised = values[0] - value
    return Step(params, damping, predicted, realised, held_out, residual, gradient) if realised > least else None
