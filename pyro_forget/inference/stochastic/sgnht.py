"""The stochastic gradient Nosé-Hoover thermostat."""

from dataclasses import dataclass
from math import sqrt

from torch import Tensor

from pyro_forget.inference.stochastic.control import Control
from pyro_forget.inference.stochastic.layout import Layout
from pyro_forget.inference.stochastic.rule import (
    MOMENTUM,
    POSITION,
    Move,
    Normals,
    State,
    check_batch_size,
    check_norm,
    check_share,
)
from pyro_forget.inference.stochastic.schedule import Schedule, as_schedule

_THERMOSTAT = "thermostat"


@dataclass(frozen=True)
class SGNHT:
    """v ← (1 − ξ) v − η ∇U(θ) + √(2aη) ε, then θ ← θ + v and ξ ← ξ + v·v/d − η: friction that finds itself.

    Where gradients bring noise of their own, the thermostat ξ rises until the momenta have the right temperature. In
    the paper's terms v = ph, η = h² and a = Ah.

    Attributes:
        step_size: η, or a schedule.
        friction: a, in (0, 1]; where ξ starts.
        batch_size: rows a step; None for all.
        control: a control variate.
        max_gradient_norm: length to which longer gradients are cut, which changes the law; None for none.

    References:
        Ding, Fang, Babbush, Chen, Skeel and Neven (2014), Bayesian sampling using stochastic gradient thermostats,
        algorithm 2.
    """

    step_size: float | Schedule
    friction: float = 0.1
    batch_size: int | None = 128
    control: Control | None = None
    max_gradient_norm: float | None = None

    preconditioned = False
    needs_diagonal = False
    hyperprior = None

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)
        check_norm(self.max_gradient_norm)
        check_share(self.friction, "friction")
        _ = self.schedule

    @property
    def schedule(self) -> Schedule:
        """Step sizes."""
        return as_schedule(self.step_size)

    def start(self, position: Tensor, noise: Normals, layout: Layout) -> State:
        """Momenta of the spread that they will have, and a thermostat a chain."""
        momentum = noise.draw() * sqrt(self.schedule.step_size(0))
        return {MOMENTUM: momentum, _THERMOSTAT: position.new_full((layout.num_chains,), self.friction)}

    def move(self, state: State, move: Move) -> None:
        """One update, in place."""
        position, momentum, thermostat = state[POSITION], state[MOMENTUM], state[_THERMOSTAT]
        kept = 1 - thermostat
        for view in move.layout.views(momentum).values():
            view.mul_(kept.reshape(-1, *(1,) * (view.ndim - 1)))
        momentum.add_(move.gradient, alpha=-move.size)
        if move.temperature:
            momentum.add_(move.noise.draw(), alpha=sqrt(2 * self.friction * move.size * move.temperature))
        position.add_(momentum)
        mean_square = move.layout.dot(momentum, momentum) / move.layout.size
        thermostat.add_(mean_square.to(thermostat) - move.size * move.temperature)

    def kinetic_temperature(self, state: State, step_size: float, layout: Layout) -> Tensor | None:
        """Mean of v²/η, shape (chain,)."""
        return layout.dot(state[MOMENTUM], state[MOMENTUM]) / (layout.size * step_size)
