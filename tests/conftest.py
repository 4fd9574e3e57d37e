"""What every test starts from: float64, a fixed seed, an empty param store, and no trace of the test before."""

import os
from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch
from hypothesis import settings
from pyro.poutine.runtime import _PYRO_STACK

DATA_ROOT = os.environ.get("PYRO_FORGET_DATA")
NO_DATA = "PYRO_FORGET_DATA does not name a folder of data sets"

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
# The same examples in every run, and no deadline: on a busy machine a slow example is no failure.
settings.register_profile("pyro-forget", derandomize=True, deadline=None)
settings.load_profile("pyro-forget")


def global_state() -> dict[str, object]:
    """Settings of the process that no call of the library may leave changed."""
    return {
        "default dtype": torch.get_default_dtype(),
        "gradient mode": torch.is_grad_enabled(),
        "number of threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "Pyro's settings": pyro.settings.get(),
        "Pyro's handler stack": len(_PYRO_STACK),
    }


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Run each test from the same state, and fail the test that leaves another."""
    outside = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    before = global_state()
    try:
        yield
        after = global_state()
        changed = [f"{name}: {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
        assert not changed, f"The test left global state changed: {'; '.join(changed)}"
    finally:
        torch.set_default_dtype(outside)


@pytest.fixture
def float32() -> Iterator[None]:
    """The default type that users have."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the real data sets; the test is skipped where there is none."""
    if not DATA_ROOT:
        pytest.skip(NO_DATA)
    return Path(DATA_ROOT)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run."""
    missing = {
        "gpu": None if torch.cuda.is_available() else "no CUDA device",
        "data": None if DATA_ROOT else NO_DATA,
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
