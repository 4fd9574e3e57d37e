"""Forgetting on a network against time: what is run on one request, and how far that ends from retrained networks.

The distance is the KL divergence of the mean predictions from the mean of three retrained networks, on the erased and
on test images; the floor is that of each retrained network from the other two. Fine-tuning is hand-written and gets the
best of several learning rates, chosen in hindsight for each measure.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyro
import torch
from torch import Tensor

from benchmarks.clock import timed
from benchmarks.plain_mlp import Params, Rows
from benchmarks.record import Table, number
from pyro_forget.data import Data
from pyro_forget.forgetters.influence import Influence
from pyro_forget.forgetters.output_layer import OutputLayer
from pyro_forget.forgetters.paired_descent import PairedDescent
from pyro_forget.guides import MeanField, local_reparametrization
from pyro_forget.outcome import Forgetter
from pyro_forget.posterior import VariationalPosterior
from pyro_forget.store import load_tensors, save_tensors

NUM_RETRAINED = 3
SCALE = 1e4  # distances are shown in 1e-4 nats


@dataclass(frozen=True)
class Contest:
    """A network, and what is tried on it.

    Attributes:
        folder: of its fits.
        model: in Pyro.
        sites: its latents, in the order of the hand-written params.
        fit: (rows, seed) to params, by hand.
        fine_tune: (params, retained rows, learning rate, CPU seconds, seed) to params, by hand.
        predictive: (params, images) to log of mean probabilities, by hand.
        budgets: seconds of fine-tuning.
        rates: of fine-tuning.
        steps: of paired descent.
        num_seeds: of every method.
        most_for_published: erased rows at most for which the published recursion is run.
    """

    folder: str
    model: Callable[..., Any]
    sites: tuple[str, ...]
    fit: Callable[[Rows, int], Params]
    fine_tune: Callable[[Params, Rows, float, float, int], Params]
    predictive: Callable[[Params, Tensor], Tensor]
    budgets: tuple[float, ...]
    rates: tuple[float, ...]
    steps: tuple[int, ...]
    num_seeds: int = 3
    most_for_published: int = 1_000


@dataclass(frozen=True)
class Task:
    """One request, with what a result is compared with.

    Attributes:
        contest: the network.
        rows: what it was fitted to.
        erased: their places.
        fit: the network before.
        targets: log of the retrained networks' mean probabilities, on erased and on test images.
        images: those images.
        floor: of the distances.
    """

    contest: Contest
    rows: Rows
    erased: Tensor
    fit: Params
    targets: tuple[Tensor, Tensor]
    images: tuple[Tensor, Tensor]
    floor: tuple[float, float]

    @property
    def retained(self) -> Rows:
        """All other rows."""
        kept = torch.ones(len(self.rows), dtype=torch.bool)
        kept[self.erased] = False
        return self.rows[torch.nonzero(kept)[:, 0]]

    def distance(self, params: Params) -> tuple[float, float]:
        """On erased and on test images, in 1e-4 nats."""
        found = (self.contest.predictive(params, x) for x in self.images)
        return tuple(SCALE * _kl(t, p) for t, p in zip(self.targets, found, strict=True))  # type: ignore[return-value]


def task(contest: Contest, rows: Rows, test: Rows, num_erased: int, out: Path) -> Task:
    """Fit and retrain, or read the fits of an earlier run."""
    cache = out / contest.folder
    erased = torch.nonzero(rows.y == 0)[:num_erased, 0]
    kept = torch.ones(len(rows), dtype=torch.bool)
    kept[erased] = False
    retained = rows[torch.nonzero(kept)[:, 0]]
    fit = _cached(cache / f"{len(rows)}-all-0.safetensors", lambda: contest.fit(rows, 0))
    retrained = [
        _cached(cache / f"{len(rows)}-{num_erased}-{seed}.safetensors", lambda s=seed: contest.fit(retained, s))
        for seed in range(1, NUM_RETRAINED + 1)
    ]
    images = rows.x[erased], test.x
    said = [[contest.predictive(params, x) for params in retrained] for x in images]
    floor = tuple(_floor(each) for each in said)
    return Task(contest, rows, erased, fit, tuple(map(_mean, said)), images, floor)  # type: ignore[arg-type]


def _cached(path: Path, make: Callable[[], Params]) -> Params:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {str(place): value for place, value in enumerate(make())}, {})
    found, _ = load_tensors(path)
    return [found[str(place)] for place in range(len(found))]


def _kl(target: Tensor, found: Tensor) -> float:
    """Mean over the rows of KL(target ‖ found), nats."""
    return float((target.exp() * (target - found)).sum(-1).mean())


def _mean(log_probs: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(log_probs)).logsumexp(0) - math.log(len(log_probs))


def _floor(log_probs: list[Tensor]) -> float:
    """Mean distance of each retrained network from the mean of the others, in 1e-4 nats."""
    others = [_mean(log_probs[:place] + log_probs[place + 1 :]) for place in range(len(log_probs))]
    return SCALE * sum(_kl(target, own) for target, own in zip(others, log_probs, strict=True)) / len(log_probs)


def adopted(contest: Contest, params: Params, rows: Rows) -> tuple[VariationalPosterior, Data]:
    """The hand-written fit as a Pyro model and guide."""
    pyro.clear_param_store()
    model = local_reparametrization(contest.model)
    data = Data(rows.x, rows.y)
    posterior = VariationalPosterior.started(model, MeanField(model), data)
    return posterior.with_params(dict(zip(_names(contest), params, strict=True))), data


def _names(contest: Contest) -> list[str]:
    return [f"{part}.{site}_unconstrained" for part in ("loc", "log_scale") for site in contest.sites]


def by_hand(contest: Contest, posterior: VariationalPosterior) -> Params:
    """The inverse of `adopted`."""
    return [posterior.params[name] for name in _names(contest)]


def records(num_data: int, num_erased: int, found: Task) -> Iterator[dict[str, Any]]:
    """Every method on one request."""
    contest = found.contest
    posterior, data = adopted(contest, found.fit, found.rows)
    erased, retained = data.split(found.erased)
    about = {"num_data": num_data, "num_erased": num_erased, "floor": list(found.floor)}
    OutputLayer().edit(posterior, erased, retained)  # what a process loads once is no method's cost
    yield about | _record("before", "", 0, found.distance(found.fit), 0.0)

    def run(method: Forgetter, name: str, setting: str, seed: int) -> dict[str, Any]:
        edit, seconds = timed(lambda: method.edit(posterior, erased, retained))
        distance = found.distance(by_hand(contest, edit.posterior))
        return (
            about
            | _record(name, setting, seed, distance, seconds)
            | {
                "refused": edit.evidence.refused,
                "solver": edit.evidence.solver,
                "held_out_fall": edit.evidence.held_out_fall,
                "extra": edit.evidence.extra,
            }
        )

    for seed in range(contest.num_seeds):
        yield run(OutputLayer(seed=seed), "output layer", "", seed)
        for steps in contest.steps:
            yield run(PairedDescent(steps, seed=seed), "paired", f"{steps}", seed)
        yield from (about | record for record in _fine_tuned(found, seed))
    if num_erased <= contest.most_for_published:
        yield run(Influence.published(), "published recursion", "T = 64", 0)


def _fine_tuned(found: Task, seed: int) -> Iterator[dict[str, Any]]:
    contest = found.contest
    for budget, rate in itertools.product(contest.budgets, contest.rates):
        params, seconds = timed(lambda b=budget, r=rate: contest.fine_tune(found.fit, found.retained, r, b, seed))
        yield _record("fine-tuning", f"{budget:g} {rate:g}", seed, found.distance(params), seconds)


def _record(method: str, setting: str, seed: int, distance: tuple[float, float], seconds: float) -> dict[str, Any]:
    return {
        "method": method,
        "setting": setting,
        "seed": seed,
        "erased": _json(distance[0]),
        "test": _json(distance[1]),
        "seconds": seconds,
    }


def _json(value: float) -> float | None:
    """None for what diverged: JSON has no word for it."""
    return value if math.isfinite(value) else None


def curve(records: Sequence[dict[str, Any]], method: str) -> dict[str, tuple[float, float, float]]:
    """Medians over the seeds by setting: (seconds, distance on erased, on test)."""
    own = [r for r in records if r["method"] == method and r["erased"] is not None]
    found = {}
    for setting in dict.fromkeys(r["setting"] for r in own):
        each = [r for r in own if r["setting"] == setting]
        found[setting] = tuple(median(r[key] for r in each) for key in ("seconds", "erased", "test"))
    return found  # type: ignore[return-value]


def within(records: Sequence[dict[str, Any]], budget: float) -> tuple[float, float, float] | None:
    """The library's result that fits into a budget: as many steps as there is time for, or the output layer alone."""
    places = {**curve(records, "output layer"), **curve(records, "paired")}
    fitting = [place for place in places.values() if place[0] <= budget]
    return max(fitting) if fitting else None


