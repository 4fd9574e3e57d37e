"""Trees on disk, and as the `InferenceData` of ArviZ 0.x."""

from pathlib import Path
from typing import Any, Final

import xarray as xr
from xarray import DataTree

from pyro_forget.store import atomic_write

_ENGINE: Final = "h5netcdf"


def to_netcdf(tree: DataTree, path: str | Path) -> Path:
    """Write a tree to a netCDF-4 file, whole or not at all."""
    return atomic_write(path, lambda beside: tree.to_netcdf(beside, engine=_ENGINE))


def from_netcdf(path: str | Path) -> DataTree:
    """The tree in a file, read into memory; the file is closed."""
    with xr.open_datatree(Path(path), engine=_ENGINE) as tree:
        return tree.load()


def to_inferencedata(tree: DataTree) -> Any:
    """The `InferenceData` that ArviZ 0.x wants; ArviZ 1.x reads the tree itself.

    Raises:
        ImportError: `arviz` is missing, or has no `InferenceData` of its own.
    """
    try:
        import arviz
    except ImportError as error:
        raise ImportError("`to_inferencedata` needs ArviZ 0.x: pip install 'arviz<1'.") from error
    if int(arviz.__version__.split(".")[0]) >= 1:
        raise ImportError(
            f"ArviZ {arviz.__version__} works on the tree itself and has no InferenceData: pass it the tree."
        )
    groups: dict[str, Any] = {name: node.to_dataset() for name, node in tree.children.items()}
    return arviz.InferenceData(attrs=dict(tree.attrs), **groups)
