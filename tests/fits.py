"""Small fitted posteriors, and what a refit without some rows would have given: exactly, or under the same noise."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_forget.data import Data
from pyro_forget.evaluation import gaussian_kl
from pyro_forget.gaussian import Gaussian
from pyro_forget.guides import MeanField, local_reparametrization
from pyro_forget.inference.fit import fit_guide
from pyro_forget.inference.lbfgs import LBFGS
from pyro_forget.models import HierarchicalRegression, LinearRegression, LogisticRegression, PoissonRegression
from pyro_forget.params import unflatten
from pyro_forget.posterior import VariationalPosterior
from tests.oracles import LinearGaussian

Model = Callable[..., Any]
PINNED = 2**20  # the seed of the noise that `fit_guide` polishes under


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear() -> tuple[LinearGaussian, LinearRegression, Data]:
    """60 rows of 4 columns, of which the last 20 have a first column that counts for more."""
    x = normal(0, 60, 4) * torch.tensor([1.0, 2.0, 0.5, 1.0])
    y = x @ torch.tensor([1.0, -1.0, 2.0, 0.5]) + 0.7 * normal(1, 60)
    y[40:] += 3 * x[40:, 0]
    return LinearGaussian(x, y, 2.0, 0.7), LinearRegression(4, prior_std=2.0, noise_std=0.7), Data(x, y)


def logistic(seed: int = 0) -> tuple[Model, Data]:
    """60 rows of 4 columns of standard deviations 1 to 2, weights from the prior."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 4, generator=generator) * torch.tensor([1.0, 1.3, 1.6, 2.0])
    weights = torch.randn(4, generator=generator)
    y = (torch.rand(60, generator=generator) < (x @ weights).sigmoid()).to(x)
    return LogisticRegression(4), Data(x, y)


def poisson(seed: int = 0) -> tuple[Model, Data]:
    """60 counts of about 2, on three columns and a constant."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([0.5 * torch.randn(60, 3, generator=generator), torch.ones(60, 1)], 1)
    weights = torch.cat([0.7 * torch.randn(3, generator=generator), torch.tensor([0.5])])
    return PoissonRegression(4), Data(x, torch.poisson((x @ weights).exp(), generator=generator))


def hierarchical(seed: int = 0, centred: bool = True) -> tuple[Model, Data]:
    """90 rows in 6 groups, each with an intercept and a slope of its own; three latent scales."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.stack([torch.ones(90), torch.randn(90, generator=generator)], 1)
    effect = torch.tensor([0.5, 1.0]) + torch.tensor([1.0, 0.5]) * torch.randn(6, 2, generator=generator)
    group = torch.arange(90) % 6
    y = (x * effect[group]).sum(-1) + 0.5 * torch.randn(90, generator=generator)
    return HierarchicalRegression(2, 6, centred=centred), Data(x, group, y)


def local_mean_field(model: Model) -> tuple[Model, Model]:
    """(the model under local reparametrisation, a mean-field guide of it)."""
    wrapped = local_reparametrization(model)
    return wrapped, MeanField(wrapped)


def some(data: Data, share: float, seed: int = 0) -> list[int]:
    """The ids of a random share of the rows, at least one."""
    order = torch.randperm(data.num_data, generator=torch.Generator().manual_seed(seed))
    return data.ids[order[: max(1, int(share * data.num_data))]].tolist()


def started(model: Model, guide: Model, data: Data) -> VariationalPosterior:
    pyro.clear_param_store()
    return VariationalPosterior.started(model, guide, data)


def fitted(model: Model, guide: Model, data: Data, **settings: Any) -> VariationalPosterior:
    """A guide at the minimum under its pinned noise, after a few hundred steps of Adam."""
    pyro.clear_param_store()
    chosen = {"num_steps": 100, "learning_rate": 0.05, "polish_gradient": 1e-5, "progress": False} | settings
    return fit_guide(model, guide, data, **chosen).posterior


def refitted(posterior: VariationalPosterior, retained: Data, pairs: int | None = None) -> VariationalPosterior:
    """The minimum over the retained rows, under the noise that the posterior was polished under."""
    energy = posterior.energy.with_noise(PINNED, pairs)
    return posterior.with_params(LBFGS(200, 1e-5, False).minimise(energy, posterior.params, retained).params)


def distance(first: VariationalPosterior, second: VariationalPosterior) -> float:
    """KL(first ‖ second) of the guides' Gaussians, nats."""
    return float(gaussian_kl(*flat(first), *flat(second)))


def remaining(after: VariationalPosterior, before: VariationalPosterior, refit: VariationalPosterior) -> float:
    """The remaining fraction: what is left of the distance to the refit."""
    return distance(after, refit) / distance(before, refit)


def energy_left(
    after: VariationalPosterior, before: VariationalPosterior, refit: VariationalPosterior, retained: Data
) -> float:
    """The same in the energy of the retained rows, for guides whose distance has no closed form."""
    energy = refit.energy.with_noise(PINNED)
    values = [float(energy.total(posterior.params, retained).detach()) for posterior in (after, before, refit)]
    return (values[0] - values[2]) / (values[1] - values[2])


def placed(posterior: VariationalPosterior, exact: LinearGaussian) -> VariationalPosterior:
    """The best guide of its family for this posterior."""
    assert posterior.gaussian is not None and posterior.energy.whole.view is not None
    own, view = posterior.gaussian, posterior.energy.whole.view
    scale = unflatten(exact.mean_field, own.loc) if own.is_diagonal else torch.linalg.cholesky(exact.covariance)
    return posterior.with_params(view.write(posterior.params, Gaussian(unflatten(exact.mean, own.loc), scale)))


def placed_like(posterior: VariationalPosterior, other: VariationalPosterior) -> VariationalPosterior:
    """This guide with the other's Gaussian."""
    assert other.gaussian is not None and posterior.energy.whole.view is not None
    return posterior.with_params(posterior.energy.whole.view.write(posterior.params, other.gaussian))


def flat(posterior: VariationalPosterior) -> tuple[Tensor, Tensor]:
    """(loc, scale) of the guide's Gaussian over all sites."""
    assert posterior.gaussian is not None
    return posterior.gaussian.flat()


def loc(posterior: VariationalPosterior) -> Tensor:
    return flat(posterior)[0]


def covariance(posterior: VariationalPosterior) -> Tensor:
    scale = flat(posterior)[1]
    return torch.diag(scale.square()) if scale.ndim == 1 else scale @ scale.mT
