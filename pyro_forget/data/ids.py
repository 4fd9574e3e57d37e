"""Ids: who a row is, whatever was split off or put in another order since."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Ids = Tensor | np.ndarray | Sequence[int] | range


def as_ids(ids: Ids) -> Tensor:
    """Ids as an int64 tensor of shape (n,).

    Raises:
        ValueError: they are no integers, or not one-dimensional.
    """
    try:
        tensor = torch.as_tensor(ids if isinstance(ids, Tensor) else np.asarray(ids)).cpu()
    except (TypeError, ValueError) as error:
        raise ValueError(f"`ids` must be integers that int64 holds: {error}") from error
    if tensor.dtype == torch.bool:
        raise ValueError("`ids` must be integers, got a boolean mask: use `data.ids[mask]`.")
    if tensor.numel() == 0:
        return torch.zeros(0, dtype=torch.int64)
    if tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"`ids` must be integers, got {tensor.dtype}.")
    if tensor.ndim > 1:
        raise ValueError(f"`ids` must be one-dimensional, got shape {tuple(tensor.shape)}.")
    return tensor.reshape(-1).to(torch.int64)


class Index:
    """Where ids stand among known ones, which are sorted once."""

    def __init__(self, known: Tensor, owner: str) -> None:
        self.known, self.owner = known, owner
        self._sorted, self._order = known.sort()

    def positions(self, ids: Tensor) -> Tensor:
        """Where `ids` stand among the known ones.

        Raises:
            ValueError: an id is repeated, or not among the known ones.
        """
        values, counts = ids.unique(return_counts=True)
        if len(values) < len(ids):
            raise ValueError(f"`ids` repeats {_some(values[counts > 1])}: each row can be chosen once.")
        place = torch.searchsorted(self._sorted, ids.contiguous()).clamp(max=max(len(self.known) - 1, 0))
        found = self._order[place] if len(self.known) else place
        unknown = ids[self._sorted[place] != ids] if len(self.known) else ids
        if len(unknown):
            raise ValueError(f"id {_some(unknown)} not in {self.owner}: erased before, or never there.")
        return found


def positions_of(ids: Tensor, known: Tensor, owner: str) -> Tensor:
    """Where `ids` stand among `known`.

    Raises:
        ValueError: an id is repeated, or not among `known`.
    """
    return Index(known, owner).positions(ids)


def _some(ids: Tensor) -> str:
    shown = ", ".join(str(value) for value in ids[:5].tolist())
    return shown + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
