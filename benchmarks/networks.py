"""Networks, where the energy is not convex: is what forgetting returns ever worse than what it was given?

Mean-field networks under local reparametrisation, fitted by Adam. "Worse" is judged by the tilted retained energy
under a third noise, which neither the steps nor their acceptance have seen, and by the KL divergence of the mean
predictions from those of a retrained network.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyro
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.clock import timed
from benchmarks.record import Table, number, write
from benchmarks.timing import machine, one_thread
from experiments.images import load_images
from pyro_forget.data import Data
from pyro_forget.energy import CoordinateEnergy, coordinates_of
from pyro_forget.evaluation import predictive_kl
from pyro_forget.forgetters.influence import Influence
from pyro_forget.guides import MeanField, local_reparametrization
from pyro_forget.inference.fit import fit_guide
from pyro_forget.models import MLP
from pyro_forget.posterior import VariationalPosterior
from pyro_forget.tilt import TiltedEnergy

SEEDS = range(5)
THIRD_NOISE = 3_000
NUM_DRAWS = 50


@dataclass(frozen=True)
class Images:
    """A classification task.

    Attributes:
        name: of the data and the network.
        widths: of the network.
        prior_std: of each weight.
        data: rows to fit.
        test: other rows.
        requests: names and sizes: "class 0" erases the first so many of it, "at random" any.
        num_steps: of Adam, batch 128.
        learning_rate: decays to zero by a cosine.
    """

    name: str
    widths: tuple[int, ...]
    prior_std: float
    data: Data
    test: Data
    labels: Tensor
    requests: tuple[tuple[str, int], ...]
    num_steps: int
    learning_rate: float

    def erased(self, kind: str, count: int) -> Tensor:
        """Ids of a request."""
        if kind == "class 0":
            return torch.nonzero(self.labels == 0)[:count, 0]
        return torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(5))[:count]

    def fitted(self, data: Data, seed: int) -> VariationalPosterior:
        """By Adam, from other initial values and batches for every seed."""
        pyro.clear_param_store()
        torch.manual_seed(seed)
        model = local_reparametrization(MLP(self.widths, self.prior_std))
        guide = MeanField(model, init_loc_fn=_random(0.1), init_scale=0.05)
        settings = {"learning_rate": self.learning_rate, "batch_size": 128, "polish": None, "progress": False}
        return fit_guide(model, guide, data, num_steps=self.num_steps, seed=seed, **settings).posterior


def _random(std: float) -> Callable[[dict[str, Any]], Tensor]:
    """Initial means, which must differ between the units of a layer."""
    return lambda site: std * torch.randn(site["fn"].shape())


def digits(seed: int) -> Images:
    """1,500 of scikit-learn's digits to fit, 297 to test; 64-32-10."""
    pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = pixels[order].float() / 16, labels[order]
    requests = (("class 0", 50), ("class 0", 200), ("at random", 150))
    data, test = Data(x[:1500], y[:1500]), Data(x[1500:], y[1500:])
    return Images("digits 64-32-10", (64, 32, 10), 1.0, data, test, y[:1500], requests, 1500, 5e-3)


def fashion(seed: int) -> Images | None:
    """10,000 images of Fashion-MNIST to fit, 2,000 to test; 784-128-10. None where the data are not there."""
    try:
        found = load_images("fashion_mnist")
    except FileNotFoundError:
        return None
    order = torch.randperm(len(found.y), generator=torch.Generator().manual_seed(seed))[:12_000]
    images, labels = found.x[order].flatten(1), found.y[order]
    data, test = Data(images[:10_000], labels[:10_000]), Data(images[10_000:], labels[10_000:])
    requests = (("class 0", 500),)
    return Images("Fashion-MNIST 784-128-10", (784, 128, 10), 0.1, data, test, labels[:10_000], requests, 3_120, 2e-3)


