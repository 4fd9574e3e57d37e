"""Preconditioned stochastic gradient Langevin dynamics."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_forget.inference.stochastic.control import Control
from pyro_forget.inference.stochastic.layout import Layout
from pyro_forget.inference.stochastic.rule import POSITION, Move, Normals, State, check_batch_size, check_norm
from pyro_forget.inference.stochastic.schedule import Schedule, as_schedule

_SQUARE = "mean_square"


@dataclass(frozen=True)
class PSGLD:
    """θ ← θ − ε [G ∇U(θ) − Γ(θ)] + √(2εG) ξ, with G = 1/(√V + floor) and V ← decay·V + (1 − decay)·∇U².

    Γᵢ = ∂Gᵢᵢ/∂θᵢ = −(1 − decay)·Gᵢᵢ²·∇Uᵢ·(∇²U)ᵢᵢ/√Vᵢ, V's past held fixed. The diagonal of ∇²U is estimated without
    bias by one Hessian product with random signs; Γ is linear in it, so the drift is unbiased too. Without the
    correction the stationary law is wrong by O(1 − decay), which the published sampler accepts. V starts at the first
    gradient's square or at 1, whichever is more, not at zero: the first steps would be ten times too long, and without
    bound from a mode.

    Attributes:
        step_size: ε, or a schedule; in units of a gradient's root mean square over a squared gradient.
        decay: of the running mean of squared gradients.
        floor: added to √V, in nats per unit.
        correction: whether to add Γ; a step then costs about three gradients.
        batch_size: rows a step; None for all.
        control: a control variate.
        max_gradient_norm: length to which longer gradients are cut, which changes the law; None for none.

    References:
        Li, Chen, Carlson and Carin (2016), Preconditioned stochastic gradient Langevin dynamics for deep neural
        networks, algorithm 1 and eq. 9 (the step size there is 2ε).
    """

    step_size: float | Schedule
    decay: float = 0.99
    floor: float = 1e-5
    correction: bool = False
    batch_size: int | None = 128
    control: Control | None = None
    max_gradient_norm: float | None = None

    preconditioned = True
    hyperprior = None

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)
        check_norm(self.max_gradient_norm)
        _ = self.schedule
        if not 0 <= self.decay < 1 or not self.floor > 0:
            raise ValueError(
                f"`decay` must be at least 0 and below 1 and `floor` positive, got {self.decay} and {self.floor}."
            )

    @property
    def schedule(self) -> Schedule:
        """Step sizes."""
        return as_schedule(self.step_size)

    @property
    def needs_diagonal(self) -> bool:
        """For the correction only."""
        return self.correction

    def start(self, position: Tensor, noise: Normals, layout: Layout) -> State:
        """The running mean of squared gradients, which the first step sets."""
        return {_SQUARE: torch.zeros_like(position)}

    def move(self, state: State, move: Move) -> None:
        """One update, in place."""
        position, square, gradient = state[POSITION], state[_SQUARE], move.gradient
        square.mul_(self.decay if move.number else 0.0)
        square.addcmul_(gradient, gradient, value=1 - self.decay if move.number else 1.0)
        if not move.number:
            square.clamp_(min=1.0)
        root = square.sqrt()
        scale = (root + self.floor).reciprocal_()
        # What V starts from is given, not a function of the position.
        if self.correction and move.diagonal is not None and move.number:
            slope = scale.square() * gradient * move.diagonal() / root.clamp_min_(torch.finfo(root.dtype).tiny)
            position.add_(slope, alpha=-move.size * (1 - self.decay))
        position.addcmul_(gradient, scale, value=-move.size)
        if move.temperature:
            deviation = scale.mul_(2 * move.size * move.temperature).sqrt_()
            position.addcmul_(move.noise.draw(), deviation)

    def kinetic_temperature(self, state: State, step_size: float, layout: Layout) -> Tensor | None:
        """There are no momenta."""
        return None
