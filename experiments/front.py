"""The command line that all experiments share.

An experiment is a frozen dataclass of settings, presets of it, and a function that runs one cell. `command` turns
them into a typer app: every setting is an option of its type that overrides the preset, a comma list runs the
product, and each cell leaves its own folder OUT/task/data/fit/method/PRESET-seedN with `settings.json`, and
`result.json` once it has finished.
"""

import inspect
import itertools
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar, get_type_hints

import torch
import typer

import pyro_forget
from experiments.words import check_type, describe, list_of
from pyro_forget.store import digest, load_json, save_json

LEVELS = ("task", "data", "fit", "method")
COMMON = {"preset", "seeds", "device", "out", "resume"}


class Dataclass(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Settings = TypeVar("Settings", bound=Dataclass)


@dataclass(frozen=True)
class Experiment(Generic[Settings]):
    """What an experiment declares.

    Attributes:
        name: its name, and the task of settings that name none.
        presets: settings by name; the first is the default. Their class has the fields `data`, `fit` and `method`,
            which name folders. `field(metadata={"help": ...})` says what an option is for.
        run: (settings, seed, device, cell's folder) to results of JSON types. It may keep files in the folder.
        summarise: draws what all finished cells under OUT show, after every command.
    """

    name: str
    presets: dict[str, Settings]
    run: Callable[[Settings, int, str, Path], dict[str, Any]]
    summarise: Callable[[Path], None] | None = None

    def __post_init__(self) -> None:
        """Find what would otherwise only fail hours into a run."""
        if not self.presets:
            raise ValueError(f"{self.name} has no presets: name at least one.")
        missing = {"data", "fit", "method"} - self.types.keys()
        if missing:
            raise ValueError(f"The settings of {self.name} lack the fields {sorted(missing)}, which name its folders.")
        taken = COMMON & self.types.keys()
        if taken:
            raise ValueError(f"The settings of {self.name} repeat the options {sorted(taken)}: give them other names.")
        for field, kind in self.types.items():
            check_type(field, kind)

    @property
    def types(self) -> dict[str, Any]:
        """The type of each setting."""
        kind = type(next(iter(self.presets.values())))
        hints = get_type_hints(kind)
        return {field.name: hints[field.name] for field in fields(kind)}


@dataclass(frozen=True)
class Cell(Generic[Settings]):
    """One run of an experiment: settings, seed, and the folder of its files."""

    experiment: Experiment[Settings]
    preset: str
    settings: Settings
    seed: int
    device: str
    out: Path

    @property
    def folder(self) -> Path:
        """OUT/task/data/fit/method/PRESET-seedN, with eight digits of a digest where other settings are overridden."""
        values = {"task": self.experiment.name} | asdict(self.settings)
        levels = [_folder_name(level, str(values[level])) for level in LEVELS]
        preset = replace(self.experiment.presets[self.preset], **{name: values[name] for name in self._level_fields()})
        overridden = "" if self.settings == preset else f"-{digest({}, _plain(values))[:8]}"
        return self.out.joinpath(*levels, f"{self.preset}-seed{self.seed}{overridden}")

    @property
    def result(self) -> Path:
        """The file that says that the cell has finished."""
        return self.folder / "result.json"

    def run(self) -> None:
        """Run and keep the results; an older result goes first, so that a run that dies leaves none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.result.unlink(missing_ok=True)
        save_json(self.folder / "settings.json", self.description() | {"environment": _environment()})
        results = self.experiment.run(self.settings, self.seed, self.device, self.folder)
        save_json(self.result, results)

    def finished(self) -> bool:
        """Whether the results are there.

        Raises:
            typer.BadParameter: they are those of other settings, since the preset was changed in between.
        """
        if not self.result.exists():
            return False
        found = load_json(self.folder / "settings.json")
        wanted = self.description()
        changed = [key for key, value in wanted.items() if key != "device" and found.get(key) != value]
        if changed:
            raise typer.BadParameter(
                f"{self.folder} holds results of another {' and '.join(changed)}: {[found.get(key) for key in changed]}"
                f", not {[wanted[key] for key in changed]}. Give another --out, or leave out --resume to run it again."
            )
        return True

    def description(self) -> dict[str, Any]:
        """All that the results depend on, as JSON."""
        settings = _plain(asdict(self.settings))
        about = {"experiment": self.experiment.name, "preset": self.preset, "settings": settings}
        return about | {"seed": self.seed, "device": self.device}

    def _level_fields(self) -> list[str]:
        return [level for level in LEVELS if level in self.experiment.types]


def command(experiment: Experiment[Settings]) -> typer.Typer:
    """The typer app of an experiment, which its script calls when it is run."""

    def main(preset: str, seeds: list[int], device: str, out: Path, resume: bool, **options: list[Any] | None) -> None:
        overrides = {name: values for name, values in options.items() if values is not None}
        cells = _plan(experiment, preset, overrides, seeds, _device(device), out)
        finished = [cell for cell in cells if resume and cell.finished()]
        typer.echo(f"{len(cells)} cells, {len(finished)} finished before")
        _run_all([cell for cell in cells if cell not in finished])
        if experiment.summarise is not None:
            experiment.summarise(out)

    parameters = [*_common_options(experiment), *_setting_options(experiment)]
    main.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    main.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    main.__doc__ = inspect.getdoc(experiment.run)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name=experiment.name)(main)
    return app


def finished_cells(out: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(description, results) of every finished cell under OUT, in the order of their folders."""
    for result in sorted(out.glob(f"{'*/' * (len(LEVELS) + 1)}result.json")):
        yield load_json(result.with_name("settings.json")), load_json(result)


def _plan(
    experiment: Experiment[Settings],
    preset: str,
    overrides: dict[str, list[Any]],
    seeds: list[int],
    device: str,
    out: Path,
) -> list[Cell[Settings]]:
    """The product of all comma lists; every folder is named before the first cell runs."""
    cells = []
    for values in itertools.product(*overrides.values()):
        chosen = dict(zip(overrides, values, strict=True))
        try:
            settings = replace(experiment.presets[preset], **chosen)
        except ValueError as error:  # what the settings themselves refuse
            raise typer.BadParameter(f"{chosen}: {error}") from error
        cells += [Cell(experiment, preset, settings, seed, device, out) for seed in seeds]
    for cell in cells:
        _ = cell.folder
    return cells


def _run_all(cells: list[Cell[Settings]]) -> None:
    for count, cell in enumerate(cells, start=1):
        start = time.perf_counter()
        typer.echo(f"[{count}/{len(cells)}] {cell.folder} ...")
        cell.run()
        typer.echo(f"[{count}/{len(cells)}] {time.perf_counter() - start:.1f} s")


def _common_options(experiment: Experiment[Settings]) -> Iterator[inspect.Parameter]:
    presets = list(experiment.presets)
    choice = Literal[tuple(presets)]  # type: ignore[valid-type]
    yield _option("preset", choice, typer.Option(presets[0], help="Published or small settings to start from."))
    seeds = typer.Option("0", parser=list_of("seeds", int), metavar="INT,...", help="A run for each.")
    yield _option("seeds", list, seeds)
    yield _option("device", str, typer.Option("cpu", help="A torch device, such as cuda:0."))
    yield _option("out", Path, typer.Option(Path("runs"), help="Folder of the results."))
    yield _option("resume", bool, typer.Option(False, "--resume", help="Skip the cells that have finished."))


def _setting_options(experiment: Experiment[Settings]) -> Iterator[inspect.Parameter]:
    preset = next(iter(experiment.presets.values()))
    for field in fields(preset):
        kind = experiment.types[field.name]
        option = typer.Option(
            None,
            f"--{field.name.replace('_', '-')}",
            parser=list_of(field.name, kind),
            metavar=f"{describe(kind)},...",
            help=field.metadata.get("help"),
            show_default="that of the preset",
        )
        yield _option(field.name, list, option)


def _option(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


def _device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"device {name!r} is not there: {reason} Use cpu, cuda or cuda:N.") from error
    return name


def _folder_name(level: str, value: str) -> str:
    if value in ("", ".", "..") or set(value) & set('/\\:*?"<>|'):
        raise typer.BadParameter(f"{level} is {value!r}, which cannot name a folder: use letters, digits, - and _.")
    return value


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}


def _environment() -> dict[str, str]:
    versions = {"pyro_forget": pyro_forget.__version__, "torch": torch.__version__}
    return versions | {"python": platform.python_version(), "machine": platform.machine()}
