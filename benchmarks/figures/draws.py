"""Distance to chains run again, by number of erased rows, from the records of `benchmarks.draws`."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from matplotlib.axes import Axes

from benchmarks.figures.canvas import FLOOR, OURS, RIVAL, SECOND, figure, save

Record = dict[str, Any]
STYLES = {"transport": (OURS, "o-"), "common shift": (RIVAL, "s-"), "weights alone (PSIS)": (SECOND, "^-")}


def draw(records: Sequence[Record]) -> None:
    """docs/figures/draws.png and .svg."""
    sizes = sorted({record["draws"] for record in records}, reverse=True)
    made, axes = figure(len(sizes), 8.5, 3.8)
    for axis, size in zip(axes, sizes, strict=True):
        _panel(axis, [record for record in records if record["draws"] == size])
        axis.set_title(f"{size:,} draws", fontsize=9)
    axes[0].set_ylabel("KL to chains run again, nats")
    axes[-1].legend(fontsize=7, frameon=False)
    save(made, "draws")


def _panel(axis: Axes, records: Sequence[Record]) -> None:
    erased = sorted({record["erased"] for record in records})
    for method, (colour, style) in STYLES.items():
        own = [record for record in records if record["method"] == method]
        axis.plot(erased, [_median(own, n, "after") for n in erased], style, color=colour, markersize=4, label=method)
    axis.plot(erased, [_median(records, n, "before") for n in erased], ":", color=FLOOR, label="nothing done")
    axis.plot(erased, [_median(records, n, "floor") for n in erased], "--", color=FLOOR, label="floor: other chains")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(erased, [str(n) for n in erased])
    axis.minorticks_off()
    axis.set_xlabel("worst rows erased, of 300")


def _median(records: Sequence[Record], erased: int, value: str) -> float:
    return median(record[value] for record in records if record["erased"] == erased)
