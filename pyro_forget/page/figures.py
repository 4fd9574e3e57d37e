"""The figures of the page, drawn on their own canvases: no backend, no style and no other global state is touched.

One look for all: before is grey, after is blue, the refit is orange, each with a marker of its own, so that they can
be told apart in grey print and by the colour-blind.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pyro_forget.page.summary import Likelihood, Marginal, Parameter

_INK, _MUTED, _RULE, _BAND = "#1f2937", "#5b6472", "#d5dae1", "#f4f6f8"
_GOOD, _POOR = "#dcefe3", "#f8e1dc"
_WIDTH = 7.6  # inches; the page shows figures at about this width
_FOREST = "Mean with 50 % and 94 % interval"
_UNLIKE = 25.0  # beyond this ratio of widths the narrower intervals are a dot on a common axis


@dataclass(frozen=True)
class Style:
    """How one role is drawn."""

    label: str
    colour: str
    marker: str
    face: str


STYLES = {
    "before": Style("before", "#6b7280", "o", "white"),
    "after": Style("after forgetting", "#1d5fbf", "o", "#1d5fbf"),
    "refit": Style("refit without the data", "#c2570c", "D", "#c2570c"),
}
_HELD_OUT = Style("", "#0f766e", "s", "#0f766e")


def forest(parameters: list[Parameter], num_parameters: int) -> Figure:
    """Mean, 50 % and 94 % interval of each parameter under each posterior; the one that moved most on top."""
    roles = list(parameters[0].marginals)
    height = 1.45 + len(parameters) * (0.16 + 0.14 * len(roles))
    figure, axes = _canvas(height, top=0.78, left=_room([parameter.name for parameter in parameters]))
    standard = _widths_differ(parameters)
    for row, parameter in enumerate(parameters):
        if row % 2:
            axes.axhspan(row - 0.5, row + 0.5, color=_BAND, linewidth=0, zorder=0)
        for place, role in enumerate(roles):
            offset = 0.26 * (place - (len(roles) - 1) / 2)
            _interval(axes, row + offset, _scaled(parameter, role, standard), STYLES[role])
    axes.set_ylim(len(parameters) - 0.5, -0.5)
    axes.set_yticks(range(len(parameters)), [parameter.name for parameter in parameters])
    axes.set_xlabel("change from before, in its standard deviations" if standard else "value")
    _headline(
        figure,
        _forest_title(parameters, num_parameters),
        _FOREST + (". Blue should lie on orange" if "refit" in roles else ""),
    )
    _legend(figure, axes, roles)
    return figure


def agreement(likelihoods: dict[str, Likelihood]) -> Figure:
    """How far the prediction of each datum is from the refit's: median, middle half and 90 % of the data."""
    refit = likelihoods["refit"].by_datum
    roles = [role for role in likelihoods if role != "refit"]
    figure, axes = _canvas(1.55 + 0.42 * len(roles), top=0.62, left=1.45)
    for row, role in enumerate(roles):
        away = np.maximum(np.abs(likelihoods[role].by_datum - refit), 1e-12)
        low, lower, middle, upper, high = map(float, np.quantile(away, (0.05, 0.25, 0.5, 0.75, 0.95)))
        _interval(axes, row, Marginal(middle, 0.0, (lower, upper), (low, high)), STYLES[role])
        _note(axes, (middle, row), f"{middle:.2g}", (0, 7), "center")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="x", which="minor", length=0, labelbottom=False)
    axes.set_ylim(len(roles) - 0.4, -0.7)
    axes.set_yticks(range(len(roles)), [STYLES[role].label for role in roles])
    axes.set_xlabel("difference of a datum's log predictive density from the refit's, nats (log scale)")
    _headline(figure, "Distance to the refit's predictions", "Left is closer. Median, middle half and 90 % of the data")
    return figure


def sweeps(promised: list[float], realised: list[float], held_out: list[float]) -> Figure:
    """The fall of the energy in each sweep as a share of what the quadratic model promised for it."""
    figure, axes = _canvas(1.75 + 0.36 * len(promised), top=0.78, left=1.9)
    shares = {
        "under its own noise": (_shares(realised, promised), STYLES["after"], -0.13),
        "under held-out noise": (_shares(held_out, promised), _HELD_OUT, 0.13),
    }
    for label, (share, style, offset) in shares.items():
        rows = np.arange(len(share)) + offset
        axes.plot(share, rows, style.marker, color=style.colour, mfc=style.face, mew=1.5, ms=6, label=label)
    low, high = axes.get_xlim()
    axes.set_xlim(min(-0.05, low), max(1.4, high))
    axes.axvspan(axes.get_xlim()[0], 0.25, color=_POOR, linewidth=0, zorder=0)
    axes.axvline(1.0, color=_MUTED, linewidth=1, linestyle=(0, (3, 2)), zorder=1)
    axes.set_ylim(len(promised) - 0.5, -0.5)
    axes.set_yticks(range(len(promised)), [f"sweep {i + 1}: {fall:.2g} nats" for i, fall in enumerate(promised)])
    axes.set_xlabel("fall of the energy as a share of the promised fall (1: exactly as promised)")
    _headline(
        figure, "Did each sweep keep its promise?", "Near the dashed line: yes. Sweeps in the red zone are not kept"
    )
    _handles(figure, axes)
    return figure


