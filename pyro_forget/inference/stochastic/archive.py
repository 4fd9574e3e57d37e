"""Draws on disk, written a block at a time so that a reader or a resumed run never meets half of one.

A folder with `draws.zarr`, the groups as ArviZ knows them; `state.safetensors`, all that the chains need to go on, and
how many draws count; `settings.json`; and `writer.lock`. The state is replaced, whole, after the draws it counts are
in place: what stands beyond that number is no draw, and is written again.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from torch import Tensor

from pyro_forget.store import load_json, load_tensors, save_json, save_tensors

DRAWS, STATE, SETTINGS = "draws.zarr", "state.safetensors", "settings.json"
_BLOCK_BYTES = 16_000_000
_MAX_BLOCK = 256
_STATS_CHUNK = 4096


@dataclass(frozen=True)
class Archive:
    """The folder of one sampling run.

    Attributes:
        path: of the folder.
    """

    path: Path

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / SETTINGS).exists()

    @property
    def settings(self) -> dict[str, Any]:
        """What the run was begun with."""
        return dict(load_json(self.path / SETTINGS))

    @property
    def num_draws(self) -> int:
        """Draws of each chain that are there to be read."""
        return int(self.state()[1]["draws"]) if (self.path / STATE).exists() else 0

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, header) of the chains after the last draw that counts."""
        return load_tensors(self.path / STATE)

    def create(
        self, settings: Mapping[str, Any], sites: Mapping[str, Tensor], statistics: Mapping[str, Tensor], ids: Tensor
    ) -> None:
        """Make room for the draws: `sites` and `statistics` are like one draw of all chains, (chain, *site).

        Raises:
            ValueError: two sites have one name once "/" is written as ".".
        """
        names = [stored_name(name) for name in sites]
        if len(set(names)) < len(names):
            raise ValueError(f"Of the sites {sorted(sites)} two have one name once '/' is written as '.': rename one.")
        self.path.mkdir(parents=True, exist_ok=True)
        # What is left of a run that was killed before it began.
        shutil.rmtree(self.path / DRAWS, ignore_errors=True)
        (self.path / STATE).unlink(missing_ok=True)
        root = zarr.create_group(self.path / DRAWS)
        length, block = int(settings["num_samples"]), block_length(sites)
        for group, values, rows in (("posterior", sites, block), ("sample_stats", statistics, _STATS_CHUNK)):
            folder = root.create_group(group)
            for name, value in values.items():
                _create_array(folder, stored_name(name), _array(value), length, rows)
            _coordinate(folder, "chain", np.arange(len(next(iter(sites.values())))))
            _coordinate(folder, "draw", np.arange(length))
        _coordinate(root.create_group("constant_data"), "row_id", _array(ids))
        save_json(self.path / SETTINGS, dict(settings))

    def grow(self, num_samples: int) -> None:
        """Make room for more draws a chain."""
        # What a killed writer left behind.
        for leftover in (self.path / DRAWS).rglob("*.partial"):
            leftover.unlink(missing_ok=True)
        root = zarr.open_group(self.path / DRAWS, mode="r+")
        for group in ("posterior", "sample_stats"):
            folder = _group(root, group)
            for name, array in folder.arrays():
                if name not in ("chain", "draw") and array.shape[1] < num_samples:
                    array.resize((array.shape[0], num_samples, *array.shape[2:]))
            if len(np.asarray(folder["draw"])) < num_samples:
                _coordinate(folder, "draw", np.arange(num_samples))
        save_json(self.path / SETTINGS, self.settings | {"num_samples": num_samples})

    def commit(
        self,
        first: int,
        blocks: Mapping[str, Mapping[str, np.ndarray]],
        count: int,
        tensors: Mapping[str, Tensor],
        header: Mapping[str, Any],
    ) -> None:
        """Write draws `first` to `count` − 1 by group and name, (chain, draw, *site), then the state counting them."""
        if count > first:
            root = zarr.open_group(self.path / DRAWS, mode="r+")
            for group, values in blocks.items():
                folder = _group(root, group)
                for name, value in values.items():
                    array = folder[stored_name(name)]
                    if isinstance(array, zarr.Array):
                        array[:, first:count] = value
        save_tensors(self.path / STATE, dict(tensors), {**header, "draws": count})

    def annotate(self, attributes: Mapping[str, Any]) -> None:
        """Write attributes of the root; what is not a number or a string, as JSON."""
        root = zarr.open_group(self.path / DRAWS, mode="r+")
        plain = {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in attributes.items()}
        root.attrs.update(plain)


def block_length(sites: Mapping[str, Tensor]) -> int:
    """Draws that are kept in memory and written together: up to 16 MB of them."""
    size = sum(value.numel() * value.element_size() for value in sites.values())
    return max(1, min(_MAX_BLOCK, _BLOCK_BYTES // max(size, 1)))


def stored_name(name: str) -> str:
    """A site's name in the store, where "/" is for groups."""
    return name.replace("/", ".")


def _create_array(group: zarr.Group, name: str, like: np.ndarray, length: int, rows: int) -> None:
    chains, *site = like.shape
    group.create_array(
        name,
        shape=(chains, length, *site),
        chunks=(chains, max(1, min(rows, length)), *site),
        dtype=like.dtype,
        # The low digits of draws are noise, which no compressor shortens.
        compressors=None,
        fill_value=np.nan,
        dimension_names=("chain", "draw", *(f"{name}_dim_{place}" for place in range(len(site)))),
    )


def _coordinate(group: zarr.Group, name: str, values: np.ndarray) -> None:
    array = group.create_array(
        name, shape=values.shape, chunks=values.shape, dtype=values.dtype, dimension_names=(name,), overwrite=True
    )
    array[:] = values


def _group(root: zarr.Group, name: str) -> zarr.Group:
    found = root[name]
    if not isinstance(found, zarr.Group):
        raise ValueError(
            f"The store has an array where the group '{name}' should be: it was written by another program."
        )
    return found


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
