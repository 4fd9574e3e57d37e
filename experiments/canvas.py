"""What all figures share: a canvas without global state, colours that survive greyscale, and files."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by readers who do not see red and green.
OURS, RIVAL, SECOND, REFIT, FLOOR = "#0072B2", "#D55E00", "#CC79A7", "#009E73", "#666666"
THIRD = "#E69F00"


def figure(
    columns: int, width: float = 7.0, height: float = 4.2, ratios: Sequence[float] | None = None, rows: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row after row, not known to pyplot; inches, and the columns' relative widths."""
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(rows, columns, squeeze=False, width_ratios=ratios).flatten()
    for axis in axes:
        axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return made, list(axes)


def save(made: Figure, path: Path) -> None:
    """PATH.png and PATH.svg, the same bytes for the same values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        made.savefig(path.with_name(f"{path.name}.png"), dpi=150, metadata={"Software": None})
        made.savefig(path.with_name(f"{path.name}.svg"), metadata={"Date": None, "Creator": None})
