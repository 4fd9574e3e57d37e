"""Distance to retrained networks against seconds, from the records of `benchmarks.paired`."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from benchmarks.figures.canvas import FLOOR, OURS, RIVAL, SECOND, figure, save

Record = dict[str, Any]
PLACES = ("erased", "test")


def draw(records: Sequence[Record]) -> None:
    """docs/figures/paired.png and .svg."""
    requests = list(dict.fromkeys((r["num_data"], r["num_erased"]) for r in records))
    made, axes = figure(2 * len(requests), 4.0 * len(requests), 3.6)
    for place, (num_data, num_erased) in enumerate(requests):
        own = [r for r in records if (r["num_data"], r["num_erased"]) == (num_data, num_erased)]
        for offset, measure in enumerate(PLACES):
            axis = axes[2 * place + offset]
            _request(axis, own, measure)
            axis.set_title(f"{num_erased} of {num_data:,}, {measure}", fontsize=9)
    axes[0].set_ylabel("KL from the retrained, 1e-4 nats")
    axes[0].legend(fontsize=7, frameon=False)
    save(made, "paired")


def _request(axis: Axes, own: Sequence[Record], measure: str) -> None:
    from benchmarks.paired import BUDGETS, best, curve

    which = 1 + PLACES.index(measure)
    ours = [*curve(own, "output layer").values(), *curve(own, "paired").values()]
    axis.plot([p[0] for p in ours], [p[which] for p in ours], "o-", color=OURS, markersize=4, label="default")
    theirs = [best(own, budget)[which - 1] for budget in BUDGETS]
    axis.plot(BUDGETS, theirs, "^-", color=SECOND, markersize=4, label="fine-tuning by hand, best of three rates")
    published = curve(own, "published recursion").values()
    axis.plot([p[0] for p in published], [p[which] for p in published], "s", color=RIVAL, label="published recursion")
    before = next(r for r in own if r["method"] == "before")
    axis.axhline(before[measure], color=FLOOR, linewidth=0.8, linestyle="--")
    axis.axhline(before["floor"][which - 1], color=FLOOR, linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("seconds, one thread")
