"""Chains that run away."""

import torch
from torch import Tensor

from pyro_forget.data import Batch
from pyro_forget.energy.protocol import NonFinite
from pyro_forget.inference.stochastic.potential import Potential
from pyro_forget.inference.stochastic.rule import Rule

_SHORTER = 4.0
_NUM_PRODUCTS = 15


class Diverged(NonFinite):
    """A chain whose energy is not finite.

    Attributes:
        number: the step at which it was seen, from 0.
        step_size: of the step before.
        suggested: a size to try.
    """

    def __init__(self, number: int, step_size: float, suggested: float) -> None:
        super().__init__(
            f"The energy is not finite any more at step {number}: the chain ran away with a step size of "
            f"{step_size:.3g}. Try {suggested:.2g}; if that fails too, start nearer to a mode (`start=`), and check "
            "the data for values outside the likelihood's support."
        )
        self.number, self.step_size, self.suggested = number, step_size, suggested


def suggested_size(rule: Rule, step_size: float, potential: Potential, start: Tensor, batch: Batch) -> float:
    """A quarter of the size that failed, or 1/(largest curvature at the start) if that is less.

    Steps longer than 2/curvature grow without bound; a preconditioner makes the curvature say nothing.
    """
    shorter = step_size / _SHORTER
    if rule.preconditioned:
        return shorter
    curvature = largest_curvature(potential, start, batch)
    return min(shorter, 1 / curvature) if 0 < curvature < float("inf") else shorter


def largest_curvature(potential: Potential, position: Tensor, batch: Batch) -> float:
    """|λ| of the dominant direction of ∇²U at a flat position, by power iteration on one batch."""
    generator = torch.Generator(device=position.device).manual_seed(0)
    vector, found = torch.empty_like(position).normal_(generator=generator), 0.0
    for _ in range(_NUM_PRODUCTS):
        vector = potential.product(position, batch, vector / vector.norm())
        found = float(vector.norm())
        if not 0 < found < float("inf"):
            break
    return found
