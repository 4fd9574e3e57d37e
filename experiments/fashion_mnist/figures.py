"""What all finished cells show: errors, gaps to the mean of the refits, and seconds, by number of erased images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from experiments.canvas import FLOOR, OURS, REFIT, RIVAL, SECOND, figure, save
from experiments.front import LEVELS
from pyro_forget.evaluation import mean_log_probs, predictive_kl, predictive_l1
from pyro_forget.store import atomic_write, load_json, load_tensors

COLOURS = {"before": FLOOR, "default": OURS, "published": RIVAL, "finetune": SECOND, "retrain": REFIT}
PARTS = ("erased", "retained", "test")


@dataclass(frozen=True)
class Cell:
    """A finished cell, with its mean log probabilities by part."""

    settings: dict[str, Any]
    seed: int
    result: dict[str, Any]
    predictions: dict[str, Tensor]

    @property
    def group(self) -> str:
        """Cells of one group share data, network and fit."""
        return "-".join(self.settings[name] for name in ("data", "net", "fit"))


@dataclass(frozen=True)
class Row:
    """One method at one number of erased images, medians over its seeds."""

    group: str
    num_erased: int
    method: str
    values: dict[str, float]


def summarise(out: Path) -> None:
    """OUT/fashion_mnist/GROUP.png and .svg, and table.md, of the groups that have been refitted."""
    rows = [row for group in _by(_cells(out), lambda cell: cell.group).values() for row in compared(group)]
    for name, group in _by(rows, lambda row: row.group).items():
        _draw(out / "fashion_mnist" / name, group)
    if rows:
        path = out / "fashion_mnist" / "table.md"
        atomic_write(path, lambda beside: beside.write_text(table(rows), encoding="utf-8"))


def compared(cells: Sequence[Cell]) -> list[Row]:
    """Every method beside the mean of the refits; a refit beside the mean of the others."""
    rows = []
    for count, own in sorted(_by(cells, lambda cell: cell.settings["num_erased"]).items()):
        refits = [cell for cell in own if cell.settings["method"] == "retrain"]
        if len(refits) < 2:
            continue
        for method in COLOURS:
            found = [
                _values(cell, [refit for refit in refits if refit is not cell])
                for cell in own
                if cell.settings["method"] == method
            ]
            if found:
                values = {name: median(value[name] for value in found) for name in found[0]}
                rows.append(Row(own[0].group, count, method, values))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown; errors in %, gaps in 1e-4 nats."""
    head = ["fit", "erased", "method", "s", *(f"error {part}" for part in PARTS), *(f"KL {part}" for part in PARTS)]
    lines = ["| " + " | ".join([*head, "L1 test", "attack"]) + " |", "|---|--:|---|" + "--:|" * (len(head) - 1)]
    for row in rows:
        value = row.values
        cells = [f"{value['seconds']:.2g}", *(f"{100 * value[f'error_{part}']:.1f}" for part in PARTS)]
        cells += [f"{1e4 * value[f'kl_{part}']:.0f}" for part in PARTS]
        cells += [f"{value['l1_test']:.3f}", f"{value['attack']:.2f}"]
        lines.append("| " + " | ".join([row.group, str(row.num_erased), row.method, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _cells(out: Path) -> list[Cell]:
    found = []
    for path in sorted(out.glob(f"{'*/' * (len(LEVELS) + 1)}result.json")):
        about = load_json(path.with_name("settings.json"))
        if about["experiment"] == "fashion_mnist":
            predictions, _ = load_tensors(path.with_name("predictions.safetensors"))
            found.append(Cell(about["settings"], about["seed"], load_json(path), predictions))
    return found


def _values(cell: Cell, refits: Sequence[Cell]) -> dict[str, float]:
    values = {"seconds": float(cell.result.get("seconds", 0.0)), "attack": cell.result["attack"]["erased_as_strangers"]}
    for part in PARTS:
        target = mean_log_probs(torch.stack([refit.predictions[part] for refit in refits]))[None]
        own = cell.predictions[part][None]
        values[f"error_{part}"] = cell.result[f"error_{part}"]
        values[f"kl_{part}"] = float(predictive_kl(target, own))
        values[f"l1_{part}"] = float(predictive_l1(target, own))
    return values


def _draw(path: Path, rows: Sequence[Row]) -> None:
    made, axes = figure(4, 15.0, 4.2)
    for axis, part in zip(axes, PARTS, strict=False):
        _lines(axis, rows, f"kl_{part}", f"KL from the refits' mean, {part}, nats")
        axis.set_yscale("log")
    _lines(axes[3], rows, "seconds", "seconds")
    axes[3].set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    made.legend(handles, labels, frameon=False, ncols=len(labels), loc="outside lower center", fontsize=8)
    made.suptitle(rows[0].group)
    save(made, path)


def _lines(axis: Axes, rows: Sequence[Row], value: str, label: str) -> None:
    for method, colour in COLOURS.items():
        own = [row for row in rows if row.method == method and row.values[value] > 0]
        if own:
            name = "another refit (floor)" if method == "retrain" and value != "seconds" else method
            axis.plot(
                [row.num_erased for row in own], [row.values[value] for row in own], "o-", color=colour, label=name
            )
    axis.set_xlabel("erased images of class 0")
    axis.set_title(label, fontsize=9)


def _by(items: Any, key: Any) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found
