"""Sixty rows, four models, three guides: what forgetting leaves of the distance to a refit under the same noise."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import autoguide
from torch import Tensor

from benchmarks.clock import timed
from pyro_forget.data import Data
from pyro_forget.evaluation import gaussian_kl
from pyro_forget.forgetters.influence import Influence
from pyro_forget.guides import MeanField
from pyro_forget.inference.fit import fit_guide
from pyro_forget.inference.lbfgs import LBFGS
from pyro_forget.models import HierarchicalRegression, LogisticRegression, PoissonRegression
from pyro_forget.posterior import VariationalPosterior

SEEDS = range(5)
NUM_ROWS = 60
PINNED = 2**20  # the noise of fit and refit; forgetting uses the seeds 1 and 2
GUIDES = {
    "MeanField": MeanField,
    "AutoNormal": autoguide.AutoNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
}
Model = Callable[..., Any]


def logistic(generator: torch.Generator) -> tuple[Model, Data]:
    """Four columns of standard deviations 1 to 2, weights from the prior."""
    x = torch.randn(NUM_ROWS, 4, generator=generator) * torch.linspace(1, 2, 4)
    weights = torch.randn(4, generator=generator)
    y = (torch.rand(NUM_ROWS, generator=generator) < (x @ weights).sigmoid()).to(x)
    return LogisticRegression(4), Data(x, y)


def poisson(generator: torch.Generator) -> tuple[Model, Data]:
    """Counts of about 2 on three columns and a constant."""
    x = torch.cat([0.5 * torch.randn(NUM_ROWS, 3, generator=generator), torch.ones(NUM_ROWS, 1)], 1)
    weights = torch.cat([0.7 * torch.randn(3, generator=generator), torch.tensor([0.5])])
    return PoissonRegression(4), Data(x, torch.poisson((x @ weights).exp(), generator=generator))


def hierarchical(generator: torch.Generator, centred: bool) -> tuple[Model, Data]:
    """Six groups, each with an intercept and a slope of its own; three latent scales."""
    x = torch.stack([torch.ones(NUM_ROWS), torch.randn(NUM_ROWS, generator=generator)], 1)
    effect = torch.tensor([0.5, 1.0]) + torch.tensor([1.0, 0.5]) * torch.randn(6, 2, generator=generator)
    group = torch.arange(NUM_ROWS) % 6
    y = (x * effect[group]).sum(-1) + 0.5 * torch.randn(NUM_ROWS, generator=generator)
    return HierarchicalRegression(2, 6, centred=centred), Data(x, group, y)


@dataclass(frozen=True)
class Family:
    """A model with its data, and the shares of the rows that are erased."""

    make: Callable[[torch.Generator], tuple[Model, Data]]
    shares: tuple[float, ...]


FAMILIES = {
    "logistic": Family(logistic, (0.02, 0.1, 0.3, 0.6)),
    "Poisson": Family(poisson, (0.02, 0.1, 0.3, 0.6)),
    "hierarchical, centred": Family(lambda generator: hierarchical(generator, True), (0.1, 0.3, 0.6)),
    "hierarchical, non-centred": Family(lambda generator: hierarchical(generator, False), (0.1, 0.3, 0.6)),
}


def records(seed: int) -> Iterator[dict[str, Any]]:
    """One record a model, guide and share."""
    for name, family in FAMILIES.items():
        model, data = family.make(torch.Generator().manual_seed(seed))
        for guide, make in GUIDES.items():
            fit = _fitted(model, make(model), data, seed)
            for share in family.shares:
                count = max(1, round(share * NUM_ROWS))
                order = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(1000 + seed))
                yield {"model": name, "guide": guide, "share": share, "seed": seed} | _forgotten(
                    fit, data, order[:count], seed
                )


def _fitted(model: Model, guide: Model, data: Data, seed: int) -> VariationalPosterior:
    pyro.clear_param_store()
    settings = {"num_steps": 200, "learning_rate": 0.05, "polish_gradient": 1e-5, "progress": False, "seed": seed}
    return fit_guide(model, guide, data, **settings).posterior


def _forgotten(fit: VariationalPosterior, data: Data, erased: Tensor, seed: int) -> dict[str, Any]:
    erased_data, retained = data.split(erased)
    energy = fit.energy.with_noise(PINNED + seed)
    found, refit_seconds = timed(lambda: LBFGS(400, 1e-5, False).minimise(energy, fit.params, retained))
    refit = fit.with_params(found.params)
    before = distance(fit, refit)
    edit, seconds = timed(lambda: Influence().edit(fit, *data.split(erased)))
    once = Influence(max_sweeps=1).edit(fit, erased_data, retained)
    return {
        "before": before,
        "one_sweep": distance(once.posterior, refit) / before,
        "remaining": distance(edit.posterior, refit) / before,
        "seconds": seconds,
        "refit_seconds": refit_seconds,
        "refit_gradient": found.gradient_norm,
        "refused": edit.evidence.refused,
        "warnings": list(edit.evidence.warnings),
        "solver": edit.evidence.solver,
        "sweeps": len(edit.evidence.sweeps),
        "dampings": [sweep.damping for sweep in edit.evidence.sweeps],
        "stationarity": edit.evidence.stationarity,
    }


def distance(first: VariationalPosterior, second: VariationalPosterior) -> float:
    """KL(first ‖ second) of the guides' Gaussians, nats."""
    return float(gaussian_kl(*first.gaussian.flat(), *second.gaussian.flat()))
