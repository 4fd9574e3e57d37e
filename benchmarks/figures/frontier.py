"""Remaining fraction against seconds on digits, from the points of `benchmarks.frontier`."""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from matplotlib.axes import Axes

from benchmarks.figures.canvas import FLOOR, OURS, REFIT, RIVAL, SECOND, figure, save

Point = dict[str, Any]
LABELLED = {"1 sweeps, 10 pairs": "1 sweep", "all sweeps, 10 pairs": "default"}


def draw(points: Sequence[Point]) -> None:
    """docs/figures/frontier.png and .svg."""
    made, axes = figure(2, 9.5, 4.8)
    _forgetting(axes[0], points, "remaining")
    _forgetting(axes[1], points, "remaining_200")
    _best(axes[0], points, "recursion", RIVAL, "published recursion by hand, best of three scalings", "s")
    _best(axes[0], points, "recursion through Pyro", RIVAL, "the same through Pyro, T = 64", "D")
    _best(axes[0], points, "fine-tuning", SECOND, "fine-tuning by hand, Adam, best of three rates", "^")
    for kind, style in (("warm refit", "--"), ("cold refit", "-")):
        _refit(axes[0], points, kind, style)
    _finish(axes[0], "against a refit under 32 independent pairs, the fit's own")
    _finish(axes[1], "against a refit under 200 frame pairs")
    axes[0].set_ylabel("remaining fraction of the KL")
    handles, labels = axes[0].get_legend_handles_labels()
    made.legend(handles, labels, fontsize=7, frameon=False, ncols=4, loc="outside lower center")
    save(made, "frontier")


def _middle(points: Iterable[Point], value: str) -> dict[str, tuple[float, float]]:
    """Medians over the seeds by setting: (seconds, value)."""
    by_setting: dict[str, list[Point]] = {}
    for point in points:
        by_setting.setdefault(point["setting"], []).append(point)
    return {
        setting: (median(p["seconds"] for p in own), median(p[value] for p in own))
        for setting, own in by_setting.items()
    }


def _forgetting(axis: Axes, points: Sequence[Point], value: str) -> None:
    found = _middle([point for point in points if point["method"] == "forgetting"], value)
    for pairs, shade in ((10, 1.0), (30, 0.65), (100, 0.35)):
        own = {setting: place for setting, place in found.items() if setting.endswith(f" {pairs} pairs")}
        seconds, left = zip(*own.values(), strict=True)
        axis.plot(seconds, left, "o-", color=OURS, alpha=shade, markersize=4, label=f"forgetting, {pairs} pairs")
        for setting, place in own.items():
            if setting in LABELLED:
                axis.annotate(LABELLED[setting], place, (4, 4), textcoords="offset points", fontsize=7, color=OURS)


def _best(axis: Axes, points: Sequence[Point], method: str, colour: str, label: str, marker: str) -> None:
    """The best setting of each budget; a budget is what the setting's first word says."""
    found = _middle([point for point in points if point["method"] == method], "remaining")
    budgets: dict[str, tuple[float, float]] = {}
    for setting, place in found.items():
        budget = setting.split(",")[0]
        if place[1] < budgets.get(budget, (0.0, float("inf")))[1]:
            budgets[budget] = place
    seconds, left = zip(*sorted(budgets.values()), strict=True)
    axis.plot(seconds, left, f"{marker}-", color=colour, markersize=4, label=label)


def _refit(axis: Axes, points: Sequence[Point], method: str, style: str) -> None:
    """The path of the seed in the middle."""
    paths: dict[int, list[Point]] = {}
    for point in points:
        if point["method"] == method:
            paths.setdefault(point["seed"], []).append(point)
    path = sorted(paths.values(), key=lambda own: own[-1]["seconds"])[len(paths) // 2]
    axis.plot(
        [p["seconds"] for p in path], [p["remaining"] for p in path], style, color=REFIT, linewidth=1.2, label=method
    )


def _finish(axis: Axes, title: str) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(1e-3, 3)
    axis.axhline(1, color=FLOOR, linewidth=0.8)
    axis.text(0.99, 1.08, "nothing done", transform=axis.get_yaxis_transform(), ha="right", fontsize=7, color=FLOOR)
    axis.set_xlabel("seconds, one thread")
    axis.set_title(title, fontsize=9)
