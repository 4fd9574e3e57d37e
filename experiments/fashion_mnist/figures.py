"""What all finished cells show: errors, gaps to the mean of the refits, and seconds, by number of erased images."""

from collections.abc import Sequence
from pathlib import Path

import typer
from matplotlib.axes import Axes

from experiments.canvas import FLOOR, OURS, REFIT, RIVAL, SECOND, figure, save
from experiments.fashion_mnist.compare import METHODS, NUM_REFITS, PARTS, Row, by, compared, finished, table
from pyro_forget.store import atomic_write

COLOURS = dict(zip(METHODS, (FLOOR, OURS, RIVAL, SECOND, REFIT), strict=True))


def summarise(out: Path) -> None:
    """OUT/fashion_mnist/GROUP.png and .svg, and table.md, of the groups that have been refitted three times."""
    rows = [row for group in by(finished(out), lambda cell: cell.group).values() for row in compared(group)]
    for name, group in by(rows, lambda row: row.group).items():
        _draw(out / "fashion_mnist" / name, group)
    if not rows:
        typer.echo(f"No table yet: every number of erased images needs {NUM_REFITS} cells of --method retrain.")
    else:
        path = out / "fashion_mnist" / "table.md"
        atomic_write(path, lambda beside: beside.write_text(table(rows), encoding="utf-8"))


def _draw(path: Path, rows: Sequence[Row]) -> None:
    made, axes = figure(4, 15.0, 7.6, rows=2)
    for axis, part in zip(axes[:3], PARTS, strict=True):
        _lines(axis, rows, f"error_{part}", f"error, {part}, %", 100)
    _lines(axes[3], rows, "neighbour_kl", "kNN KL from a refit's draws, log odds of ten images, nats")
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
    for method, colour in COLOURS.items():
        own = [
            (row.num_erased, found) for row in rows if row.method == method and (found := row.values[value]) is not None
        ]
        if own:
            name = "another refit (floor)" if method == "retrain" else method
            axis.plot([count for count, _ in own], [factor * v for _, v in own], "o-", color=colour, label=name)
    axis.set_xlabel("erased images of class 0")
    axis.set_title(label, fontsize=9)
