"""Distance to retrained networks against seconds, from the records of a contest."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, ScalarFormatter

from benchmarks.contest import best, budgets, curve
from benchmarks.figures.canvas import FLOOR, OURS, RIVAL, SECOND, figure, save

Record = dict[str, Any]
PLACES = ("erased", "test")


def draw(records: Sequence[Record], name: str) -> None:
    """docs/figures/NAME.png and .svg."""
    requests = list(dict.fromkeys((r["num_data"], r["num_erased"]) for r in records))
    made, axes = figure(len(requests), 3.4 * len(requests), 6.4, rows=len(PLACES))
    for place, (num_data, num_erased) in enumerate(requests):
        own = [r for r in records if (r["num_data"], r["num_erased"]) == (num_data, num_erased)]
        for row, measure in enumerate(PLACES):
            axis = axes[row * len(requests) + place]
            _request(axis, own, measure)
            axis.set_title(f"{num_erased} of {num_data:,}, on {measure} images", fontsize=9)
            axis.set_xlabel("seconds, one thread" if row + 1 == len(PLACES) else "")
            axis.set_ylabel("" if place else "KL from the retrained, 1e-4 nats")
    columns = 5 if len(requests) > 2 else 3
    made.legend(
        *axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, ncols=columns, loc="outside lower center"
    )
    save(made, name)


def _request(axis: Axes, own: Sequence[Record], measure: str) -> None:
    which = 1 + PLACES.index(measure)
    ours = [*curve(own, "output layer").values(), *curve(own, "paired").values()]
    axis.plot([p[0] for p in ours], [p[which] for p in ours], "o-", color=OURS, markersize=4, label="default")
    tried = budgets(own)
    theirs = [best(own, budget)[which - 1] for budget in tried]
    axis.plot(tried, theirs, "^-", color=SECOND, markersize=4, label="fine-tuning by hand, best of three rates")
    published = curve(own, "published recursion").values()
    axis.plot([p[0] for p in published], [p[which] for p in published], "s", color=RIVAL, label="published recursion")
    before = next(r for r in own if r["method"] == "before")
    axis.axhline(before[measure], color=FLOOR, linewidth=0.8, linestyle="--", label="nothing done")
    axis.axhline(before["floor"][which - 1], color=FLOOR, linewidth=0.8, label="floor: another retrained")
    axis.set_xscale("log")
    axis.set_yscale("log")
    values = [*(p[which] for p in ours), *theirs, before[measure], before["floor"][which - 1]]
    axis.set_yticks(_ticks(min(values), max(values)))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or finer where there would be hardly any."""
    coarse, fine = (1, 2, 5), (1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8)
    for steps in (coarse, fine):
        ticks = [step * 10.0**power for power in range(-1, 6) for step in steps if low <= step * 10.0**power <= high]
        if len(ticks) >= 3:
            return ticks
    return ticks
