"""The data of a posterior: the arguments of a model's call, row by row, with ids that survive splits.

`Data(x, y)` stands for the call `model(x, y)`. A leaf of the call is *per datum* when its length along dim 0 is the
number of data; every other leaf is passed to the model as it is. Rows are looked up when a batch is made, so splits
are index views and copy nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

DEFAULT_BATCH_SIZE = 2048

Ids = Tensor | np.ndarray | Sequence[int] | range
Value = TypeVar("Value")


@dataclass(frozen=True)
class Batch:
    """The model's call for some rows.

    Attributes:
        args, kwargs: the arguments of the call.
        ids: int64, shape (rows,): who these rows are.
        rows: int64, shape (rows,): where they stand in the data set as it was first given.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ids: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.ids)


class Source(Protocol):
    """Where rows come from."""

    num_rows: int
    indexed: bool

    def take(self, rows: slice | Tensor, device: torch.device | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call for these rows, on `device` where one is given."""
        ...


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
        source = Call(args, kwargs)
        self._source: Source = source
        self._rows = torch.arange(source.num_rows)
        self._all_ids = self._rows
        self.batch_size = DEFAULT_BATCH_SIZE
        self.device: torch.device | None = None

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
        return _assemble(Call(args, dict(kwargs or {}), dims or {}, tuple(fixed), num_data), ids, batch_size)

    @staticmethod
    def from_dataset(dataset: Any, *, ids: Ids | None = None, batch_size: int = DEFAULT_BATCH_SIZE) -> "Data":
        """A map-style `torch.utils.data.Dataset`, loaded batch by batch.

        An item that is a tuple becomes the model's positional arguments, a mapping its keyword arguments, anything
        else its only argument.
        """
        return _assemble(Loaded(dataset), ids, batch_size)

    @property
    def ids(self) -> Tensor:
        """Int64, shape (num_data,): who the rows are."""
        return self._all_ids[self._rows]

    @property
    def num_data(self) -> int:
        """The number of rows."""
        return len(self._rows)

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
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        view = self._view(self._rows)
        view.batch_size = batch_size
        return view

    def split(self, ids: Ids) -> tuple["Data", "Data"]:
        """(these rows, the rest), both in the order of the data; index views, nothing is copied.

        Raises:
            ValueError: `ids` repeats an id or names one that is not here.
        """
        chosen = torch.zeros(self.num_data, dtype=torch.bool)
        chosen[self.positions(ids)] = True
        return self._view(self._rows[chosen]), self._view(self._rows[~chosen])

    def positions(self, ids: Ids) -> Tensor:
        """Where these ids stand among `self.ids`."""
        return positions_of(as_ids(ids), self.ids, "the data")

    def batches(self) -> Iterator[Batch]:
        """Batches of `batch_size` rows in a fixed order; none for no rows."""
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
        pieces: list[Tensor] = []
        self.reduce(lambda batch: pieces.append(function(batch)) or torch.zeros(()), start=torch.zeros(()))
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
        args, kwargs = self._source.take(self._rows[:1], self.device)
        blank = Call(args, kwargs, *getattr(self._source, "marks", ({}, ())), 1).map_leaves(_blank)
        return Batch(blank[0], blank[1], torch.tensor([-1, -1]), torch.zeros(2, dtype=torch.int64))

    def _view(self, rows: Tensor) -> "Data":
        view = object.__new__(Data)
        view.__dict__.update(self.__dict__ | {"_rows": rows})
        return view

    def _batch(self, rows: Tensor) -> Batch:
        args, kwargs = self._source.take(_as_slice(rows), self.device)
        return Batch(args, kwargs, self._all_ids[rows], rows)


class Call:
    """A model's call held in memory: nested one level deep in dicts, tuples and lists."""

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dims: Mapping[int | str, int] | None = None,
        fixed: tuple[int | str, ...] = (),
        num_data: int | None = None,
    ) -> None:
        self.args, self.kwargs = args, kwargs
        self.marks = (dict(dims or {}), fixed)
        lengths = Counter(size for _, leaf, dim in self._leaves() if (size := _length(leaf, dim)))
        self.num_rows = _number_of_data(lengths, num_data)
        self.indexed = lengths[self.num_rows] == 0

    def take(self, rows: slice | Tensor, device: torch.device | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call for these rows; a slice gives views."""
        return self.map_leaves(lambda leaf, dim: _take(leaf, rows, dim), device)

    def map_leaves(
        self, function: Callable[[Any, int], Any], device: torch.device | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Apply `function` to the per-datum leaves; move the tensors among all leaves to `device`."""

        def visit(name: Any, leaf: Any) -> Any:
            dim = self._dim(name)
            changed = leaf if dim is None or _length(leaf, dim) != self.num_rows else function(leaf, dim)
            return changed.to(device) if device is not None and isinstance(changed, Tensor) else changed

        args = tuple(_descend(visit, place, value) for place, value in enumerate(self.args))
        return args, {name: _descend(visit, name, value) for name, value in self.kwargs.items()}

    def _leaves(self) -> list[tuple[Any, Any, int]]:
        found: list[tuple[Any, Any, int]] = []

        def visit(name: Any, leaf: Any) -> Any:
            if (dim := self._dim(name)) is not None:
                found.append((name, leaf, dim))
            return leaf

        for place, value in [*enumerate(self.args), *self.kwargs.items()]:
            _descend(visit, place, value)
        return found

    def _dim(self, name: tuple[Any, ...]) -> int | None:
        """The data dim of a leaf, None when it is passed as it is; `name` lists what a user may call it."""
        dims, fixed = self.marks
        if any(part in fixed for part in name):
            return None
        return next((dims[part] for part in name if part in dims), 0)


class Loaded:
    """Rows of a map-style data set, loaded when they are asked for."""

    indexed = False

    def __init__(self, dataset: Any) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise ValueError(
                f"`dataset` must be map-style, with a length and items by index; got {type(dataset).__name__}."
            )
        self.dataset = dataset
        self.num_rows = len(dataset)

    def take(self, rows: slice | Tensor, device: torch.device | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The collated items of these rows."""
        indices = range(self.num_rows)[rows] if isinstance(rows, slice) else rows.tolist()
        items = default_collate([self.dataset[index] for index in indices])
        args: tuple[Any, ...] = tuple(items) if isinstance(items, (tuple, list)) else (items,)
        call = Call((), dict(items), {}, (), -1) if isinstance(items, Mapping) else Call(args, {}, {}, (), -1)
        return call.map_leaves(lambda leaf, dim: leaf, device)


def as_ids(ids: Ids) -> Tensor:
    """Ids as an int64 tensor of shape (n,).

    Raises:
        ValueError: they are no integers, or not one-dimensional.
    """
    tensor = torch.as_tensor(ids if isinstance(ids, Tensor) else np.asarray(ids)).cpu()
    if tensor.dtype == torch.bool:
        raise ValueError("`ids` must be integers, got a boolean mask: use `data.ids[mask]`.")
    if tensor.numel() == 0:
        return torch.zeros(0, dtype=torch.int64)
    if tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"`ids` must be integers, got {tensor.dtype}.")
    if tensor.ndim > 1:
        raise ValueError(f"`ids` must be one-dimensional, got shape {tuple(tensor.shape)}.")
    return tensor.reshape(-1).to(torch.int64)


def positions_of(ids: Tensor, known: Tensor, owner: str) -> Tensor:
    """Where `ids` stand among `known`.

    Raises:
        ValueError: an id is repeated, or not among `known`.
    """
    values, counts = ids.unique(return_counts=True)
    if len(values) < len(ids):
        raise ValueError(f"`ids` repeats {_some(values[counts > 1])}: each row can be chosen once.")
    order = known.argsort()
    place = torch.searchsorted(known[order], ids).clamp(max=max(len(known) - 1, 0))
    found = order[place] if len(known) else place
    unknown = ids[known[found] != ids] if len(known) else ids
    if len(unknown):
        raise ValueError(f"id {_some(unknown)} not in {owner}: erased before, or never there.")
    return found


def _assemble(source: Source, ids: Ids | None, batch_size: int) -> Data:
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    own = torch.arange(source.num_rows) if ids is None else as_ids(ids)
    if len(own) != source.num_rows:
        raise ValueError(f"`ids` has {len(own)} entries for {source.num_rows} rows: give one a row.")
    positions_of(own, own, "`ids`")
    data = object.__new__(Data)
    data.__dict__.update(
        _source=source, _rows=torch.arange(source.num_rows), _all_ids=own, batch_size=batch_size, device=None
    )
    return data


def _number_of_data(lengths: Counter[int], num_data: int | None) -> int:
    if num_data is not None:
        return num_data
    if not lengths:
        raise ValueError(
            "No argument has rows, so the number of data is unknown. Pass tensors, arrays or data frames to `Data`, "
            "or, for a model that reads its data with the plate's index, `Data.of(num_data=...)`."
        )
    # Where lengths tie, the longer is the data: a prior's scale of length 3 beside 60 rows.
    return max(lengths, key=lambda length: (lengths[length], length))


def _descend(visit: Callable[[tuple[Any, ...], Any], Any], name: Any, value: Any) -> Any:
    """Visit a value, or the values of one level of dict, tuple or list."""
    if isinstance(value, Mapping):
        return type(value)({key: visit((name, key), leaf) for key, leaf in value.items()})  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(visit((name, key), leaf) for key, leaf in zip(value._fields, value, strict=True)))
    if isinstance(value, (tuple, list)):
        return type(value)(visit((name,), leaf) for leaf in value)
    return visit((name,), value)


def _length(leaf: Any, dim: int) -> int:
    """The size of a leaf along its data dim; 0 for what has no rows."""
    if isinstance(leaf, (Tensor, np.ndarray)):
        return leaf.shape[dim] if leaf.ndim > dim else 0
    return len(leaf) if hasattr(leaf, "iloc") else 0


def _take(leaf: Any, rows: slice | Tensor, dim: int) -> Any:
    if isinstance(leaf, Tensor):
        if isinstance(rows, slice):
            return leaf.narrow(dim, rows.start, rows.stop - rows.start)
        return leaf.index_select(dim, rows.to(leaf.device))
    index = rows if isinstance(rows, slice) else rows.numpy()
    return leaf.iloc[index] if hasattr(leaf, "iloc") else leaf[(slice(None),) * dim + (index,)]


def _as_slice(rows: Tensor) -> slice | Tensor:
    """A slice where the rows are consecutive: then a batch is a view, not a copy."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows) and bool((rows.diff() == 1).all()):
        return slice(first, last + 1)
    return rows


def _blank(leaf: Any, dim: int) -> Any:
    """Two made-up rows in the shape of a leaf of one row."""
    if isinstance(leaf, Tensor):
        made = torch.ones_like(leaf) if leaf.is_floating_point() else torch.zeros_like(leaf)
        return torch.cat([made, made], dim)
    if isinstance(leaf, np.ndarray):
        made = np.ones_like(leaf) if np.issubdtype(leaf.dtype, np.floating) else np.zeros_like(leaf)
        return np.concatenate([made, made], axis=dim)
    two = leaf.iloc[[0, 0]].copy()
    if two.ndim == 1:
        two[:] = _blank_of(two.dtype)
    for name in two.columns if two.ndim == 2 else ():
        two[name] = _blank_of(two[name].dtype)
    return two


def _blank_of(dtype: Any) -> Any:
    return dtype.type(dtype.kind == "f") if isinstance(dtype, np.dtype) and dtype.kind in "fiub" else ""


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, dict):
        return {name: _add(value, right[name]) for name, value in left.items()}
    if isinstance(left, tuple):
        return tuple(_add(mine, theirs) for mine, theirs in zip(left, right, strict=True))
    return left + right


def _some(ids: Tensor) -> str:
    shown = ", ".join(str(value) for value in ids[:5].tolist())
    return shown + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
