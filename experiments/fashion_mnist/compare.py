"""Finished cells beside their refits, and the table of that."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, TypeVar

import torch
from torch import Tensor

from experiments.front import LEVELS
from pyro_forget.evaluation import mean_log_probs, neighbour_kl, predictive_kl, predictive_l1
from pyro_forget.store import load_json, load_tensors

METHODS = ("before", "default", "published", "finetune", "sampler", "retrain")
BUDGETS = {"finetune": "finetune_steps", "sampler": "sampler_steps"}  # settings that such a method is run at several of
PARTS = ("erased", "retained", "test")
NUM_REFITS = 3  # fewer give no floor worth the name

Item = TypeVar("Item")
Key = TypeVar("Key")
Values = dict[str, float | None]


@dataclass(frozen=True)
class Cell:
    """A finished cell, with its mean log probabilities by part, and its draws as functions in `log_odds`."""

    settings: dict[str, Any]
    seed: int
    result: dict[str, Any]
    predictions: dict[str, Tensor]

    @property
    def group(self) -> str:
        """Cells of one group share data, network and fit."""
        return "-".join(self.settings[name] for name in ("data", "net", "fit"))

    @property
    def budget(self) -> int:
        """Steps of a method that has a row for each number of them; 0 for the others."""
        name = BUDGETS.get(self.settings["method"])
        return 0 if name is None else int(self.settings[name])


@dataclass(frozen=True)
class Row:
    """One method at one budget and number of erased images, medians over its seeds; None where it has no such value."""

    group: str
    num_erased: int
    method: str
    budget: int
    values: Values

    @property
    def name(self) -> str:
        """The method, with its steps where it is run at several numbers of them."""
        return f"{self.method}, {self.budget} steps" if self.budget else self.method


def finished(out: Path) -> list[Cell]:
    """The cells of this study under OUT."""
    found = []
    for path in sorted(out.glob(f"{'*/' * (len(LEVELS) + 1)}result.json")):
        about = load_json(path.with_name("settings.json"))
        if about["experiment"] == "fashion_mnist":
            predictions, _ = load_tensors(path.with_name("predictions.safetensors"))
            found.append(Cell(about["settings"], about["seed"], load_json(path), predictions))
    return found


def compared(cells: Sequence[Cell]) -> list[Row]:
    """Every method beside the mean of the refits; a refit beside the mean of the others. Nothing without three."""
    rows = []
    for count, own in sorted(by(cells, lambda cell: cell.settings["num_erased"]).items()):
        refits = [cell for cell in own if cell.settings["method"] == "retrain"]
        if len(refits) < NUM_REFITS:
            continue
        alike = by(own, lambda cell: (METHODS.index(cell.settings["method"]), cell.budget))
        for (place, budget), same in sorted(alike.items(), key=lambda pair: pair[0]):
            found = [_values(cell, [refit for refit in refits if refit is not cell]) for cell in same]
            rows.append(Row(own[0].group, count, METHODS[place], budget, _medians(found)))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown; errors in %, gaps in 1e-4 nats.

    *kNN KL* is the nearest-neighbour estimate of the divergence of the draws from a refit's, nats, of their log odds on
    ten images.
    """
    head = ["fit", "erased", "method", "s", "products", *(f"error {part}" for part in PARTS)]
    head += [*(f"KL {part}" for part in PARTS), "kNN KL", "L1 test", "attack"]
    lines = ["| " + " | ".join(head) + " |", "|---|--:|---|" + "--:|" * (len(head) - 3)]
    for row in rows:
        value = row.values
        cells = [_cell(value["seconds"], ".2g"), _cell(value["products"], ".0f")]
        cells += [_cell(value[f"error_{part}"], ".1f", 100) for part in PARTS]
        cells += [_cell(value[f"kl_{part}"], ".0f", 1e4) for part in PARTS]
        cells += [_cell(value["neighbour_kl"], ".0f"), _cell(value["l1_test"], ".3f"), _cell(value["attack"], ".2f")]
        lines.append("| " + " | ".join([row.group, str(row.num_erased), row.name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def by(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Items by a key, in the order in which they come."""
    found: dict[Key, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def _cell(value: float | None, form: str, factor: float = 1.0) -> str:
    return "–" if value is None else format(factor * value, form)


def _medians(found: Sequence[Values]) -> Values:
    columns = {name: [value for each in found if (value := each[name]) is not None] for name in found[0]}
    return {name: median(values) if values else None for name, values in columns.items()}


def _values(cell: Cell, refits: Sequence[Cell]) -> Values:
    values: Values = {
        "seconds": float(cell.result.get("seconds", 0.0)),
        "products": cell.result.get("num_products"),
        "attack": cell.result["attack"]["erased_as_strangers"],
        "neighbour_kl": _between_draws(cell, refits),
    }
    for part in PARTS:
        target = mean_log_probs(torch.stack([refit.predictions[part] for refit in refits]))[None]
        own = cell.predictions[part][None]
        values[f"error_{part}"] = cell.result[f"error_{part}"]
        values[f"kl_{part}"] = float(predictive_kl(target, own))
        values[f"l1_{part}"] = float(predictive_l1(target, own))
    return values


def _between_draws(cell: Cell, refits: Sequence[Cell]) -> float | None:
    """Mean divergence from the draws of each refit; None where a posterior has fewer than two different draws."""
    mine, *theirs = (each.predictions["log_odds"].unique(dim=0) for each in (cell, *refits))
    if min(map(len, (mine, *theirs))) < 2:
        return None
    return mean(float(neighbour_kl(mine, other)) for other in theirs)
