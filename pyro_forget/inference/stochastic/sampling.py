"""A sampling run on disk, as its readers see it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from xarray import DataTree

from pyro_forget.data import Data
from pyro_forget.inference.stochastic.archive import DRAWS, Archive, stored_name
from pyro_forget.inference.stochastic.diagnostics import Diagnostics
from pyro_forget.inference.stochastic.netcdf import write_netcdf
from pyro_forget.posterior import SampledPosterior


@dataclass(frozen=True)
class Sampling:
    """Draws in a store; nothing is read before it is asked for.

    Attributes:
        path: the folder.
    """

    path: Path

    @staticmethod
    def open(path: str | Path) -> "Sampling":
        """The run in this folder, finished or not.

        Raises:
            ValueError: there is none.
        """
        if not Archive(Path(path)).exists:
            raise ValueError(f"{path} holds no sampling run: `sample_posterior(..., store=path)` writes one.")
        return Sampling(Path(path))

    @property
    def settings(self) -> dict[str, Any]:
        """What the run was begun with."""
        return Archive(self.path).settings

    @property
    def num_draws(self) -> int:
        """Draws of each chain that are there to be read."""
        return Archive(self.path).num_draws

    @property
    def tree(self) -> DataTree:
        """The groups `posterior`, `sample_stats` and `constant_data`, read lazily, as far as they are written."""
        tree = xr.open_datatree(self.path / DRAWS, engine="zarr", consolidated=False, chunks=None)
        return tree.isel(draw=slice(0, self.num_draws), missing_dims="ignore")

    @cached_property
    def diagnostics(self) -> Diagnostics | None:
        """Of the finished run; None while it is not finished."""
        text = self.tree.attrs.get("diagnostics")
        if text is None:
            return None
        found = json.loads(text)
        return Diagnostics(**{**found, "warnings": tuple(found["warnings"])})

    def to_netcdf(self, path: str | Path) -> Path:
        """Write the groups of `tree` to one netCDF-4 file, for programs that do not read zarr; `path`.

        The file is whole or not there at all, and memory does not grow with the draws.

        Raises:
            ValueError: no draw is written yet.
        """
        if not self.num_draws:
            raise ValueError(f"{self.path} holds no draws yet: go on with `sample_posterior(..., resume=True)`.")
        return write_netcdf(self.tree, path)

    def posterior(self, model: Callable[..., Any], data: Data, num_draws: int | None = None) -> SampledPosterior:
        """The draws as a posterior; `num_draws` of each chain, evenly spread, or all. No other draw is read.

        Raises:
            ValueError: there are fewer draws, or data or model are not those of the run.
        """
        there, tree = self.num_draws, self.tree
        if not 1 <= (there if num_draws is None else num_draws) <= there:
            raise ValueError(f"{self.path} has {there} draws of each chain, {num_draws or 'some'} are asked for.")
        ids = torch.tensor(np.asarray(tree["constant_data"]["row_id"]))
        if not torch.equal(ids.sort().values, data.ids.sort().values):
            raise ValueError(f"`data` has other ids than the run in {self.path}: pass the rows it was sampled with.")
        chosen = np.unique(np.linspace(0, there - 1, num_draws or there).round().astype(int))
        settings, stored = self.settings, tree["posterior"].to_dataset().isel(draw=chosen)
        draws = {name: torch.tensor(np.asarray(stored[stored_name(name)])) for name in settings["sites"]}
        if data.device is not None:
            draws = {name: value.to(data.device) for name, value in draws.items()}
        return SampledPosterior(
            model, draws, data, plate=settings["plate"], minibatch_scale=settings["minibatch_scale"]
        )
