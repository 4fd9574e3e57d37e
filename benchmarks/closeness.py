"""How close forgetting comes to a refit, in what time: digits, and small regressions."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from math import isfinite, isnan
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import frontier, regressions
from benchmarks.figures.frontier import draw
from benchmarks.frontier import Point
from benchmarks.record import Table, number, write
from benchmarks.timing import machine, one_thread

Record = dict[str, Any]
RECURSIONS = ("recursion through Pyro", "recursion")


def run(out: Path) -> None:
    """Measure, write the tables and draw the frontier."""
    points: list[Point] = []
    erasures: list[Record] = []
    small: list[Record] = []
    with one_thread():
        for seed in frontier.SEEDS:
            reference, fine = frontier.references(seed)
            points += frontier.points(seed, reference, fine)
            erasures += frontier.erasures(seed, reference)
        for seed in regressions.SEEDS:
            small += regressions.records(seed)
    plain = [asdict(point) for point in points]
    draw(plain)
    tables = (_frontier(points), _erasures(erasures), _regressions(small))
    for record in plain:  # JSON has no infinity, where a rival diverged
        record["remaining"] = record["remaining"] if isfinite(record["remaining"]) else None
    values = {"frontier": plain, "erasures": erasures, "regressions": small}
    write(out, "closeness", values, "\n".join(map(str, tables)) + f"\n{machine(dtype='float64')}\n")


def _frontier(points: Sequence[Point]) -> Table:
    def chosen(method: str, start: str = "", end: str = "") -> list[Point]:
        return [p for p in points if p.method == method and p.setting.startswith(start) and p.setting.endswith(end)]

    rows = [
        ("**one sweep**", chosen("forgetting", "1 sweeps", " 10 pairs")),
        ("**default**", chosen("forgetting", "all sweeps", " 10 pairs")),
        ("default, 30 pairs", chosen("forgetting", "all sweeps", " 30 pairs")),
        ("default, 100 pairs", chosen("forgetting", "all sweeps", " 100 pairs")),
        ("published recursion through Pyro, T = 64", _best(chosen("recursion through Pyro", "T = 64,"))),
        *(
            (f"published recursion by hand, T = {t:,}", _best(chosen("recursion", f"T = {t},")))
            for t in frontier.RECURSION_STEPS
        ),
        *((f"fine-tuning by hand, {e} epochs", _best(chosen("fine-tuning", f"{e} epochs"))) for e in frontier.EPOCHS),
        ("warm refit, until 0.02 is left", _reached(chosen("warm refit"), 0.02)),
        ("warm refit, to a gradient of 1e-6", _reached(chosen("warm refit"), 0.0)),
        ("refit from nothing, until 0.02 is left", _reached(chosen("cold refit"), 0.02)),
        ("refit from nothing, to a gradient of 1e-6", _reached(chosen("cold refit"), 0.0)),
        ("refit from nothing under 200 pairs, to 1e-3", chosen("cold refit, 200 pairs")),
    ]
    head = ["50 images of class 0", "s", "of the refit's", "remaining", "worst seed", "remaining, 200 pairs"]
    cold = median(point.seconds for point in rows[-2][1])
    return Table(head, [_place(name, own, cold) for name, own in rows])


def _place(name: str, points: Sequence[Point], cold: float) -> list[str]:
    seconds, left = median(p.seconds for p in points), [p.remaining for p in points if not isnan(p.remaining)]
    fine = [p.remaining_200 for p in points if p.remaining_200 is not None]
    return [
        name,
        number(seconds, 2),
        f"1/{cold / seconds:.0f}" if seconds < cold / 1.5 else f"{seconds / cold:.1f}",
        *(
            number(value, 2)
            for value in (*((median(left), max(left)) if left else (None, None)), median(fine) if fine else None)
        ),
    ]


def _best(points: Sequence[Point]) -> list[Point]:
    """Of the settings' points those whose median remaining is least: chosen in hindsight, for the rival."""
    by_setting = _grouped(points, lambda point: point.setting)
    return min(by_setting.values(), key=lambda own: median(point.remaining for point in own))


def _reached(path: Sequence[Point], remaining: float) -> list[Point]:
    """Each seed's first visit with so little left, or its last."""
    return [
        next((point for point in own if point.remaining <= remaining), own[-1])
        for own in _grouped(path, lambda point: point.seed).values()
    ]


def _erasures(records: Sequence[Record]) -> Table:
    rows = []
    for (request, method), own in _grouped(records, lambda r: (r["request"], r["method"])).items():
        left = [record["remaining"] for record in own]
        seconds, before = (median(record[key] for record in own) for key in ("seconds", "before"))
        warned = sum(record["warnings"] > 0 for record in own)
        cells = [number(before, 2), number(seconds, 2), number(median(left), 2), number(max(left), 2)]
        rows.append([f"{request}, {method}", *cells, f"{warned} of {len(own)}"])
    return Table(["erased", "KL before, nats", "s", "remaining", "worst seed", "warned"], rows)


def _regressions(records: Sequence[Record]) -> Table:
    rows = []
    for (model, guide), own in _grouped(records, lambda r: (r["model"], r["guide"])).items():
        left = [record["remaining"] for record in own]
        silent = [record["remaining"] for record in own if not record["warnings"] and not record["refused"]]
        said = len(own) - len(silent)
        cells = [number(value, 2) for value in (median(left), max(left), max(silent, default=None))]
        rows.append([f"{model}, {guide}", *cells, f"{said} of {len(own)}"])
    return Table(["60 rows, 2 to 60 % erased", "remaining", "worst", "worst without a warning", "warned"], rows)


def _grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found
