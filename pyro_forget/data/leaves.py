"""The leaves of a model's call: tensors, arrays and data frames, nested one level deep, and their rows."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def descend(visit: Callable[[tuple[Any, ...], Any], Any], name: Any, value: Any) -> Any:
    """Visit a value, or the values of one level of dict, tuple or list, with the names a user may call it by."""
    if isinstance(value, Mapping):
        leaves = {key: visit((name, key), leaf) for key, leaf in value.items()}
        return leaves if isinstance(value, dict) else type(value)(leaves)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(visit((name, key), leaf) for key, leaf in zip(value._fields, value, strict=True)))
    if isinstance(value, (tuple, list)):
        return type(value)(visit((name,), leaf) for leaf in value)
    return visit((name,), value)


def length(leaf: Any, dim: int) -> int:
    """The size of a leaf along its data dim; 0 for what has no rows."""
    if isinstance(leaf, (Tensor, np.ndarray)):
        return leaf.shape[dim] if -leaf.ndim <= dim < leaf.ndim else 0
    return len(leaf) if hasattr(leaf, "iloc") else 0


def take(leaf: Any, rows: slice | Tensor, dim: int) -> Any:
    """Some rows of a leaf; a slice gives a view."""
    if isinstance(leaf, Tensor):
        if isinstance(rows, slice):
            return leaf.narrow(dim, rows.start, rows.stop - rows.start)
        return leaf.index_select(dim, rows.to(leaf.device))
    index = rows if isinstance(rows, slice) else rows.numpy()
    return leaf.iloc[index] if hasattr(leaf, "iloc") else leaf[(slice(None),) * (dim % leaf.ndim) + (index,)]


def blank(leaf: Any, dim: int) -> Any:
    """Two made-up rows in the shape of a leaf: ones where it is floating, zeros or empty text elsewhere."""
    one = take(leaf, slice(0, 1), dim)
    if isinstance(one, Tensor):
        made = torch.ones_like(one) if one.is_floating_point() else torch.zeros_like(one)
        return torch.cat([made, made], dim)
    if isinstance(one, np.ndarray):
        array = np.ones_like(one) if np.issubdtype(one.dtype, np.floating) else np.zeros_like(one)
        return np.concatenate([array, array], axis=dim)
    two = one.iloc[[0, 0]].copy()
    if two.ndim == 1:
        two[:] = _blank_of(two.dtype)
    for name in two.columns if two.ndim == 2 else ():
        two[name] = _blank_of(two[name].dtype)
    return two


def _blank_of(dtype: Any) -> Any:
    return dtype.type(dtype.kind == "f") if isinstance(dtype, np.dtype) and dtype.kind in "fiub" else ""