def budgets(records: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds of fine-tuning that were tried."""
    return sorted({float(r["setting"].split(" ")[0]) for r in records if r["method"] == "fine-tuning"})


def best(records: Sequence[dict[str, Any]], budget: float) -> tuple[float, float]:
    """Fine-tuning at a budget, the best rate of each measure."""
    places = [place for s, place in curve(records, "fine-tuning").items() if s.split(" ")[0] == f"{budget:g}"]
    return min(place[1] for place in places), min(place[2] for place in places)


def table(records: Sequence[dict[str, Any]]) -> Table:
    """A row for each request and budget: the default within it, fine-tuning at its best rate."""
    rows = []
    for num_data, num_erased in dict.fromkeys((r["num_data"], r["num_erased"]) for r in records):
        own = [r for r in records if (r["num_data"], r["num_erased"]) == (num_data, num_erased)]
        before = next(r for r in own if r["method"] == "before")
        name = f"{num_erased} of {num_data}"
        rows.append([f"{name}: before; floor", "", _pair(before["erased"], before["test"]), _pair(*before["floor"])])
        for budget in budgets(own):
            ours, theirs = within(own, budget), best(own, budget)
            rows.append([name, f"{budget:g}", _pair(*ours[1:]) if ours else "–", _pair(*theirs)])
        published = curve(own, "published recursion")
        rows += [
            [f"{name}: published recursion", number(place[0]), _pair(*place[1:]), ""] for place in published.values()
        ]
    return Table(["erased", "s", "KL on erased / test, 1e-4: default", "fine-tuning"], rows)


def _pair(erased: float, test: float) -> str:
    return f"{erased:.0f} / {test:.0f}"
