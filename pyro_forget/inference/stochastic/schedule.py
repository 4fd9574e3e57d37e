"""Step sizes of stochastic-gradient samplers as a function of the step's number."""

import math
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """Step sizes; steps are counted from 0, warm-up included."""

    def step_size(self, step: int) -> float:
        """Of this step."""
        ...

    def exploring(self, step: int) -> bool:
        """Whether this step descends without noise, so that no draw may be taken after it."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same size for ever: the chain keeps moving at the same speed, with a bias that shrinks with the size.

    Attributes:
        size: of every step.
    """

    size: float

    def __post_init__(self) -> None:
        _positive(self.size, "size")

    def step_size(self, step: int) -> float:
        """Of this step."""
        return self.size

    def exploring(self, step: int) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class RobbinsMonro:
    """ε_t = initial·(1 + t/offset)^(−decay): the bias vanishes with time, and so does the speed.

    Attributes:
        initial: size of the first step.
        decay: the exponent; Σ ε_t = ∞ and Σ ε_t² < ∞ for ½ < decay ≤ 1.
        offset: steps until the decay sets in.

    References:
        Welling and Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics, eq. 2.
    """

    initial: float
    decay: float = 0.55
    offset: float = 1.0

    def __post_init__(self) -> None:
        _positive(self.initial, "initial")
        _positive(self.offset, "offset")
        if not 0 < self.decay <= 1:
            raise ValueError(
                f"`decay` must be above 0 and at most 1, got {self.decay}: beyond 1 the chain stops short."
            )

    def step_size(self, step: int) -> float:
        """Of this step."""
        return self.initial * (1 + step / self.offset) ** -self.decay

    def exploring(self, step: int) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class Cyclic:
    """ε_t = initial/2·(1 + cos π(t mod period)/period): large steps to find modes, small ones to sample each.

    The first part of every cycle descends without noise, and no draw is taken there.

    Attributes:
        initial: size at the start of a cycle.
        period: steps of a cycle.
        exploration: share of the cycle that explores, in [0, 1).

    References:
        Zhang, Li, Zhang, Chen and Wilson (2020), Cyclical stochastic gradient MCMC, arXiv 1902.03932, eq. 1.
    """

    initial: float
    period: int
    exploration: float = 0.8

    def __post_init__(self) -> None:
        _positive(self.initial, "initial")
        if self.period < 2:
            raise ValueError(f"`period` must be at least 2 steps, got {self.period}.")
        if not 0 <= self.exploration <= 1 - 1 / self.period:
            raise ValueError(
                f"`exploration` must be at least 0 and leave one of {self.period} steps, got {self.exploration}."
            )

    def step_size(self, step: int) -> float:
        """Of this step."""
        return 0.5 * self.initial * (1 + math.cos(math.pi * (step % self.period) / self.period))

    def exploring(self, step: int) -> bool:
        """Whether the step lies in the first part of its cycle."""
        return step % self.period < self.exploration * self.period


def as_schedule(step_size: "float | Schedule") -> Schedule:
    """A number is a constant schedule."""
    return Constant(float(step_size)) if isinstance(step_size, int | float) else step_size


def _positive(value: float, name: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be positive and finite, got {value}.")
