"""Draws as one netCDF file, for programs that do not read zarr."""

from collections.abc import Iterator
from pathlib import Path

import h5netcdf
import numpy as np
from xarray import Dataset, DataTree, Variable

from pyro_forget.store import atomic_write


def write_netcdf(tree: DataTree, path: str | Path) -> Path:
    """Write a tree read from a store, whole or not at all, a block of draws at a time.

    xarray's own way reads every array as a whole, and memory grows with the draws.
    """

    def write(beside: Path) -> None:
        with h5netcdf.File(beside, "w") as file:
            file.attrs.update(tree.attrs)
            for name, node in tree.children.items():
                _copy(node.to_dataset(), file.create_group(name))

    return atomic_write(path, write)


def _copy(dataset: Dataset, group: h5netcdf.Group) -> None:
    group.dimensions = dict(dataset.sizes)
    for name, values in dataset.variables.items():
        target = group.create_variable(name, values.dims, values.dtype)
        for block in _blocks(values):
            target[block] = np.asarray(values[block])


def _blocks(values: Variable) -> Iterator[tuple[slice, ...]]:
    """The draws as they lie on the disk, so that each block is read once."""
    if "draw" not in values.dims:
        yield (slice(None),) * values.ndim
        return
    place = values.dims.index("draw")
    rows = int(values.encoding["chunks"][place])
    for first in range(0, values.shape[place], rows):
        yield (slice(None),) * place + (slice(first, min(first + rows, values.shape[place])),)
