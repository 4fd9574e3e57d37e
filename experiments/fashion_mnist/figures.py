"""What all finished cells show: errors, gaps to the refits and seconds by number of erased, and gaps by seconds."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import typer
from matplotlib.axes import Axes

from experiments.canvas import FLOOR, OURS, REFIT, RIVAL, SECOND, THIRD, figure, save
from experiments.fashion_mnist.compare import METHODS, NUM_REFITS, PARTS, Row, by, compared, finished, table
from pyro_forget.store import atomic_write

COLOURS = dict(zip(METHODS, (FLOOR, OURS, RIVAL, SECOND, THIRD, REFIT), strict=True))

# Methods whose gap is also drawn as a line across, to compare the others with.
LEVEL = {"before": ("nothing done", "--"), "retrain": ("another refit (floor)", "-")}


def summarise(out: Path) -> None:
    """Of the groups that have been refitted three times, a table and two figures.

    OUT/fashion_mnist/table.md, GROUP.png and GROUP-seconds.png, both also as .svg.
    """
    rows = [row for group in by(finished(out), lambda cell: cell.group).values() for row in compared(group)]
    for name, group in by(rows, lambda row: row.group).items():
        _draw(out / "fashion_mnist" / name, group)
        _draw_seconds(out / "fashion_mnist" / f"{name}-seconds", group)
    if not rows:
        typer.echo(f"No table yet: every number of erased images needs {NUM_REFITS} cells of --method retrain.")
    else:
        path = out / "fashion_mnist" / "table.md"
        atomic_write(path, lambda beside: beside.write_text(table(rows), encoding="utf-8"))


def _draw(path: Path, rows: Sequence[Row]) -> None:
    made, axes = figure(4, 15.0, 7.6, rows=2)
    for axis, part in zip(axes[:3], PARTS, strict=True):
        _lines(axis, rows, f"error_{part}", f"error, {part}, %", 100)
    _lines(axes[3], rows, "neighbour_kl", "kNN KL from a refit, log odds of 10 images, nats")
    for axis, part in zip(axes[4:7], PARTS, strict=True):
        _lines(axis, rows, f"kl_{part}", f"KL from the refits' mean, {part}, nats")
    _lines(axes[7], rows, "seconds", "seconds")
    for axis in axes[4:]:
        axis.set_yscale("log", nonpositive="mask")
    handles, labels = axes[4].get_legend_handles_labels()
    made.legend(handles, labels, frameon=False, ncols=len(labels), loc="outside lower center", fontsize=8)
    made.suptitle(rows[0].group)
    save(made, path)


def _lines(axis: Axes, rows: Sequence[Row], value: str, label: str, factor: float = 1.0) -> None:
    """A line a method; of one with several budgets, the largest."""
    for method, colour in COLOURS.items():
        most = {row.num_erased: row for row in rows if row.method == method}
        own = [(count, found) for count, row in most.items() if (found := row.values[value]) is not None]
        if own:
            name = "another refit (floor)" if method == "retrain" else method
            axis.plot([count for count, _ in own], [factor * v for _, v in own], "o-", color=colour, label=name)
    axis.set_xlabel("erased images of class 0")
    axis.set_title(label, fontsize=9)


def _draw_seconds(path: Path, rows: Sequence[Row]) -> None:
    """Gap against seconds: a panel for each part (rows) and number of erased images (columns)."""
    counts = by(rows, lambda row: row.num_erased)
    made, axes = figure(len(counts), 1.5 + 3.4 * len(counts), 8.4, rows=len(PARTS))
    panels = itertools.product(PARTS, counts.items())
    for place, (axis, (part, (count, own))) in enumerate(zip(axes, panels, strict=True)):
        _against_seconds(axis, own, f"kl_{part}")
        axis.set_title(f"{count} erased, on {part} images", fontsize=9)
        axis.set_xlabel("seconds of the request" if place >= len(axes) - len(counts) else "")
        axis.set_ylabel("" if place % len(counts) else "KL from the refits' mean, nats")
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    columns = min(4, len(found))
    made.legend(found.values(), found.keys(), frameon=False, ncols=columns, loc="outside lower center", fontsize=8)
    made.suptitle(rows[0].group)
    save(made, path)


def _against_seconds(axis: Axes, rows: Sequence[Row], value: str) -> None:
    for method, own in by(rows, lambda row: row.method).items():
        places = [(row.values["seconds"] or 0.0, row.values[value] or 0.0) for row in own]
        if method in LEVEL:
            label, style = LEVEL[method]
            axis.axhline(places[0][1], color=COLOURS[method], linestyle=style, linewidth=1, label=label)
        if method != "before":
            axis.plot(*zip(*sorted(places), strict=True), "o-", color=COLOURS[method], markersize=4, label=method)
    axis.set_xscale("log", nonpositive="mask")
    axis.set_yscale("log", nonpositive="mask")
