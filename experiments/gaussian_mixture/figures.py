"""What all finished cells show: centres over the points, and log predictive densities request by request."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse

from experiments.canvas import FLOOR, OURS, REFIT, RIVAL, figure, save
from experiments.front import finished_cells
from experiments.gaussian_mixture.settings import Settings
from pyro_forget.store import atomic_write

COLOURS = {"default": OURS, "published": RIVAL}
Cell = tuple[dict[str, Any], dict[str, Any]]


def summarise(out: Path) -> None:
    """OUT/gaussian_mixture/*.png and .svg, one figure a fit and seed, and a table of all cells."""
    cells = [cell for cell in finished_cells(out) if cell[0]["experiment"] == "gaussian_mixture"]
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        settings = cell[0]["settings"]
        groups.setdefault(f"{settings['data']}-{settings['fit']}-seed{cell[0]['seed']}", []).append(cell)
    for name, group in groups.items():
        _draw(out / "gaussian_mixture" / name, group)
    if cells:
        atomic_write(
            out / "gaussian_mixture" / "table.md", lambda path: path.write_text(table(cells), encoding="utf-8")
        )


def table(cells: Sequence[Cell]) -> str:
    """A row a cell, as Markdown."""
    lines = ["| data | fit | method | seed | remaining | floor | s | ms a point |", "|---|---|---|--:|--:|--:|--:|--:|"]
    for about, found in cells:
        settings = about["settings"]
        names = [settings["data"], settings["fit"], settings["method"], str(about["seed"])]
        values = [found["remaining"], found["floor"], found["seconds"], 1e3 * found["seconds_per_point"]]
        lines.append("| " + " | ".join([*names, *(f"{value:.2g}" for value in values)]) + " |")
    return "\n".join(lines) + "\n"


def _draw(path: Path, cells: Sequence[Cell]) -> None:
    made, axes = figure(2, 11.0, 5.0, ratios=(1.2, 1.0))
    _centres(axes[0], cells)
    _densities(axes[1], cells)
    save(made, path)


def _centres(axis: Axes, cells: Sequence[Cell]) -> None:
    about, found = cells[0]
    task = Settings(**about["settings"]).task(about["seed"])
    for ids, marker, label in ((task.retained, ".", "retained points"), (task.erased, "x", "erased points")):
        own = task.points[ids].numpy()
        axis.scatter(
            own[:, 0], own[:, 1], s=8, c="#bbbbbb" if marker == "." else "#e8b49a", marker=marker, lw=0.6, label=label
        )
    _posterior(axis, found["centres"]["before"], FLOOR, "before", "o")
    _posterior(axis, found["centres"]["refit"], REFIT, "refit without them", "D")
    for about, found in cells:
        method = about["settings"]["method"]
        path = np.array(found["path"])
        for number in range(path.shape[1]):
            axis.plot(*path[:, number].T, "-", color=COLOURS[method], linewidth=1)
        _posterior(axis, found["centres"]["after"], COLOURS[method], f"after, {method}", "*")
    axis.set_aspect("equal")
    axis.legend(fontsize=7, loc="best")


def _posterior(axis: Axes, centres: dict[str, Any], colour: str, label: str, marker: str) -> None:
    """Centres, and ellipses of two posterior standard deviations."""
    loc, std = np.array(centres["loc"]), np.array(centres["std"])
    axis.scatter(*loc.T, s=45, c=colour, marker=marker, label=label, zorder=3, edgecolors="white", linewidths=0.5)
    for place, width in zip(loc, std, strict=True):
        axis.add_patch(Ellipse(tuple(place), *(4 * width), fill=False, color=colour, linewidth=0.8))


def _densities(axis: Axes, cells: Sequence[Cell]) -> None:
    for about, found in cells:
        settings = about["settings"]
        steps = [found["density"]["before"], *found["requests"]]
        erased = [min(settings["num_erased"], number * settings["chunk"]) for number in range(len(steps))]
        for part, style in (("erased", "o-"), ("retained", "s--")):
            values = [step[part] for step in steps]
            axis.plot(
                erased,
                values,
                style,
                color=COLOURS[settings["method"]],
                markersize=3,
                label=f"{part}, {settings['method']}",
            )
    for part, style in (("erased", "-"), ("retained", "--")):
        axis.axhline(
            cells[0][1]["density"]["refit"][part], color=REFIT, linestyle=style, linewidth=1, label=f"{part}, refit"
        )
    axis.set_xlabel("erased points")
    axis.set_ylabel("mean log predictive density, nats")
    axis.legend(fontsize=7)
