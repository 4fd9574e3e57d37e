"""Endless random mini-batches whose place can be written down and found again."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pyro_forget.data import Batch, Data
from pyro_forget.effects.noise import seeded


class BatchStream:
    """Epochs of random batches without replacement, from a generator of its own.

    Args:
        data: the rows.
        size: rows of a batch; None for all of them, in their own order.
        seed: of the order.

    Raises:
        ValueError: there are fewer rows than a batch holds.
    """

    def __init__(self, data: Data, size: int | None, seed: int) -> None:
        if size is not None and not 1 <= size <= data.num_data:
            raise ValueError(
                f"`batch_size` is {size}, the data have {data.num_data} rows: give at most {data.num_data}, or None "
                "for all rows at every step."
            )
        self._data = data.with_batch_size(data.num_data) if size is None else data
        self._size, self._generator = size, seeded(torch.device("cpu"), seed)
        self._place = 0
        self._epoch = self._generator.get_state()
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Batch:
        if self._size is None:
            return next(self._data.batches())
        if self._batches is None:
            self._batches = self._data.minibatches(self._size, self._generator)
        if self._place == self._data.num_data // self._size:
            self._epoch, self._place = self._generator.get_state(), 0
        self._place += 1
        return next(self._batches)

    def save(self) -> tuple[Tensor, int]:
        """(the generator's state at the start of this epoch, batches of it that are used up)."""
        return self._epoch.clone(), self._place

    def load(self, epoch: Tensor, place: int) -> None:
        """Go where a saved stream stood."""
        self._generator.set_state(epoch.clone())
        self._epoch, self._place, self._batches = epoch.clone(), 0, None
        for _ in range(place):
            next(self)
