"""The README: its example runs as it is printed, what it names exists, its links lead somewhere."""

import re
from pathlib import Path

import pytest

import pyro_forget

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_the_example_runs(float32, tmp_path, monkeypatch, capsys):
    """All blocks, one after the other, in an empty folder, under the default type that users have."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    said = capsys.readouterr().out
    assert "Influence" in said and "warnings: ()" in said and "Pareto k̂" in said
    assert (tmp_path / "report.html").exists() and (tmp_path / "forgetting.nc").exists()
    assert names["report"].evidence.khat < 0.7  # type: ignore[attr-defined]
    assert names["sampling"].num_draws == 200  # type: ignore[attr-defined]


def test_links_lead_somewhere():
    root = Path(__file__).parent.parent
    targets = re.findall(r"\]\(([^)#]+)", README)
    missing = [target for target in targets if "://" not in target and not (root / target).exists()]
    assert not missing


@pytest.mark.parametrize("name", ["Influence", "Transport", "Reweight", "Finetune", "Retrain", "Refused", "Data"])
def test_what_the_readme_names_exists(name):
    assert f"`{name}" in README or name in BLOCKS[0]
    assert name in pyro_forget.__all__ and hasattr(pyro_forget, name)


def test_every_folder_is_in_the_layout():
    root = Path(__file__).parent.parent
    layout = README[README.index("## Layout") :]
    rooms = {path.stem for path in (root / "pyro_forget").iterdir() if (path / "__init__.py").exists()}
    assert not [name for name in rooms & {"data", "energy", "export", "page", "cli"} if f"`{name}`" not in layout]
    assert all(f"`{name}/`" in layout for name in ("pyro_forget", "models", "guides", "experiments", "tests", "docs"))
