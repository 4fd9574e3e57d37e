"""What one update of a stochastic-gradient sampler is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyro_forget.inference.stochastic.control import Control
from pyro_forget.inference.stochastic.layout import Layout
from pyro_forget.inference.stochastic.schedule import Schedule

# Tensors by name: flat arrays as `Layout` says, "position" among them, and what else the rule keeps for each chain.
State = dict[str, Tensor]

POSITION, MOMENTUM, PRECISION, CLIPPED = "position", "momentum", "prior_precision", "clipped"


_PART = 1 << 17


class Normals:
    """Standard normal numbers from a generator of their own, in a buffer that is used again and again.

    Filling memory that exists costs less than half of what `torch.randn_like` does for the weights of a network.
    """

    def __init__(self, like: Tensor, generator: torch.Generator) -> None:
        self.generator = generator
        self._buffer = torch.empty_like(like)

    def draw(self, deviation: float = 1.0) -> Tensor:
        """A flat array of this standard deviation; gone at the next call."""
        return self._buffer.normal_(0.0, deviation, generator=self.generator)

    def beside(self, deviation: float, *flats: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """(numbers of this standard deviation, the same part of every array), part after part.

        On the CPU a part stays in the cache from the first operation on it to the last.
        """
        size = _PART if self._buffer.device.type == "cpu" else max(len(self._buffer), 1)
        for parts in zip(*(flat.split(size) for flat in flats), strict=True):
            noise = self._buffer[: len(parts[0])]
            yield noise.normal_(0.0, deviation, generator=self.generator), *parts

    def signs(self) -> Tensor:
        """Fair signs, ±1, as a flat array; gone at the next call."""
        return self._buffer.bernoulli_(generator=self.generator).mul_(2).sub_(1)


@dataclass(frozen=True)
class Move:
    """One step, as a rule sees it.

    Attributes:
        number: steps taken before.
        size: step size.
        temperature: of the noise; 0 while a schedule explores.
        warming: whether this is warm-up, when a rule may adapt.
        gradient: stochastic gradient of U = −log joint at the position, flat; the rule may overwrite it.
        noise: normal numbers.
        layout: of flat arrays.
        diagonal: flat, an unbiased estimate of the diagonal of ∇²U; None unless the rule asks for it.
    """

    number: int
    size: float
    temperature: float
    warming: bool
    gradient: Tensor
    noise: Normals
    layout: Layout
    diagonal: Callable[[], Tensor] | None = None


class Rule(Protocol):
    """A sampler's settings and its update; all of its state is in the tensors it is given."""

    @property
    def schedule(self) -> Schedule:
        """Step sizes."""
        ...

    @property
    def batch_size(self) -> int | None:
        """Rows a step; None for all."""
        ...

    @property
    def control(self) -> Control | None:
        """How gradient noise is cut, if at all."""
        ...

    @property
    def max_gradient_norm(self) -> float | None:
        """Euclidean length to which a chain's longer gradients are cut; None for none.

        Where it bites, the chain follows another law than the posterior, one with heavier tails: the share of such
        steps is among the statistics. It is of ∇U for all N rows, noise of the batch included, in unconstrained space.
        """
        ...

    @property
    def preconditioned(self) -> bool:
        """Whether gradients are rescaled, so that the largest curvature says nothing of the step size."""
        ...

    @property
    def needs_diagonal(self) -> bool:
        """Whether `move.diagonal` is wanted."""
        ...

    @property
    def hyperprior(self) -> tuple[float, float] | None:
        """(shape, rate) of a Gamma prior on the precision of each site's Normal prior; None for the model's own."""
        ...

    def start(self, position: Tensor, noise: Normals, layout: Layout) -> State:
        """The rule's own tensors at the start of the chains."""
        ...

    def move(self, state: State, move: Move) -> None:
        """One update, in place."""
        ...

    def kinetic_temperature(self, state: State, step_size: float, layout: Layout) -> Tensor | None:
        """Mean over the entries of v M⁻¹ v, shape (chain,): 1 where the momenta have the right spread."""
        ...


def check_batch_size(size: int | None) -> None:
    """Raise for a size that no batch has."""
    if size is not None and size < 1:
        raise ValueError(f"`batch_size` must be at least 1, or None for all rows at every step, got {size}.")


def check_norm(norm: float | None) -> None:
    """Raise for a length that no gradient can be cut to."""
    if norm is not None and not norm > 0:
        raise ValueError(f"`max_gradient_norm` must be positive, or None for gradients of any length, got {norm}.")


def check_share(value: float, name: str) -> None:
    """Raise for a number outside (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"`{name}` must be above 0 and at most 1, got {value}.")
