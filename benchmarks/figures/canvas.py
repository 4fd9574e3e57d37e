"""Where the benchmarks' figures go."""

from pathlib import Path

from matplotlib.figure import Figure

from experiments import canvas
from experiments.canvas import FLOOR, OURS, REFIT, RIVAL, SECOND, figure

__all__ = ["FLOOR", "FOLDER", "OURS", "REFIT", "RIVAL", "SECOND", "figure", "save"]

FOLDER = Path(__file__).parent.parent.parent / "docs" / "figures"


def save(made: Figure, name: str) -> None:
    """docs/figures/NAME.png and NAME.svg."""
    canvas.save(made, FOLDER / name)