def weights(khat: float | None, threshold: float, ess: float, num_draws: int) -> Figure:
    """Pareto k̂ and effective sample size on scales that show what is good."""
    figure, axes = _canvas(2.15, top=0.68, left=2.1, bottom=0.35)
    _gauge(axes, 0, khat, threshold, good_below=True)
    _gauge(axes, 1, ess / num_draws, 0.5, good_below=False)
    axes.set_ylim(1.45, -0.45)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, threshold, 0.5, 1], ["0", f"{threshold:.2f}", "0.5", "1"])
    said = "not estimated" if khat is None else f"{khat:.2f}".replace("inf", "∞").replace("-", "−")
    axes.set_yticks([0, 1], [rf"Pareto $\hat{{k}}$ = {said}", f"ESS = {ess:,.0f} of {num_draws:,}"])
    _headline(figure, "Quality of the importance weights", "The dots should lie in the green zones")
    return figure


def _canvas(height: float, top: float, left: float, bottom: float = 0.55) -> tuple[Figure, Axes]:
    """A figure with room for a headline of `top` inches and labels of `left` and `bottom` inches."""
    figure = Figure(figsize=(_WIDTH, height), dpi=200, facecolor="white")
    FigureCanvasAgg(figure)
    box = (left / _WIDTH, bottom / height, 1 - (left + 0.2) / _WIDTH, 1 - (top + bottom) / height)
    axes = figure.add_axes(box, facecolor="white")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.tick_params(axis="both", length=0, labelsize=9, colors=_INK)
    axes.grid(axis="x", color=_RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.xaxis.label.set(color=_MUTED, fontsize=9)
    return figure, axes


def _headline(figure: Figure, title: str, subtitle: str) -> None:
    height = figure.get_size_inches()[1]
    figure.text(0.15 / _WIDTH, 1 - 0.12 / height, title, va="top", fontsize=11.5, fontweight="bold", color=_INK)
    figure.text(0.15 / _WIDTH, 1 - 0.36 / height, subtitle, va="top", fontsize=9, color=_MUTED)


def _shares(falls: list[float], promised: list[float]) -> np.ndarray:
    """Fall over promised fall, NaN where nothing was promised; at most ±3, to keep the rest legible."""
    promise = np.array(promised)
    share = np.divide(falls, promise, out=np.full(len(promise), np.nan), where=promise != 0)
    return np.clip(share, -3, 3)


def _legend(figure: Figure, axes: Axes, roles: list[str]) -> None:
    for role in roles:
        style = STYLES[role]
        axes.plot([], [], style.marker, color=style.colour, mfc=style.face, mew=1.5, ms=6, label=style.label)
    _handles(figure, axes)


def _handles(figure: Figure, axes: Axes) -> None:
    height = figure.get_size_inches()[1]
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0.06 / _WIDTH, 1 - 0.5 / height),
        ncols=3,
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        handletextpad=0.3,
        columnspacing=1.6,
    )


def _interval(axes: Axes, row: float, marginal: Marginal, style: Style) -> None:
    axes.hlines(row, *marginal.outer, color=style.colour, linewidth=1.1, zorder=2)
    axes.hlines(row, *marginal.inner, color=style.colour, linewidth=3.4, zorder=2)
    axes.plot(marginal.mean, row, style.marker, color=style.colour, mfc=style.face, mew=1.5, ms=5.5, zorder=3)


def _gauge(axes: Axes, row: int, value: float | None, limit: float, good_below: bool) -> None:
    below, above = (("good", _GOOD), ("poor", _POOR)) if good_below else (("poor", _POOR), ("good", _GOOD))
    for (label, colour), left, right in ((below, 0.0, limit), (above, limit, 1.0)):
        axes.barh(row, right - left, left=left, height=0.56, color=colour, linewidth=0)
        _note(axes, ((left + right) / 2, row - 0.28), label, (0, 2), "center")
    if value is not None:
        axes.plot(min(max(value, 0.0), 1.0), row, "o", color=STYLES["after"].colour, ms=9, clip_on=False, zorder=3)


def _note(axes: Axes, place: tuple[float, float], text: str, offset: tuple[int, int], align: str) -> None:
    axes.annotate(text, place, offset, textcoords="offset points", ha=align, fontsize=8.5, color=_MUTED)


def _scaled(parameter: Parameter, role: str, standard: bool) -> Marginal:
    value, origin = parameter.marginals[role], parameter.marginals.get("before")
    if not standard or origin is None:
        return value
    scale = origin.sd or 1.0

    def standardise(ends: tuple[float, float]) -> tuple[float, float]:
        return (ends[0] - origin.mean) / scale, (ends[1] - origin.mean) / scale

    return Marginal(
        (value.mean - origin.mean) / scale, value.sd / scale, standardise(value.inner), standardise(value.outer)
    )


def _widths_differ(parameters: list[Parameter]) -> bool:
    """Whether raw values would hide some parameter's intervals, or the means lie too far apart for its width."""
    if "before" not in parameters[0].marginals:
        return False
    outer = np.array([marginal.outer for parameter in parameters for marginal in parameter.marginals.values()])
    widths = outer[:, 1] - outer[:, 0]
    return bool(outer.max() - outer.min() > _UNLIKE * max(widths.min(), np.finfo(float).tiny))


def _forest_title(parameters: list[Parameter], num_parameters: int) -> str:
    compared = "before" in parameters[0].marginals
    title = "What forgetting changed" if compared else "The posterior after forgetting"
    if len(parameters) == num_parameters:
        return title
    return f"{title}: {len(parameters)} of {num_parameters:,} parameters" + (
        ", those that moved most" if compared else ""
    )


def _room(names: list[str]) -> float:
    """Inches for tick labels."""
    return min(0.35 + 0.078 * max(map(len, names)), 0.45 * _WIDTH)
