"""What the figures share: a canvas without global state, colours that survive greyscale, and files."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent.parent.parent / "docs" / "figures"
# Okabe and Ito's colours, told apart by readers who do not see red and green.
OURS, RIVAL, SECOND, REFIT, FLOOR = "#0072B2", "#D55E00", "#CC79A7", "#009E73", "#666666"


def figure(columns: int, width: float = 7.0, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    """A figure of one row of axes, not known to pyplot."""
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return made, list(axes)


def save(made: Figure, name: str) -> None:
    """NAME.png and NAME.svg, the same bytes for the same values."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": name}):
        made.savefig(FOLDER / f"{name}.png", dpi=150, metadata={"Software": None})
        made.savefig(FOLDER / f"{name}.svg", metadata={"Date": None, "Creator": None})
