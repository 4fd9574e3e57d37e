"""The command line of the experiments, with a toy."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from typer.testing import CliRunner

from experiments.front import Experiment, command, finished_cells


@dataclass(frozen=True)
class Settings:
    data: str = "digits"
    fit: Literal["svi", "sgld"] = "svi"
    method: str = "default"
    num_steps: int = field(default=10, metadata={"help": "Steps of the fit."})
    step_size: float = 0.1
    warm: bool = False
    cap: int | None = None

    def __post_init__(self) -> None:
        if self.step_size <= 0:
            raise ValueError(f"step_size is {self.step_size}: give a positive number")


PRESETS = {"small": Settings(), "published": Settings(num_steps=1000, step_size=0.01)}


class Toy:
    """An experiment, and the cells that it ran."""

    def __init__(self, out: Path):
        self.out = out
        self.ran: list[tuple[Settings, int, str, Path]] = []
        self.result: dict[str, object] = {"score": 1.5}
        self.fail_at = math.inf
        self.app = command(Experiment("toy", PRESETS, self.run))

    def run(self, settings: Settings, seed: int, device: str, folder: Path) -> dict[str, object]:
        """Score a toy."""
        if len(self.ran) >= self.fail_at:
            raise RuntimeError("the power went")
        self.ran.append((settings, seed, device, folder))
        return self.result | {"seed": seed}

    def __call__(self, *arguments: str):
        result = CliRunner().invoke(self.app, ["--out", str(self.out), *arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    @property
    def settings(self) -> list[Settings]:
        return [settings for settings, *_ in self.ran]


@pytest.fixture
def toy(tmp_path):
    return Toy(tmp_path / "runs")


def flat(text: str) -> str:
    """Words of an error box, without its borders."""
    return " ".join(text.replace("│", " ").split())


def test_a_cell_and_its_files(toy):
    assert toy().exit_code == 0
    folder = toy.out / "toy" / "digits" / "svi" / "default" / "small-seed0"
    assert toy.ran == [(Settings(), 0, "cpu", folder)]
    assert json.loads((folder / "result.json").read_text()) == {"score": 1.5, "seed": 0}
    description = json.loads((folder / "settings.json").read_text())
    assert description["settings"] == asdict(Settings())
    assert description["experiment"] == "toy" and description["preset"] == "small" and description["seed"] == 0
    assert sorted(path.name for path in folder.iterdir()) == ["result.json", "settings.json"]


def test_an_option_overrides_the_preset_and_leaves_the_rest(toy):
    toy("--preset", "published", "--step-size", "0.5", "--warm", "true", "--cap", "7")
    assert toy.settings == [Settings(num_steps=1000, step_size=0.5, warm=True, cap=7)]


def test_none_is_a_value(toy):
    toy("--cap", "none,3")
    assert [settings.cap for settings in toy.settings] == [None, 3]


def test_comma_lists_run_the_product(toy):
    toy("--fit", "svi,sgld", "--num-steps", "1,2,3", "--seeds", "0,5")
    cells = {(settings.fit, settings.num_steps, seed) for settings, seed, *_ in toy.ran}
    assert cells == {(fit, steps, seed) for fit in ("svi", "sgld") for steps in (1, 2, 3) for seed in (0, 5)}
    assert len(toy.ran) == 12 == len({folder for *_, folder in toy.ran})


def test_a_level_names_its_folder_alone(toy):
    """Only what no folder says goes into the digest."""
    toy("--fit", "sgld", "--method", "refit")
    assert toy.ran[0][-1] == toy.out / "toy" / "digits" / "sgld" / "refit" / "small-seed0"


def test_values_that_are_given_but_are_the_presets_name_the_same_cell(toy):
    toy("--num-steps", "10")
    assert toy.ran[0][-1].name == "small-seed0"


def test_resume_skips_what_has_finished(toy):
    toy.fail_at = 2
    with pytest.raises(RuntimeError, match="the power went"):
        toy("--seeds", "0,1,2")
    toy.fail_at = math.inf
    output = toy("--seeds", "0,1,2,3", "--resume").output
    assert [seed for _, seed, *_ in toy.ran] == [0, 1, 2, 3]
    assert "4 cells, 2 finished before" in output


def test_without_resume_all_run_again(toy):
    toy()
    toy()
    assert len(toy.ran) == 2


def test_a_run_that_dies_leaves_no_older_result(toy):
    toy()
    toy.fail_at = 0
    with pytest.raises(RuntimeError):
        toy()
    assert not (toy.ran[0][-1] / "result.json").exists()


def test_a_result_that_json_cannot_say_leaves_no_file(toy):
    toy.result = {"score": math.nan}
    with pytest.raises(ValueError, match="score cannot be written as JSON"):
        toy()
    assert [path.name for path in toy.ran[0][-1].iterdir()] == ["settings.json"]


def test_resume_refuses_results_of_another_preset_of_the_same_name(toy):
    toy()
    changed = Toy(toy.out)
    changed.app = command(Experiment("toy", {"small": Settings(num_steps=11)}, changed.run))
    result = changed("--seeds", "1,0", "--resume")
    assert result.exit_code == 2 and "holds results of another settings" in flat(result.output)
    assert changed.ran == []


def test_finished_cells(toy):
    toy("--seeds", "1,0")
    toy.fail_at = 2
    with pytest.raises(RuntimeError):
        toy("--seeds", "2")
    found = list(finished_cells(toy.out))
    assert [result["seed"] for _, result in found] == [0, 1]
    assert all(about["settings"] == asdict(Settings()) for about, _ in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-steps", "many"], "Invalid value for '--num-steps': 'many' is none of int"),
        (["--num-steps", "1,,2"], "'' is none of int"),
        (["--step-size", "nan"], "'nan' is none of float"),
        (["--step-size", "0.1,x"], "Invalid value for '--step-size': 'x' is none of float"),
        (["--fit", "hmc"], "'hmc' is none of svi|sgld"),
        (["--warm", "perhaps"], "'perhaps' is none of bool"),
        (["--cap", "few"], "'few' is none of int|none"),
        (["--seeds", "0,1,0"], "0 stands twice"),
        (["--step-size", "-1"], "step_size is -1.0: give a positive number"),
        (["--preset", "large"], "Invalid value for '--preset'"),
        (["--device", "cuda:99"], "device 'cuda:99' is not there"),
        (["--device", "abacus"], "device 'abacus' is not there"),
        (["--data", "../elsewhere"], "data is '../elsewhere', which cannot name a folder"),
        (["--speed", "3"], "No such option: --speed"),
    ],
)
def test_a_bad_value_is_explained_before_anything_runs(toy, arguments, message):
    result = toy(*arguments)
    assert result.exit_code == 2
    assert message in flat(result.output)
    assert toy.ran == [] and not toy.out.exists()


def test_help_shows_types_and_what_options_are_for(toy, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    output = flat(toy("--help").output)
    assert "Score a toy." in output and "Steps of the fit." in output
    assert "--num-steps" in output and "svi|sgld" in output and "small|published" in output


def test_settings_without_folders_are_refused():
    @dataclass(frozen=True)
    class Bare:
        method: str = "default"

    with pytest.raises(ValueError, match=r"lack the fields \['data', 'fit'\]"):
        Experiment("bare", {"small": Bare()}, lambda *_: {})


def test_a_setting_that_hides_a_common_option_is_refused():
    @dataclass(frozen=True)
    class Greedy(Settings):
        device: str = "cpu"

    with pytest.raises(ValueError, match=r"repeat the options \['device'\]"):
        Experiment("greedy", {"small": Greedy()}, lambda *_: {})


def test_a_setting_without_words_is_refused():
    @dataclass(frozen=True)
    class Listed(Settings):
        sizes: tuple[int, ...] = (1, 2)

    with pytest.raises(TypeError, match=r"The setting sizes has type tuple\[int, \.\.\.\]"):
        Experiment("listed", {"small": Listed()}, lambda *_: {})
