"""Remaining fraction against seconds on digits: forgetting, the published recursion, fine-tuning, refits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks import softmax
from benchmarks.clock import timed
from benchmarks.digits import Digits, distance, fitted, params_of, requests
from benchmarks.softmax import Params, Rows
from pyro_forget.forgetters.influence import Influence

SEEDS = range(5)
SWEEPS = (1, 2, 3, None)  # None for as many as the default allows
PAIRS = (10, 30, 100)
RECURSION_STEPS = (64, 200, 640, 2000, 6400)
SCALINGS = (2.0, 4.0, 6.0)
EPOCHS = (1, 5, 20, 80)
LEARNING_RATES = (1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        method: "forgetting", "recursion through Pyro", "recursion", "fine-tuning", "warm refit", "cold refit",
            "cold refit, 200 pairs" to a gradient of 1e-3.
        setting: of the method.
        seed: of the shuffle and all noise.
        seconds: CPU seconds of one thread.
        remaining: of the KL to a refit under 32 independent pairs, the fit's own.
        remaining_200: of the KL to a refit under 200 frame pairs, from a fit under those; None where not measured.
    """

    method: str
    setting: str
    seed: int
    seconds: float
    remaining: float
    remaining_200: float | None = None


@dataclass(frozen=True)
class Reference:
    """A fit and a refit under one noise.

    Attributes:
        task: the images and the noise.
        fit, refit: converged.
        erased: ids of the rows.
        retained: the others.
    """

    task: Digits
    fit: Params
    refit: Params
    erased: Tensor
    retained: Rows

    @staticmethod
    def of(
        task: Digits, name: str, fit: Params, start: Params | None = None, gradient_norm: float = 1e-4
    ) -> "Reference":
        """The refit of a request, from a converged fit."""
        erased = requests(task, fit)[name]()
        retained = task.without(erased)
        return Reference(task, fit, fitted(retained, start or fit, gradient_norm), erased, retained)

    def remaining(self, params: Params) -> float:
        """Of the KL to the refit."""
        return distance(params, self.refit) / distance(self.fit, self.refit)

    def forget(self, method: Influence) -> Params:
        """By the library."""
        return params_of(method.edit(self.task.posterior(self.fit), *self.task.data.split(self.erased)).posterior)


def points(seed: int, reference: Reference, fine: Reference) -> Iterator[Point]:
    """Every method on the first request; `fine` has the 200 frame pairs."""
    yield from _forgetting(seed, reference, fine)
    yield from _published(seed, reference)
    yield from _recursion(seed, reference)
    yield from _fine_tuning(seed, reference)
    yield from _refits(seed, reference)
    visits = softmax.minimise(by_autograd(fine.retained), softmax.start(fine.task.rows.x, 10), 1e-3)
    yield Point("cold refit, 200 pairs", f"{len(visits)} evaluations", seed, visits[-1].seconds, float("nan"), 0.0)


def _forgetting(seed: int, reference: Reference, fine: Reference) -> Iterator[Point]:
    methods = {
        f"{sweeps or 'all'} sweeps, {pairs} pairs": _influence(sweeps, pairs, seed)
        for pairs in PAIRS
        for sweeps in SWEEPS
    }
    for name, method in methods.items():
        found, seconds = timed(lambda m=method: reference.forget(m))
        left_fine = fine.remaining(fine.forget(method))
        yield Point("forgetting", name, seed, seconds, reference.remaining(found), left_fine)


def _published(seed: int, reference: Reference) -> Iterator[Point]:
    """The recursion as the library's preset runs it, through Pyro, vectorised over its draws."""
    methods = {f"T = 64, scaling {scaling:g}": Influence.published(scaling, seed=seed) for scaling in SCALINGS}
    for name, method in methods.items():
        found, seconds = timed(lambda m=method: reference.forget(m))
        yield Point("recursion through Pyro", name, seed, seconds, reference.remaining(found))


def _influence(sweeps: int | None, pairs: int, seed: int) -> Influence:
    chosen = {} if sweeps is None else {"max_sweeps": sweeps}
    return Influence(num_pairs=pairs, seed=seed, **chosen)


def _recursion(seed: int, reference: Reference) -> Iterator[Point]:
    rows, erased = reference.task.rows, reference.erased
    for scaling in SCALINGS:
        steps = softmax.recursion(reference.fit, rows, erased, scaling, max(RECURSION_STEPS), seed)
        seconds = 0.0
        for _ in range(max(RECURSION_STEPS)):
            (step, found), more = timed(lambda s=steps: next(s))
            seconds += more
            if step in RECURSION_STEPS:
                left = reference.remaining(found)
                yield Point("recursion", f"T = {step}, scaling {scaling:g}", seed, seconds, left)
                if not left < 10:  # diverged
                    break


def _fine_tuning(seed: int, reference: Reference) -> Iterator[Point]:
    per_epoch = len(reference.retained) // 128
    for epochs in EPOCHS:
        for rate in LEARNING_RATES:
            found, seconds = timed(
                lambda e=epochs, r=rate: softmax.fine_tune(reference.fit, reference.retained, e * per_epoch, r, seed)
            )
            yield Point("fine-tuning", f"{epochs} epochs, rate {rate:g}", seed, seconds, reference.remaining(found))


def _refits(seed: int, reference: Reference) -> Iterator[Point]:
    """Every second evaluation of L-BFGS by autograd, to a gradient of 1e-6."""
    starts = {"warm refit": reference.fit, "cold refit": softmax.start(reference.task.rows.x, 10)}
    for name, begin in starts.items():
        visits = softmax.minimise(by_autograd(reference.retained), begin, 1e-6)
        for number, visit in enumerate(visits):
            if number % 2 == 1 or number + 1 == len(visits):
                left = reference.remaining(visit.params)
                yield Point(name, f"{number + 1} of {len(visits)} evaluations", seed, visit.seconds, left)


def by_autograd(rows: Rows) -> Callable[[Params], tuple[float, Params]]:
    """The energy and its gradient as one would write them."""
    return lambda params: softmax.gradient(params, softmax.energy, rows)


def references(seed: int) -> tuple[Reference, Reference]:
    """(under 32 independent pairs, under 200 frame pairs) for the request that the frontier is of."""
    task = Digits.shuffled(seed)
    size = len(task.rows)
    coarse = task.under(softmax.independent_pairs(32, size, 10, 10_000 + seed))
    reference = Reference.of(coarse, "50 of class 0", fitted(coarse.rows))
    finer = task.under(softmax.frame_pairs(200, size, 10, 20_000 + seed))
    fit = fitted(finer.rows, reference.fit, 1e-3)
    return reference, Reference.of(finer, "50 of class 0", fit, reference.refit, 1e-3)


def erasures(seed: int, reference: Reference) -> Iterator[dict[str, Any]]:
    """What one sweep and the default leave of other requests, against refits under the fit's own noise."""
    for name in requests(reference.task, reference.fit):
        own = Reference.of(reference.task, name, reference.fit)
        for label, method in {"one sweep": Influence(max_sweeps=1, seed=seed), "default": Influence(seed=seed)}.items():
            posterior = own.task.posterior(own.fit)
            edit, seconds = timed(lambda m=method, p=posterior, o=own: m.edit(p, *o.task.data.split(o.erased)))
            yield {
                "request": name,
                "method": label,
                "seed": seed,
                "seconds": seconds,
                "before": distance(own.fit, own.refit),
                "remaining": own.remaining(params_of(edit.posterior)),
                "warnings": len(edit.evidence.warnings),
                "sweeps": len(edit.evidence.sweeps),
                "stationarity": edit.evidence.stationarity,
            }
