"""Stochastic gradient Langevin dynamics."""

from dataclasses import dataclass
from math import sqrt

from torch import Tensor

from pyro_forget.inference.stochastic.control import Control
from pyro_forget.inference.stochastic.layout import Layout
from pyro_forget.inference.stochastic.rule import POSITION, Move, Normals, State, check_batch_size, check_norm
from pyro_forget.inference.stochastic.schedule import Schedule, as_schedule


@dataclass(frozen=True)
class SGLD:
    """θ ← θ − ε ∇U(θ) + √(2ε) ξ.

    For a quadratic U of curvature h and full batches the stationary variance is 1/(h(1 − εh/2)); mini-batches add
    half of ε times the gradient's variance. Where half steps are written, as in eq. 4 of the reference, ε is half of
    the number there.

    Attributes:
        step_size: ε, or a schedule; stable below 2/(largest curvature).
        batch_size: rows a step; None for all.
        control: a control variate.
        max_gradient_norm: length to which longer gradients are cut, which changes the law; None for none.

    References:
        Welling and Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics, eq. 4.
    """

    step_size: float | Schedule
    batch_size: int | None = 128
    control: Control | None = None
    max_gradient_norm: float | None = None

    preconditioned = False
    needs_diagonal = False
    hyperprior = None

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)
        check_norm(self.max_gradient_norm)
        _ = self.schedule

    @property
    def schedule(self) -> Schedule:
        """Step sizes."""
        return as_schedule(self.step_size)

    def start(self, position: Tensor, noise: Normals, layout: Layout) -> State:
        """Nothing but the position."""
        return {}

    def move(self, state: State, move: Move) -> None:
        """One update, in place."""
        position = state[POSITION]
        if not move.temperature:
            position.add_(move.gradient, alpha=-move.size)
            return
        deviation = sqrt(2 * move.size * move.temperature)
        for noise, place, slope in move.noise.beside(deviation, position, move.gradient):
            place.add_(slope, alpha=-move.size).add_(noise)

    def kinetic_temperature(self, state: State, step_size: float, layout: Layout) -> Tensor | None:
        """There are no momenta."""
        return None
