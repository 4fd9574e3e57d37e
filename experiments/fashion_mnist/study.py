"""One cell: fit, forget, and keep what the result predicts."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pyro.infer import Predictive
from torch import Tensor

from experiments.fashion_mnist.descent import FinetuneDraws
from experiments.fashion_mnist.fits import fitted, kept, last_rule
from experiments.fashion_mnist.settings import Settings, Task
from pyro_forget.data import Data
from pyro_forget.evaluation import error_rate, mean_log_probs, threshold_attack, true_class_probability
from pyro_forget.forgetters import Finetune, Influence, MoreSteps, PublishedChain
from pyro_forget.forgetting import forget
from pyro_forget.outcome import Evidence, Forgetter
from pyro_forget.posterior import Posterior, SampledPosterior
from pyro_forget.store import save_tensors

NUM_DRAWS = 50
FINETUNE_RATE = 1e-3
TIMED_AGAIN = 10.0  # seconds; what a process loads once is no method's cost
REFITTED = 1_000  # added to the seeds of refits
NUM_RETAINED = 2_000  # of the retained images, those that are looked at
# Draws are compared as functions: weights are too many, and those of two fits mean different things.
NUM_COMPARED, NUM_LOOKED_AT = 100, 5


def run(settings: Settings, seed: int, device: str, folder: Path) -> dict[str, Any]:
    """Fit a Bayesian network to images, make it forget some of one class, and keep its predictions."""
    task = settings.task(0).to(device)
    own_seed = REFITTED + seed if settings.method == "retrain" else seed
    erased, retained = task.data.split(task.erased)
    said: dict[str, Any] = {}
    begun = time.perf_counter()
    if settings.method == "retrain":
        posterior = fitted(settings, retained, own_seed)
        said["seconds"] = time.perf_counter() - begun
    else:
        posterior = kept(settings, task.data, seed, folder.parents[1] / "fits")
        if settings.method != "before":
            posterior, said = _forgotten(settings, posterior, erased, retained, seed)
    predictions = _predictions(posterior, task)
    kept_values = {name: value for name, (value, _) in predictions.items()} | {
        "log_odds": _log_odds(posterior, task, own_seed)
    }
    save_tensors(folder / "predictions.safetensors", kept_values, {})
    errors = {f"error_{name}": float(error_rate(value[None], labels)) for name, (value, labels) in predictions.items()}
    return said | errors | {"attack": _attack(predictions)}


def _forgotten(
    settings: Settings, posterior: Posterior, erased: Data, retained: Data, seed: int
) -> tuple[Posterior, dict[str, Any]]:
    forgetter = _forgetter(settings, seed)
    after, report = forget(posterior, erased, retained, forgetter, throw=False)
    if report.seconds < TIMED_AGAIN:
        after, report = forget(posterior, erased, retained, forgetter, throw=False)
    found = report.evidence
    said = {"method": found.method, "refused": report.refused, "warnings": list(found.warnings)}
    counted = (settings.method, settings.fit) != ("published", "svi")
    said["num_products"] = found.num_products if counted else published_products(settings)
    # Forgetting alone; collecting draws from the chain that goes on beside it.
    return after, said | {"seconds": report.seconds} | chain_seconds(found)


def chain_seconds(evidence: Evidence) -> dict[str, float]:
    """Of forgetting, and of drawing again, for a method that does one after the other; nothing for others."""
    chain = evidence.extra.get("chain", {})
    return {name: chain[name] for name in ("seconds", "draw_seconds") if name in chain}


def published_products(settings: Settings) -> int:
    """T for every part of the erased, of a guide: the draws of a product are taken together."""
    return settings.recursion.num_steps * math.ceil(settings.num_erased / settings.recursion.chunk)


def _forgetter(settings: Settings, seed: int) -> Forgetter | None:
    if settings.method == "default":
        return None
    if settings.method == "finetune" and settings.fit != "svi":
        return FinetuneDraws(settings.finetune_steps, FINETUNE_RATE, seed=seed)
    if settings.method == "finetune":
        num_steps = settings.finetune_steps
        return Finetune(num_steps=num_steps, learning_rate=FINETUNE_RATE, batch_size=128, seed=seed, progress=False)
    if settings.method == "sampler":
        return MoreSteps(last_rule(settings), settings.sampler_steps, seed=seed, progress=False)
    recursion = replace(settings.recursion, seed=seed)
    if settings.fit == "svi":
        return Influence(recursion=recursion)
    return PublishedChain(last_rule(settings), recursion, settings.num_draws, settings.thin, seed=seed, progress=False)


def _predictions(posterior: Posterior, task: Task) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean predictions and labels of the erased, of some retained, and of the test images."""
    images, looked_at = task.images, task.retained[:NUM_RETAINED]
    parts = {
        "erased": (images.x[task.erased], images.y[task.erased]),
        "retained": (images.x[looked_at], images.y[looked_at]),
        "test": (images.x_test, images.y_test),
    }
    draws = _draws(posterior, NUM_DRAWS)
    return {name: (mean_log_probs(_log_probs(posterior, draws, x)), labels) for name, (x, labels) in parts.items()}


def _log_odds(posterior: Posterior, task: Task, seed: int) -> Tensor:
    """Every draw as a function: log odds of nine classes against the last on a few erased and test images.

    Shape (draw, image * 9). Draws of two guides from the same noise would lie too close together.
    """
    x = torch.cat([task.images.x[task.erased[:NUM_LOOKED_AT]], task.images.x_test[:NUM_LOOKED_AT]])
    found = _log_probs(posterior, _draws(posterior, NUM_COMPARED, seed), x)
    return (found[..., :-1] - found[..., -1:]).flatten(1)


def _log_probs(posterior: Posterior, draws: dict[str, Tensor], x: Tensor) -> Tensor:
    """Shape (draw, image, class)."""
    predictive = Predictive(posterior.model, draws, return_sites=("_RETURN",))  # type: ignore[attr-defined]
    with torch.no_grad():
        return predictive(x)["_RETURN"].log_softmax(-1)


def _draws(posterior: Posterior, most: int, seed: int = 0) -> dict[str, Tensor]:
    """So many of a guide; of a chain no more than there are."""
    count = min(most, posterior.num_draws) if isinstance(posterior, SampledPosterior) else most
    return posterior.draws(count, seed)


def _attack(predictions: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """A threshold on the confidence in the true class, fitted on retained against test images."""
    confidence = {name: true_class_probability(value[None], labels) for name, (value, labels) in predictions.items()}
    found = threshold_attack(confidence["erased"], confidence["retained"], confidence["test"])
    return {"accuracy": found.accuracy, "erased_as_strangers": found.erased_as_strangers}
