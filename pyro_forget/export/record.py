"""What is known about a request, as netCDF can hold it: numbers in a group, where it comes from in attributes."""

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import xarray as xr
from arviz_base import dict_to_dataset

from pyro_forget.outcome import Evidence, Report, Sweep
from pyro_forget.posterior import Posterior

_COUNTS = ("num_data", "num_erased", "num_retained", "seconds")
_EVIDENCE = ("khat", "ess", "ess_held_out", "residual", "stationarity")


def record(log_weights: np.ndarray | None, report: Report | None) -> xr.Dataset:
    """The group `forgetting`: what was seen on the way, as numbers.

    Args:
        log_weights: (chain, draw), of the group `posterior_weighted`.
        report: of the request.
    """
    data = xr.Dataset() if report is None else _reported(report)
    if log_weights is not None:
        data = data.assign(log_weights=(("chain", "draw"), log_weights))
    return data


def provenance(posterior: Posterior, report: Report | None) -> dict[str, Any]:
    """Attributes of the root: numbers and strings only."""
    known: dict[str, Any] = {"digest": posterior.digest, "parent": posterior.parent, "num_data": posterior.num_data}
    if report is not None:
        account = json.dumps(plain(report.to_dict()), ensure_ascii=False)
        known |= {"method": report.evidence.method, "num_erased": report.num_erased, "report": account}
    return library() | {name: value for name, value in known.items() if value is not None}


def library() -> dict[str, str]:
    """Who wrote this, and when."""
    try:
        ours = version("pyro-forget")
    except PackageNotFoundError:  # run from a checkout that was never installed
        ours = "unknown"
    return {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "creation_library": "pyro_forget",
        "creation_library_version": ours,
    }


def plain(value: Any) -> Any:
    """JSON types only; a number that JSON cannot say becomes the string "nan", "inf" or "-inf"."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value


def _reported(report: Report) -> xr.Dataset:
    evidence = report.evidence
    values: dict[str, Any] = {name: getattr(report, name) for name in _COUNTS}
    values |= {name: value for name in _EVIDENCE if (value := getattr(evidence, name)) is not None}
    steps = {"step_norm": np.array(list(evidence.step_norm.values()))} if evidence.step_norm else {}
    sweeps = _sweeps(evidence)
    dims: dict[Hashable, Sequence[Hashable]] = {name: ["sweep"] for name in sweeps}
    return dict_to_dataset(
        values | steps | sweeps,
        sample_dims=[],
        dims=dims | {"step_norm": ["site"]},
        coords={"site": list(evidence.step_norm)},
        attrs=library(),
    )


def _sweeps(evidence: Evidence) -> dict[str, np.ndarray]:
    if not evidence.sweeps:
        return {}
    return {
        f"sweep_{name}": np.array([getattr(sweep, name) for sweep in evidence.sweeps])
        for name in Sweep.__dataclass_fields__
    }
