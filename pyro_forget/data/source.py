"""Where rows come from: a model's call held in memory, or a data set that loads them."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import default_collate

from pyro_forget.data.leaves import blank, descend, length, take

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Source(Protocol):
    """Where rows come from.

    Attributes:
        num_rows: how many there are.
        indexed: whether no argument has rows, so that the model reads its data with the plate's index.
    """

    num_rows: int
    indexed: bool

    def take(self, rows: slice | Tensor, device: torch.device | None) -> Arguments:
        """The call for these rows, on `device` where one is given."""
        ...

    def blank(self, device: torch.device | None) -> Arguments:
        """The call for two made-up rows."""
        ...


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
        self._dims, self._fixed = dict(dims or {}), fixed
        lengths = self._lengths()
        self.num_rows = _number_of_data(lengths, num_data)
        self.indexed = lengths[self.num_rows] == 0

    def take(self, rows: slice | Tensor, device: torch.device | None) -> Arguments:
        """The call for these rows; a slice gives views."""
        return self._map(lambda leaf, dim: take(leaf, rows, dim), device)

    def blank(self, device: torch.device | None) -> Arguments:
        """The call for two made-up rows."""
        return self._map(blank, device)

    def _map(self, function: Callable[[Any, int], Any], device: torch.device | None) -> Arguments:
        """Apply `function` to the per-datum leaves; move the tensors among all leaves to `device`."""

        def visit(name: tuple[Any, ...], leaf: Any) -> Any:
            dim = self._dim(name)
            changed = leaf if dim is None or length(leaf, dim) != self.num_rows else function(leaf, dim)
            return changed.to(device) if device is not None and isinstance(changed, Tensor) else changed

        args = tuple(descend(visit, place, value) for place, value in enumerate(self.args))
        return args, {name: descend(visit, name, value) for name, value in self.kwargs.items()}

    def _lengths(self) -> Counter[int]:
        """How many leaves have how many rows."""
        found: Counter[int] = Counter()

        def visit(name: tuple[Any, ...], leaf: Any) -> None:
            dim = self._dim(name)
            if dim is not None and (size := length(leaf, dim)):
                found[size] += 1

        for place, value in [*enumerate(self.args), *self.kwargs.items()]:
            descend(visit, place, value)
        return found

    def _dim(self, name: tuple[Any, ...]) -> int | None:
        """The data dim of a leaf, None when it is passed as it is; `name` lists what a user may call it."""
        if any(part in self._fixed for part in name):
            return None
        return next((self._dims[part] for part in name if part in self._dims), 0)


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

    def take(self, rows: slice | Tensor, device: torch.device | None) -> Arguments:
        """The collated items of these rows."""
        indices = range(self.num_rows)[rows] if isinstance(rows, slice) else rows.tolist()
        return self._collated(list(indices)).take(slice(0, len(indices)), device)

    def blank(self, device: torch.device | None) -> Arguments:
        """The call for two made-up rows, in the shape of the first item."""
        return self._collated([0]).blank(device)

    def _collated(self, indices: list[int]) -> Call:
        items = default_collate([self.dataset[index] for index in indices])
        if isinstance(items, Mapping):
            return Call((), dict(items), num_data=len(indices))
        return Call(tuple(items) if isinstance(items, (tuple, list)) else (items,), {}, num_data=len(indices))


def as_slice(rows: Tensor) -> slice | Tensor:
    """A slice where the rows are consecutive: then a batch is a view, not a copy."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows) and bool((rows.diff() == 1).all()):
        return slice(first, last + 1)
    return rows


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
