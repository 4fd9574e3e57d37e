"""The examples in docstrings run, in every module under the name that users import it by."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"pyro_forget": (), "models": ("pyro_forget",), "guides": ("pyro_forget",)}


def module_names() -> list[str]:
    paths = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    names = [".".join([*FOLDERS[path.parts[0]], *path.with_suffix("").parts]) for path in paths]
    return sorted(name.removesuffix(".__init__") for name in names if not name.endswith("__main__"))


@pytest.mark.parametrize("name", module_names())
def test_examples_run(name):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(importlib.import_module(name), optionflags=flags).failed == 0