def records(images: Images, seed: int) -> Iterator[dict[str, Any]]:
    """One record a request."""
    fit, fit_seconds = timed(lambda: images.fitted(images.data, seed))
    for kind, count in images.requests:
        erased, retained = images.data.split(images.erased(kind, count))
        edit, seconds = timed(lambda e=erased, r=retained: Influence(seed=seed).edit(fit, e, r))
        found = edit.evidence
        yield {
            "task": images.name,
            "kind": f"{kind}, {count}",
            "num_erased": erased.num_data,
            "seed": seed,
            "fit_seconds": fit_seconds,
            "seconds": seconds,
            "third_noise_fall": _fall(fit, edit.posterior, erased, retained),
            "predicted_fall": found.predicted_fall,
            "held_out_fall": found.held_out_fall,
            "refused": found.refused,
            "warnings": list(found.warnings),
            "solver": found.solver,
            "sweeps": len(found.sweeps),
            "dampings": [sweep.damping for sweep in found.sweeps],
            "stationarity": found.stationarity,
        } | _against_retrained(images, fit, edit.posterior, erased, retained, seed)


def _fall(before: VariationalPosterior, after: VariationalPosterior, erased: Data, retained: Data) -> float:
    """By how much the tilted retained energy fell, under a noise that nobody has seen; nats."""
    energy = CoordinateEnergy(before.energy.gaussian).with_noise(THIRD_NOISE)
    origin, end = (coordinates_of(posterior.gaussian) for posterior in (before, after))
    tilted = TiltedEnergy.of(energy, origin, erased, retained)
    return tilted.at_origin - tilted.value(end)


def _against_retrained(
    images: Images, before: VariationalPosterior, after: VariationalPosterior, erased: Data, retained: Data, seed: int
) -> dict[str, float]:
    """KL of mean predictions from those of a network that never saw the erased rows."""
    retrained = images.fitted(retained, 100 + seed)
    found = {}
    for place, rows in {"erased": erased, "test": images.test}.items():
        target = _log_probs(retrained, rows)
        found[f"{place}_before"] = float(predictive_kl(target, _log_probs(before, rows)))
        found[f"{place}_after"] = float(predictive_kl(target, _log_probs(after, rows)))
    return found


def _log_probs(posterior: VariationalPosterior, rows: Data) -> Tensor:
    """Log probabilities of the classes, (draw, row, class), from weights drawn whole."""
    (x, *_) = next(rows.with_batch_size(max(1, rows.num_data)).batches()).args
    weights = posterior.draws(NUM_DRAWS)
    hidden = x.expand(NUM_DRAWS, *x.shape)
    layers = sorted({name.partition(".")[0] for name in weights})
    for layer in layers:
        hidden = hidden @ weights[f"{layer}.weight"].mT + weights[f"{layer}.bias"][:, None]
        hidden = hidden if layer == layers[-1] else hidden.relu()
    return hidden.log_softmax(-1)


def run(out: Path) -> None:
    """Measure, and write the table; without Fashion-MNIST where its files are not at PYRO_FORGET_DATA."""
    with one_thread():
        found = [
            record
            for seed in SEEDS
            for images in (digits(seed), fashion(seed))
            if images is not None
            for record in records(images, seed)
        ]
    write(out, "networks", found, f"{_table(found)}\n{machine()}\n")


def _table(records: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for name, kind in dict.fromkeys((r["task"], r["kind"]) for r in records):
        own = [r for r in records if (r["task"], r["kind"]) == (name, kind)]
        refused = sum(r["refused"] is not None for r in own)
        worse = sum(r["third_noise_fall"] < 0 for r in own)
        warned = sum(bool(r["warnings"]) for r in own)
        keys = ("erased_before", "erased_after", "test_before", "test_after", "seconds", "fit_seconds")
        counts = (f"{count} of {len(own)}" for count in (refused, worse, warned))
        least = number(min(r["third_noise_fall"] for r in own), 2)
        rows.append([f"{name}: {kind}", least, *counts, *(number(median(r[key] for r in own), 2) for key in keys)])
    head = ["erased", "least fall, nats", "refused", "worse", "warned", "KL on erased: before", "after"]
    return Table([*head, "on test: before", "after", "s", "s to fit"], rows)
