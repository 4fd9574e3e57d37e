"""One cell: fit, forget request by request, and compare with two fits without the erased points."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.gaussian_mixture.fit import Fit
from experiments.gaussian_mixture.settings import Settings
from experiments.gaussian_mixture.task import Task
from pyro_forget.forgetting import forget
from pyro_forget.outcome import Report


def run(settings: Settings, seed: int, device: str, folder: Path) -> dict[str, Any]:
    """Fit a mixture of Gaussians, make it forget, and compare it with two fits without the erased points."""
    task, fit = settings.task(seed).to(device), settings.fitting()
    _, retained = task.data.split(task.erased)
    before = fit.fitted(task.data, seed)
    refit, again = (fit.fitted(retained, 1_000 * (seed + 1) + place) for place in range(2))
    posteriors, steps = [], []
    for posterior, step in _requests(settings, task, fit, before, seed):
        posteriors.append(posterior)
        steps.append(step)
    scale = fit.distance(before, refit)
    seconds = sum(step["seconds"] for step in steps)
    own = {"before": before, "after": posteriors[-1], "refit": refit}
    return {
        "remaining": fit.distance(posteriors[-1], refit) / scale,
        "floor": fit.distance(again, refit) / scale,
        "distance_before": scale,
        "seconds": seconds,
        "draw_seconds": sum(step["draw_seconds"] for step in steps),
        "seconds_per_point": seconds / len(task.erased),
        "requests": steps,
        "centres": {name: _centres(fit, posterior, refit) for name, posterior in own.items()},
        "path": [_centres(fit, posterior, refit)["loc"] for posterior in (before, *posteriors)],
        "density": {name: _density(fit, posterior, task) for name, posterior in own.items()},
    }


def _requests(
    settings: Settings, task: Task, fit: Fit, posterior: Any, seed: int
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(posterior, what to say of it) after each request."""
    left = task.data
    for ids in task.erased.split(settings.chunk):
        erased, left = left.split(ids)
        forgetter = fit.forgetter(settings.method, len(task.points), seed)
        posterior, report = forget(posterior, erased, left, forgetter, throw=False)
        said = {"refused": report.refused, "warnings": list(report.evidence.warnings)}
        yield posterior, {**_seconds(report), **said, **_density(fit, posterior, task)}
        if report.refused:
            return


def _seconds(report: Report) -> dict[str, float]:
    """Of forgetting alone, and of drawing again where a method does that after it."""
    chain = report.evidence.extra.get("chain", {})
    return {"seconds": chain.get("seconds", report.seconds), "draw_seconds": chain.get("draw_seconds", 0.0)}


def _centres(fit: Fit, posterior: Any, like: Any) -> dict[str, Any]:
    found = fit.centres(posterior)
    order = found.order_like(fit.centres(like))
    return {"loc": found.loc[order].tolist(), "std": found.std[order].tolist()}


def _density(fit: Fit, posterior: Any, task: Task) -> dict[str, float]:
    """Mean log predictive density of the erased and of the retained points, nats."""
    density = fit.log_density(posterior, task.points)
    return {"erased": float(density[task.erased].mean()), "retained": float(density[task.retained].mean())}
