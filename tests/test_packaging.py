"""What is declared is what is on the disk, and the package imports from anywhere under its installed names."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import pyro_forget

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"pyro_forget": "pyro_forget", "models": "pyro_forget.models", "guides": "pyro_forget.guides"}


def packages_on_disk() -> set[str]:
    """The installed names of all folders that hold Python files."""
    folders = {path.parent.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    return {".".join([FOLDERS[folder.parts[0]], *folder.parts[1:]]) for folder in folders}


def test_the_listed_packages_are_those_on_disk():
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(packages_on_disk())


def test_every_package_says_what_it_is():
    folders = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    missing = [folder.relative_to(ROOT).as_posix() for folder in folders if not (folder / "__init__.py").exists()]
    assert not missing, f"no __init__.py in {missing}"


def test_folders_map_into_the_package():
    mapping = PROJECT["tool"]["setuptools"]["package-dir"]
    assert mapping == {package: folder for folder, package in FOLDERS.items()}


def test_installed_metadata_is_that_of_the_sources():
    about = metadata.metadata("pyro-forget")
    assert about["Version"] == pyro_forget.__version__
    assert about["License-Expression"] == "Apache-2.0"


def test_the_licence_is_whole():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text and "9. Accepting Warranty" in text
    assert "Copyright The pyro-forget authors" in text


@pytest.mark.parametrize("name", ["pyro_forget", "pyro_forget.models", "pyro_forget.guides"])
def test_imports_from_elsewhere(tmp_path, name):
    """A user's working folder is not the checkout, and `import pyro_forget` is quiet and changes nothing."""
    code = f"import torch; before = torch.get_default_dtype(); import {name} as it; print(it.__name__)"
    code += "; assert torch.get_default_dtype() == before"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == (name, "")
