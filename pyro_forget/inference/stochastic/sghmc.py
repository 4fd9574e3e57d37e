"""Stochastic gradient Hamiltonian Monte Carlo."""

from dataclasses import dataclass
from math import sqrt

import torch
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


@dataclass(frozen=True)
class SGHMC:
    """v ← (1 − α) v − η ∇U(θ) + √(2(α − β)η) ξ, then θ ← θ + v: SGLD with momentum.

    Attributes:
        step_size: η, or a schedule; the dynamics move by √η a step.
        friction: α, in (0, 1].
        noise_estimate: β, what the gradient noise already contributes: η/2 times the variance of a batch's gradient.
        batch_size: rows a step; None for all.
        control: a control variate.
        max_gradient_norm: length to which longer gradients are cut, which changes the law; None for none.

    References:
        Chen, Fox and Guestrin (2014), Stochastic gradient Hamiltonian Monte Carlo, eq. 15.
    """

    step_size: float | Schedule
    friction: float = 0.1
    noise_estimate: float = 0.0
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
        if not 0 <= self.noise_estimate < self.friction:
            raise ValueError(
                f"`noise_estimate` must be at least 0 and below `friction` ({self.friction}), got "
                f"{self.noise_estimate}: with more gradient noise than friction takes out, shorten the step."
            )

    @property
    def schedule(self) -> Schedule:
        """Step sizes."""
        return as_schedule(self.step_size)

    def start(self, position: Tensor, noise: Normals, layout: Layout) -> State:
        """Momenta of the spread that they will have."""
        return {MOMENTUM: noise.draw() * sqrt(self.schedule.step_size(0))}

    def move(self, state: State, move: Move) -> None:
        """One update, in place."""
        position, momentum, kept = state[POSITION], state[MOMENTUM], 1 - self.friction
        variance = 2 * (self.friction - self.noise_estimate) * move.size * move.temperature
        if not variance:
            position.add_(momentum.mul_(kept).add_(move.gradient, alpha=-move.size))
            return
        for noise, place, speed, slope in move.noise.beside(sqrt(variance), position, momentum, move.gradient):
            place.add_(torch.add(noise, speed, alpha=kept, out=speed).add_(slope, alpha=-move.size))

    def kinetic_temperature(self, state: State, step_size: float, layout: Layout) -> Tensor | None:
        """Mean of v²/η, shape (chain,)."""
        return layout.dot(state[MOMENTUM], state[MOMENTUM]) / (layout.size * step_size)
