"""A common shift of draws as a point: the energy's mean over draws, one of them a batch."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_forget.data import Data
from pyro_forget.energy.points import DrawPoints, prior_gradient
from pyro_forget.energy.shift import ShiftPoints
from pyro_forget.forgetters.network import Network
from pyro_forget.inference.paired import PairedSteps
from pyro_forget.params import Params, add
from pyro_forget.posterior import SampledPosterior


def affine(x: Tensor, y: Tensor | None = None) -> None:
    """Priors in closed form, at another place than zero."""
    weight = pyro.sample("weight", dist.Normal(0.3 * torch.ones(2), torch.tensor([0.5, 2.0])).to_event(1))
    bias = pyro.sample("bias", dist.Normal(0.0, 1.5))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weight + bias, 0.5), obs=y)


def scaled(x: Tensor, y: Tensor | None = None) -> None:
    """A prior whose scale is latent, and a positive site with its Jacobian."""
    tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), tau).to_event(1))
    bias = pyro.sample("bias", dist.Normal(0.0, 1.5))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x @ weight).tanh() + bias, 0.5), obs=y)


def cloud(model: Callable[..., Any], num_draws: int = 5) -> tuple[SampledPosterior, Data]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, generator=generator) + torch.tensor([1.0, -0.5])
    y = x @ torch.tensor([1.0, -2.0]) + 0.5 * torch.randn(40, generator=generator)
    y[:6] += 4.0
    draws = {"weight": torch.randn(1, num_draws, 2, generator=generator)}
    draws["bias"] = torch.randn(1, num_draws, generator=generator)
    if model is scaled:
        draws["tau"] = torch.rand(1, num_draws, generator=generator) + 0.5
    data = Data(x, y)
    return SampledPosterior(model, draws, data), data


def points_of(model: Callable[..., Any]) -> tuple[ShiftPoints, DrawPoints, Params, Data]:
    posterior, data = cloud(model)
    flat = {name: value.flatten(0, 1) for name, value in posterior.params.items()}
    return ShiftPoints.of(posterior.energy, flat), DrawPoints(posterior.energy), flat, data


@pytest.mark.parametrize("model", [affine, scaled])
def test_it_is_the_draws_energy_at_shifted_draws(model: Callable[..., Any]) -> None:
    """Likelihood draw by draw, prior in the mean: value up to a constant, and slope."""
    shifts, draws, flat, data = points_of(model)
    assert shifts.closed == (model is affine)
    point = {name: 0.3 * torch.ones_like(value[0]) for name, value in flat.items()}
    batch, origin = next(data.batches()), {name: torch.zeros_like(value) for name, value in point.items()}
    changes = []
    for place in range(5):
        there = add({name: value[place] for name, value in flat.items()}, point)
        run = shifts.run(point, batch, {"draw": torch.tensor(place)})
        assert torch.allclose(run.log_likelihood(), draws.run(there, batch, {}).log_likelihood())
        changes.append(draws.prior(there, 0) - draws.prior({n: v[place] for n, v in flat.items()}, 0))
    assert torch.allclose(shifts.prior(point, 0) - shifts.prior(origin, 0), torch.stack(changes).mean())
    found = prior_gradient(shifts, {name: value[None] for name, value in point.items()}, 0)
    wanted = prior_gradient(draws, add(flat, {n: v.expand_as(flat[n]) for n, v in point.items()}), 0)
    for name, value in found.items():
        assert torch.allclose(value[0], wanted[name].mean(0))


def test_its_noise_is_a_draw_by_chance() -> None:
    shifts, *_, data = points_of(affine)
    batch = next(data.batches())
    places = [int(shifts.noise(batch, seed)["draw"]) for seed in range(400)]
    counts = torch.bincount(torch.tensor(places), minlength=5)
    assert len(counts) == 5 and bool(((counts - 80).abs() < 45).all())
    assert places[:20] == [int(shifts.noise(batch, seed)["draw"]) for seed in range(20)]


def test_descent_ends_at_the_newton_step_of_a_quadratic_energy() -> None:
    """All draws share one Hessian, so H⁻¹∇h is exact; its sign is the spoiled rows'."""
    posterior, data = cloud(affine)
    erased, retained = data.split(range(6))
    network = Network.of(posterior, erased, 0)
    problem = network.problem(retained, 0, slice(None))
    rule = PairedSteps(1500, 0.05, problem.rows.num_data, beta=1.0, shrink=False)
    found = rule.run(problem, None).params
    # The rows to descend on stand for all retained ones, as they do in the steps.
    rows = next(problem.rows.with_batch_size(problem.rows.num_data).batches())
    design = torch.cat([rows.args[0], torch.ones(len(rows), 1)], 1)
    weight = retained.num_data / len(rows)
    hessian = weight * design.T @ design / 0.25 + torch.diag(torch.tensor([4.0, 0.25, 1 / 2.25]))
    gone = next(erased.batches())
    seen = torch.cat([gone.args[0], torch.ones(6, 1)], 1)
    mean = torch.cat([posterior.params["weight"][0].mean(0), posterior.params["bias"][0].mean(0, keepdim=True)])
    force = seen.T @ (seen @ mean - gone.args[1]) / 0.25
    wanted = torch.linalg.solve(hessian, force)
    assert float(wanted.norm()) > 0.1
    assert torch.allclose(torch.cat([found["weight"][0], found["bias"]]), wanted, atol=1e-3)


def test_likelihoods_are_taken_a_few_draws_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, data = cloud(scaled, num_draws=7)
    whole = posterior.log_likelihood(data)
    monkeypatch.setattr("pyro_forget.posterior.sampled._ROWS_AT_ONCE", 3 * len(data))
    assert whole.shape == (1, 7, 40) and torch.allclose(posterior.log_likelihood(data), whole)
