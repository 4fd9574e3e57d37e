"""Requests for whoever exports or shows them: posteriors with exact answers, and reports of every kind.

One model for all: a normal mean with known noise, so that every posterior is known exactly, and a matrix beside it that
no datum says anything about.
"""

from dataclasses import dataclass, replace
from functools import cache

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from xarray import DataTree

from pyro_forget.data import Data
from pyro_forget.export import to_datatree
from pyro_forget.guides import MeanField
from pyro_forget.outcome import Evidence, Report, Sweep
from pyro_forget.posterior import SampledPosterior, VariationalPosterior

ERASED = range(100, 108)
PRECISION = 0.01  # of the prior of `mean`


def model(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, PRECISION**-0.5))
    pyro.sample("weight", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@dataclass(frozen=True)
class Request:
    """40 values with ids from 100, of which the first 8, far from the rest, are erased."""

    data: Data
    retained: Data
    before: VariationalPosterior
    after: VariationalPosterior
    refit: VariationalPosterior


def exact(y: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of `mean` given y."""
    precision = PRECISION + len(y)
    return float(y.sum()) / precision, precision**-0.5


def values(data: Data) -> Tensor:
    return data.gather(lambda batch: batch.args[0])


def at(posterior: VariationalPosterior, loc: float, sd: float, ids: Tensor) -> VariationalPosterior:
    """The posterior with this mean and standard deviation of `mean`."""
    values = {
        "loc.mean": torch.tensor(loc),
        "log_scale.mean": torch.tensor(sd).log(),
        "loc.weight": torch.zeros(2, 3),
        "log_scale.weight": torch.zeros(2, 3),
    }
    return posterior.edited({name: values[name.removesuffix("_unconstrained")] for name in posterior.params}, ids)


@cache
def request() -> Request:
    y = torch.randn(40, generator=torch.Generator().manual_seed(1))
    y[:8] += 3.0
    data = Data.of((y,), ids=range(100, 140))
    _, retained = data.split(ERASED)
    guide = MeanField(model)
    guide(y)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1)  # the energy's gradient vanishes nowhere
    before = at(VariationalPosterior(model, guide, data), *exact(y), data.ids)
    loc, sd = exact(values(retained))
    return Request(data, retained, before, at(before, loc + 0.01, sd, retained.ids), at(before, loc, sd, retained.ids))


@cache
def cloud() -> SampledPosterior:
    """Four chains of draws near what remains: off by a third of a standard deviation, wider, without weights."""
    loc, sd = exact(values(request().retained))
    noise = torch.randn(4, 250, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(4, 250, 2, 3, generator=torch.Generator().manual_seed(3))
    draws = {"mean": loc + sd / 3 + 1.2 * sd * noise, "weight": weight}
    return SampledPosterior(model, draws, request().retained)


@cache
def weighted_cloud() -> SampledPosterior:
    """The same draws with the weights that make them exact."""
    loc, sd = exact(values(request().retained))
    mean = cloud().latents["mean"]
    log_weights = dist.Normal(loc, sd).log_prob(mean) - dist.Normal(loc + sd / 3, 1.2 * sd).log_prob(mean)
    return cloud().edited(cloud().params, cloud().ids, log_weights)


@cache
def tree() -> DataTree:
    """The request as it is exported."""
    case, account = request(), report(STEPS)
    return to_datatree(case.after, case.retained, before=case.before, refit=case.refit, report=account, num_draws=200)


@cache
def weighted_tree() -> DataTree:
    """The weighted draws as they are exported."""
    return to_datatree(weighted_cloud(), request().retained, report=report(WEIGHTS))


def report(evidence: Evidence, warnings: tuple[str, ...] = ()) -> Report:
    return Report(
        num_data=40,
        num_erased=8,
        num_retained=32,
        seconds=0.123,
        evidence=evidence,
        log_likelihood_before=-4.1,
        log_likelihood_after=-5.2,
        kl=3.4,
        warnings=warnings,
    )


STEPS = Evidence(
    method="Influence(solver=Lanczos, max_sweeps=6)",
    solver="converged",
    num_products=40,
    residual=2e-7,
    damping=0.5,
    sweeps=(
        Sweep(0.0, 5.2, 5.0, 4.9, 0.3, 0.31, 0.3, 20),
        Sweep(0.5, 0.04, 0.041, 0.035, 0.001, 0.001, 0.0011, 20),
    ),
    predicted_fall=5.541,
    realised_fall=5.352,
    held_out_fall=5.2361,
    untilted_fall=5.1,
    stationarity=0.02,
    step_norm={"mean": 0.6, "weight": 0.0},
)
WEIGHTS = Evidence(
    method="Transport()",
    ess=812.0,
    ess_held_out=790.0,
    khat=0.32,
    num_draws=1000,
    num_passes=3,
    rhat_input=1.002,
    ess_input=950.0,
    step_norm={"mean": 0.6},
    extra={"level": "trusted"},
)
POOR = replace(WEIGHTS, khat=float("inf"), ess=3.0, ess_held_out=float("nan"))
REFUSED = Evidence(method="Influence()", refused="no step lowered the energy under held-out noise.")
