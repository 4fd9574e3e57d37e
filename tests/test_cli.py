"""The command: what it prints where, and what it refuses."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import pyro_forget
from pyro_forget.cli import demo as demonstration
from pyro_forget.cli.app import app
from pyro_forget.cli.demo import Demo
from pyro_forget.export import join, to_netcdf
from tests import requests

runner = CliRunner()
FIGURES = {"digits": {"before": {"remaining_fraction": 1.0}}, "breast_cancer": {}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, int, str]]:
    """What a demonstration that costs nothing was asked for."""
    found = []

    def run_demo(out: Path, *, seed: int, device: str) -> Demo:
        found.append((out, seed, device))
        return Demo(FIGURES, "a table", [out / "report.html"])

    monkeypatch.setattr(demonstration, "run_demo", run_demo)
    return found


def test_version():
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"pyro-forget {pyro_forget.__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_names_the_commands(arguments):
    result = runner.invoke(app, arguments)
    assert "demo" in result.output and "report" in result.output


def test_demo_makes_its_folder_and_passes_its_options_on(asked, tmp_path):
    result = runner.invoke(app, ["demo", "--out", str(tmp_path / "a" / "b"), "--seed", "3", "--device", "cpu"])
    assert (result.exit_code, result.stdout) == (0, "a table\n")
    assert asked == [(tmp_path / "a" / "b", 3, "cpu")]
    assert (tmp_path / "a" / "b").is_dir()


def test_json_is_all_that_is_printed(asked, tmp_path):
    result = runner.invoke(app, ["demo", "--out", str(tmp_path), "--json"])
    assert json.loads(result.stdout) == FIGURES


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "abacus"], "not there"),
        (["--device", "cuda:99"], "not there"),
        (["--seed", "-1"], "0"),
        (["--out", __file__], "is a file"),
    ],
)
def test_demo_refuses_what_it_cannot_do(asked, tmp_path, arguments, said):
    result = runner.invoke(app, ["demo", "--out", str(tmp_path), *arguments])
    assert result.exit_code == 2 and said in result.output
    assert not asked


def test_report_writes_the_page_beside_the_file(tmp_path):
    file = to_netcdf(join({"one": requests.tree()}, "A request"), tmp_path / "forgetting.nc")
    result = runner.invoke(app, ["report", str(file)])
    assert result.exit_code == 0 and "report.html" in result.stdout
    assert "A request" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "report-one-forest.png").exists()


def test_report_writes_where_it_is_told(tmp_path):
    file = to_netcdf(requests.tree(), tmp_path / "forgetting.nc")
    result = runner.invoke(app, ["report", str(file), "--out", str(tmp_path / "other.html")])
    assert result.exit_code == 0
    assert (tmp_path / "other.html").exists() and not (tmp_path / "report.html").exists()


def test_report_refuses_a_file_that_is_none(tmp_path):
    assert runner.invoke(app, ["report", str(tmp_path / "missing.nc")]).exit_code == 2
    (tmp_path / "text.nc").write_text("no netCDF")
    result = runner.invoke(app, ["report", str(tmp_path / "text.nc")])
    assert result.exit_code == 2 and "text.nc" in result.output


def test_report_refuses_a_tree_without_a_posterior(tmp_path):
    file = to_netcdf(join({}, "nothing"), tmp_path / "empty.nc")
    result = runner.invoke(app, ["report", str(file)])
    assert result.exit_code == 2 and "posterior" in result.output


def test_report_refuses_a_page_in_a_folder_that_is_not_there(tmp_path):
    file = to_netcdf(requests.tree(), tmp_path / "forgetting.nc")
    result = runner.invoke(app, ["report", str(file), "--out", str(tmp_path / "none" / "report.html")])
    assert result.exit_code == 2 and "folder" in result.output
