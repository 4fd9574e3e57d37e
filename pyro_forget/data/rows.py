"""The data of a posterior: the arguments of a model's call, row by row, with ids that survive splits.

`Data(x, y)` stands for the call `model(x, y)`. A leaf of the call is *per datum* when its length along dim 0 is the
number of data; every other leaf is passed to the model as it is. Rows are looked up when a batch is made, so splits
are index views and copy nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from pyro_forget.data.batch import MADE_UP, Batch
from pyro_forget.data.ids import Ids, as_ids, positions_of
from pyro_forget.data.source import Call, Loaded, Source, as_slice

DEFAULT_BATCH_SIZE = 2048

Value = TypeVar("Value")


class Data:
    """The data of one posterior, re-iterable and never shuffled.

    Example:
        >>> data = Data(torch.arange(6.0), scale=2.0)
        >>> erased, retained = data.split([1, 4])
        >>> [batch.args[0].tolist() for batch in erased.batches()]
        [[1.0, 4.0]]
        >>> retained.ids.tolist()
        [0, 2, 3, 5]
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._start(Call(args, kwargs), None, DEFAULT_BATCH_SIZE)

    def _start(self, source: Source, ids: Ids | None, batch_size: int) -> Self:
        self._source = source
        self._rows = torch.arange(source.num_rows)
        self._all_ids = self._rows if ids is None else _own_ids(ids, source.num_rows)
        self.batch_size = _checked_size(batch_size)
        self.device: torch.device | None = None
        self._whole: Batch | None = None
        return self

    @staticmethod
    def of(
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        ids: Ids | None = None,
        dims: Mapping[int | str, int] | None = None,
        fixed: Iterable[int | str] = (),
        num_data: int | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> "Data":
        """The same with what cannot be told from the call alone.

        Args:
            args: the positional arguments of the model's call.
            kwargs: its keyword arguments.
            ids: the owner's own int64 ids, one a row; row numbers by default.
            dims: the data dim of an argument, by position or name, where it is not 0.
            fixed: arguments that are passed as they are although their length is the number of data.
            num_data: the number of data, where the call does not show it (data that the model closes over).
            batch_size: rows a batch.
        """
        source = Call(args, dict(kwargs or {}), dims, tuple(fixed), num_data)
        return object.__new__(Data)._start(source, ids, batch_size)

    @staticmethod
    def from_dataset(dataset: Any, *, ids: Ids | None = None, batch_size: int = DEFAULT_BATCH_SIZE) -> "Data":
        """A map-style `torch.utils.data.Dataset`, loaded batch by batch.

        An item that is a tuple becomes the model's positional arguments, a mapping its keyword arguments, anything
        else its only argument.
        """
        return object.__new__(Data)._start(Loaded(dataset), ids, batch_size)

    @property
    def ids(self) -> Tensor:
        """Int64, shape (num_data,): who the rows are."""
        return self._all_ids[self._rows]

    @property
    def num_data(self) -> int:
        """The number of rows."""
        return len(self._rows)

    @property
    def num_whole(self) -> int:
        """The number of rows of the data that these were split from."""
        return len(self._all_ids)

    @property
    def indexed(self) -> bool:
        """Whether the call has no per-datum argument, so that the model reads its data with the plate's index."""
        return self._source.indexed

    def __len__(self) -> int:
        return self.num_data

    def __repr__(self) -> str:
        return f"Data({self.num_data} rows, batch_size={self.batch_size})"

    def to(self, device: torch.device | str) -> "Data":
        """The same rows, whose batches are moved to `device` one at a time."""
        moved = self._view(self._rows)
        moved.device = torch.device(device)
        return moved

    def with_batch_size(self, batch_size: int) -> "Data":
        """The same rows in batches of another size."""
        view = self._view(self._rows)
        view.batch_size = _checked_size(batch_size)
        return view

    def split(self, ids: Ids) -> tuple["Data", "Data"]:
        """(these rows, the rest), both in the order of the data; index views, nothing is copied.

        Raises:
            ValueError: `ids` repeats an id or names one that is not here.
        """
        chosen = torch.zeros(self.num_data, dtype=torch.bool)
        chosen[self.positions(ids)] = True
        return self._view(self._rows[chosen]), self._view(self._rows[~chosen])

    def join(self, other: "Data") -> "Data":
        """These rows and those of another split of the same data, in the order of the data.

        Raises:
            ValueError: the two do not come from the same `Data`, or share a row.
        """
        if other._source is not self._source:
            raise ValueError("Only splits of the same `Data` can be joined: make both with `data.split(ids)`.")
        rows = torch.cat([self._rows, other._rows]).sort().values
        if bool((rows.diff() == 0).any()):
            raise ValueError("The two splits share rows.")
        return self._view(rows)

    def positions(self, ids: Ids) -> Tensor:
        """Where these ids stand among `self.ids`."""
        return positions_of(as_ids(ids), self.ids, "the data")

    def batches(self) -> Iterator[Batch]:
        """Batches of `batch_size` rows in a fixed order; none for no rows.

        Rows that fill one batch are looked up once: a solver passes over them dozens of times.
        """
        if 0 < self.num_data <= self.batch_size:
            self._whole = self._whole or self._batch(self._rows)
            yield self._whole
            return
        for rows in self._rows.split(self.batch_size) if self.num_data else ():
            yield self._batch(rows)

    def reduce(self, function: Callable[[Batch], Value], start: Value | None = None) -> Value:
        """`start` + Σ function(batch): the one loop over the data.

        `function` returns a tensor, or a dict or tuple of tensors. With no rows, `start` is the sum.
        """
        total = start
        for batch in self.batches():
            value = function(batch)
            total = value if total is None else _add(total, value)
        if total is None:
            raise ValueError("A sum over no rows needs a `start`.")
        return total

    def gather(self, function: Callable[[Batch], Tensor]) -> Tensor:
        """The results of `function`, whose last dim is the batch's rows, joined along that dim."""
        if not self.num_data:
            raise ValueError("No rows to gather results of.")
        pieces: list[Tensor] = []

        def keep(batch: Batch) -> Tensor:
            pieces.append(function(batch))
            return torch.zeros(())

        self.reduce(keep)
        return torch.cat(pieces, dim=-1)

    def minibatches(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Endless random batches of `size` rows, without replacement within a batch: the one random access."""
        size = min(size, self.num_data)
        if size < 1:
            raise ValueError("No rows to draw a batch from.")
        while True:
            order = torch.randperm(self.num_data, generator=generator)
            for chosen in order[: self.num_data // size * size].split(size):
                yield self._batch(self._rows[chosen])

    def template(self) -> Batch:
        """Two made-up rows of the same shapes and types: ones where a leaf is floating, zeros elsewhere.

        With them the prior of a model can be evaluated by someone who holds no data.
        """
        args, kwargs = self._source.blank(self.device)
        return Batch(args, kwargs, torch.tensor([MADE_UP, MADE_UP]), torch.zeros(2, dtype=torch.int64))

    def _view(self, rows: Tensor) -> "Data":
        view = object.__new__(Data)
        view.__dict__.update(self.__dict__ | {"_rows": rows, "_whole": None})
        return view

    def _batch(self, rows: Tensor) -> Batch:
        args, kwargs = self._source.take(as_slice(rows), self.device)
        return Batch(args, kwargs, self._all_ids[rows], rows)


def _own_ids(ids: Ids, num_rows: int) -> Tensor:
    own = as_ids(ids)
    if len(own) != num_rows:
        raise ValueError(f"`ids` has {len(own)} entries for {num_rows} rows: give one a row.")
    positions_of(own, own, "`ids`")
    return own.clone()


def _checked_size(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    return batch_size


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, dict):
        return {name: _add(value, right[name]) for name, value in left.items()}
    if isinstance(left, tuple):
        return tuple(_add(mine, theirs) for mine, theirs in zip(left, right, strict=True))
    return left + right
