"""Forgetting on networks against time: paired descent, the output layer alone, fine-tuning, the published recursion.

Mean-field networks 784-128-10 on Fashion-MNIST, fitted by hand-written Adam (2e-3, cosine decay, 40 epochs); the first
m images of class 0 are erased. The distance is the KL divergence of the mean predictions from the mean of three
retrained networks, on the erased and on test images; the floor is that of each retrained network from the other two.
Fine-tuning is hand-written too and gets the best of three learning rates, chosen in hindsight for each measure.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyro
import torch
from torch import Tensor

from benchmarks import plain_mlp
from benchmarks.clock import timed
from benchmarks.plain_mlp import Rows
from benchmarks.record import Table, number, write
from benchmarks.timing import machine, one_thread
from experiments.images import read_idx
from pyro_forget.data import Data
from pyro_forget.forgetters.influence import Influence
from pyro_forget.forgetters.output_layer import OutputLayer
from pyro_forget.forgetters.paired_descent import PairedDescent
from pyro_forget.guides import MeanField, local_reparametrization
from pyro_forget.models import MLP
from pyro_forget.outcome import Forgetter
from pyro_forget.posterior import VariationalPosterior
from pyro_forget.store import load_tensors, save_tensors

WIDTHS, PRIOR_STD, RATE, EPOCHS = (784, 128, 10), 0.1, 2e-3, 40
TASKS = ((10_000, 200), (10_000, 500), (10_000, 942), (60_000, 500))
SEEDS = range(3)
BUDGETS = (0.1, 0.2, 0.4, 0.8, 1.5)
STEPS = (8, 16, 32, 64, 128, 256, 400)
RATES = (5e-4, 1e-3, 2e-3)
NUM_RETRAINED, NUM_TEST, NUM_DRAWS = 3, 2000, 50
SCALE = 1e4  # distances are shown in 1e-4 nats
SITES = ("layer0.weight", "layer0.bias", "layer1.weight", "layer1.bias")


@dataclass(frozen=True)
class Task:
    """One request, with what a result is compared with.

    Attributes:
        rows: what the network was fitted to.
        erased: their places.
        fit: the network before.
        targets: log of the retrained networks' mean probabilities, on erased and on test images.
        images: those images.
        floor: of the distances.
    """

    rows: Rows
    erased: Tensor
    fit: plain_mlp.Params
    targets: tuple[Tensor, Tensor]
    images: tuple[Tensor, Tensor]
    floor: tuple[float, float]

    @property
    def retained(self) -> Rows:
        """All other rows."""
        kept = torch.ones(len(self.rows), dtype=torch.bool)
        kept[self.erased] = False
        return self.rows[torch.nonzero(kept)[:, 0]]

    def distance(self, params: plain_mlp.Params) -> tuple[float, float]:
        """On erased and on test images, in 1e-4 nats."""
        found = (plain_mlp.predictive(params, x, NUM_DRAWS, 7) for x in self.images)
        return tuple(SCALE * _kl(t, p) for t, p in zip(self.targets, found, strict=True))  # type: ignore[return-value]


def task(rows: Rows, test: Rows, num_erased: int, cache: Path) -> Task:
    """Fit and retrain, or read the fits of an earlier run."""
    erased = torch.nonzero(rows.y == 0)[:num_erased, 0]
    kept = torch.ones(len(rows), dtype=torch.bool)
    kept[erased] = False
    retained = rows[torch.nonzero(kept)[:, 0]]
    fit = _cached(cache / f"{len(rows)}-all-0.safetensors", lambda: _fit(rows, 0))
    retrained = [
        _cached(cache / f"{len(rows)}-{num_erased}-{seed}.safetensors", lambda s=seed: _fit(retained, s))
        for seed in range(1, NUM_RETRAINED + 1)
    ]
    images = rows.x[erased], test.x[:NUM_TEST]
    said = [[plain_mlp.predictive(params, x, NUM_DRAWS, 7) for params in retrained] for x in images]
    floor = tuple(_floor(each) for each in said)
    return Task(rows, erased, fit, tuple(map(_mean, said)), images, floor)  # type: ignore[arg-type]


def _fit(rows: Rows, seed: int) -> plain_mlp.Params:
    return plain_mlp.fit(rows, WIDTHS, PRIOR_STD, RATE, EPOCHS, seed)


def _cached(path: Path, make: Callable[[], plain_mlp.Params]) -> plain_mlp.Params:
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


def adopted(params: plain_mlp.Params, rows: Rows) -> tuple[VariationalPosterior, Data]:
    """The hand-written fit as a Pyro model and guide."""
    pyro.clear_param_store()
    model = local_reparametrization(MLP(WIDTHS, PRIOR_STD))
    data = Data(rows.x, rows.y)
    posterior = VariationalPosterior.started(model, MeanField(model), data)
    return posterior.with_params(dict(zip(_names(), params, strict=True))), data


def _names() -> list[str]:
    return [f"{part}.{site}_unconstrained" for part in ("loc", "log_scale") for site in SITES]


def by_hand(posterior: VariationalPosterior) -> plain_mlp.Params:
    """The inverse of `adopted`."""
    return [posterior.params[name] for name in _names()]


def records(num_data: int, num_erased: int, found: Task) -> Iterator[dict[str, Any]]:
    """Every method on one request."""
    posterior, data = adopted(found.fit, found.rows)
    erased, retained = data.split(found.erased)
    about = {"num_data": num_data, "num_erased": num_erased, "floor": list(found.floor)}
    OutputLayer().edit(posterior, erased, retained)  # what a process loads once is no method's cost
    yield about | _record("before", "", 0, found.distance(found.fit), 0.0)

    def run(method: Forgetter, name: str, setting: str, seed: int) -> dict[str, Any]:
        edit, seconds = timed(lambda: method.edit(posterior, erased, retained))
        distance = found.distance(by_hand(edit.posterior))
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

    for seed in SEEDS:
        yield run(OutputLayer(seed=seed), "output layer", "", seed)
        for steps in STEPS:
            yield run(PairedDescent(steps, seed=seed), "paired", f"{steps}", seed)
        for budget in BUDGETS:
            for rate in RATES:
                params, seconds = timed(
                    lambda b=budget, r=rate, s=seed: plain_mlp.fine_tune(found.fit, found.retained, PRIOR_STD, r, b, s)
                )
                yield about | _record("fine-tuning", f"{budget:g} {rate:g}", seed, found.distance(params), seconds)
    yield run(Influence.published(), "published recursion", "T = 64", 0)


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


def run(out: Path) -> None:
    """Measure, and write the table and the figure; nothing without the files of Fashion-MNIST at PYRO_FORGET_DATA."""
    from benchmarks.figures import paired as figure

    folder = os.environ.get("PYRO_FORGET_DATA")
    if folder is None:
        print("PYRO_FORGET_DATA does not name a folder of data sets: nothing measured.")
        return
    everything, test = _images(Path(folder), "train"), _images(Path(folder), "t10k")
    with one_thread():
        found = []
        for num_data, num_erased in TASKS:
            one = task(everything[torch.arange(num_data)], test, num_erased, out / "networks")
            found += list(records(num_data, num_erased, one))
    write(out, "paired", found, f"{_table(found)}\n{machine()}\n")
    figure.draw(found)


def _images(folder: Path, kind: str) -> Rows:
    raw = folder / "FashionMNIST" / "raw"
    x, y = (read_idx(raw / f"{kind}-{part}.gz") for part in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    return Rows(x.flatten(1).float() / 255, y.long())


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


def best(records: Sequence[dict[str, Any]], budget: float) -> tuple[float, float]:
    """Fine-tuning at a budget, the best rate of each measure."""
    places = [place for s, place in curve(records, "fine-tuning").items() if s.split(" ")[0] == f"{budget:g}"]
    return min(place[1] for place in places), min(place[2] for place in places)


def _table(records: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for num_data, num_erased in dict.fromkeys((r["num_data"], r["num_erased"]) for r in records):
        own = [r for r in records if (r["num_data"], r["num_erased"]) == (num_data, num_erased)]
        before = next(r for r in own if r["method"] == "before")
        name = f"{num_erased} of {num_data}"
        rows.append([f"{name}: before; floor", "", _pair(before["erased"], before["test"]), _pair(*before["floor"])])
        for budget in BUDGETS:
            ours, theirs = within(own, budget), best(own, budget)
            rows.append([name, f"{budget:g}", _pair(*ours[1:]) if ours else "–", _pair(*theirs)])
        published = curve(own, "published recursion")
        rows += [
            [f"{name}: published recursion", number(place[0]), _pair(*place[1:]), ""] for place in published.values()
        ]
    return Table(["erased", "s", "KL on erased / test, 1e-4: default", "fine-tuning"], rows)


def _pair(erased: float, test: float) -> str:
    return f"{erased:.0f} / {test:.0f}"
