"""Small networks fitted to three clouds of points, of which some rows are spoiled."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import autoguide
from torch import Tensor

from pyro_forget.data import Data
from pyro_forget.guides import MeanField, local_reparametrization
from pyro_forget.inference.fit import fit_guide
from pyro_forget.models import MLP
from pyro_forget.posterior import SampledPosterior, VariationalPosterior

SPOILED = range(20)


def clouds(num_rows: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three clouds around a centre, of unequal width; the first 20 rows of the first bear the second's label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_rows) % 3
    labels[:20] = 0
    angles = 2.1 * labels + 0.25 * torch.randn(num_rows, generator=generator)
    radius = 1.5 + 0.3 * labels + 0.3 * torch.randn(num_rows, generator=generator)
    x = torch.stack([radius * angles.cos(), radius * angles.sin()], 1)
    labels[:20] = 1
    return x, labels


@cache
def _fitted(kind: str) -> tuple[Any, Data]:
    torch.manual_seed(0)
    pyro.clear_param_store()
    x, y = clouds()
    model: Any = MLP((2, 12, 3))
    data = Data(x, y)
    spread = lambda site: 0.5 * torch.randn(site["fn"].shape())  # noqa: E731
    guides: dict[str, Callable[[Any], Any]] = {
        "local": lambda m: MeanField(m, init_loc_fn=spread, init_scale=0.1),
        "mean-field": lambda m: MeanField(m, init_loc_fn=spread, init_scale=0.1),
        "AutoNormal": lambda m: autoguide.AutoNormal(m, init_loc_fn=spread, init_scale=0.1),
        "delta": lambda m: autoguide.AutoDelta(m, init_loc_fn=spread),
    }
    model = local_reparametrization(model) if kind == "local" else model
    fit = fit_guide(
        model, guides[kind](model), data, num_steps=400, learning_rate=0.03, polish=None, seed=1, progress=False
    )
    return fit.posterior, data


def network(kind: str = "local") -> tuple[VariationalPosterior, Data]:
    """A fitted guide: "local", "mean-field", "AutoNormal" or "delta"."""
    return _fitted(kind)


def drawn(num_draws: int = 6) -> tuple[SampledPosterior, Data]:
    """Draws around the point mass, in two chains."""
    posterior, data = network("delta")
    centre = {name.removeprefix("AutoDelta."): value for name, value in posterior.draws(1).items()}
    generator = torch.Generator().manual_seed(2)
    draws = {
        name: value + 0.1 * torch.randn(2, num_draws // 2, *value.shape[1:], generator=generator)
        for name, value in centre.items()
    }
    return SampledPosterior(MLP((2, 12, 3)), draws, data), data


def regression_network(x: Tensor, y: Tensor | None = None) -> None:
    """One hidden layer of tanh, one output, latent noise."""
    width = 6
    inner = pyro.sample("inner", dist.Normal(torch.zeros(width, x.shape[1]), 1.0).to_event(2))
    outer = pyro.sample("outer", dist.Normal(torch.zeros(width), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x @ inner.T).tanh() @ outer, sigma), obs=y)


def bernoulli_network(x: Tensor, y: Tensor | None = None) -> None:
    """One hidden layer of tanh, two outcomes a row."""
    inner = pyro.sample("inner", dist.Normal(torch.zeros(x.shape[1], 6), 1.0).to_event(2))
    outer = pyro.sample("outer", dist.Normal(torch.zeros(6, 2), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(x @ inner).tanh() @ outer).to_event(1), obs=y)


def bent_network(x: Tensor, y: Tensor | None = None) -> None:
    """No output layer: a tanh comes last."""
    inner = pyro.sample("inner", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x @ inner).tanh(), 1.0), obs=y)


def counts_network(x: Tensor, y: Tensor | None = None) -> None:
    """A likelihood of another family."""
    inner = pyro.sample("inner", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson((x @ inner).exp()), obs=y)


def started(model: Callable[..., Any], data: Data) -> VariationalPosterior:
    """A mean-field guide as it starts, away from zero."""
    pyro.clear_param_store()
    torch.manual_seed(3)
    guide = MeanField(model, init_loc_fn=lambda site: 0.7 + 0.2 * torch.randn(site["fn"].shape()).abs(), init_scale=0.1)
    return VariationalPosterior.started(model, guide, data)
