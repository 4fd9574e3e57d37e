"""The mixture with its assignments summed out, its bound, and the study on simulated points."""

from dataclasses import replace
from pathlib import Path

import pyro
import pytest
import torch
from torch.distributions import kl_divergence

from experiments.gaussian_mixture.figures import summarise
from experiments.gaussian_mixture.fit import Centres
from experiments.gaussian_mixture.settings import Settings
from experiments.gaussian_mixture.study import run
from experiments.gaussian_mixture.task import Task
from pyro_forget.data import Data
from pyro_forget.forgetters import PublishedChain, Transport
from pyro_forget.inference.recursion import Recursion
from pyro_forget.models import GaussianMixture
from pyro_forget.store import save_json

SMALL = Settings(data="simulated", num_points=200, num_components=3, num_erased=60, chunk=30)


def points(count: int = 12) -> torch.Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(3))


def test_the_model_is_the_mixture_written_out() -> None:
    model, x = GaussianMixture(3, std=0.7, prior_std=2.0), points()
    trace = pyro.poutine.trace(model).get_trace(x)
    centres = trace.nodes["centres"]["value"]
    by_component = torch.distributions.Normal(centres, 0.7).log_prob(x[:, None]).sum(-1)
    rows = (by_component.exp().mean(-1)).log()
    prior = torch.distributions.Normal(0.0, 2.0).log_prob(centres).sum()
    torch.testing.assert_close(trace.log_prob_sum(), rows.sum() + prior)


def test_the_bound_is_the_elbo_at_the_best_responsibilities() -> None:
    """No other responsibilities give a larger one; the divergence is that of torch."""
    model, x = GaussianMixture(3, std=0.8, prior_std=1.5), points()
    params = {"loc": points(3), "log_scale": points(6)[3:] - 1}
    q = torch.distributions.Normal(params["loc"], params["log_scale"].exp())
    expected = torch.distributions.Normal(params["loc"], 0.8).log_prob(x[:, None]).sum(-1)
    expected = expected - 0.5 * ((2 * params["log_scale"]).exp() / 0.8**2).sum(-1)

    def elbo(responsibilities: torch.Tensor) -> torch.Tensor:
        return (responsibilities * (expected - responsibilities.log() - torch.tensor(3.0).log())).sum()

    best = expected.softmax(-1)
    divergence = kl_divergence(q, torch.distributions.Normal(torch.zeros(3, 2), 1.5)).sum()
    energy = float(model.bound().total(params, Data(x)))
    assert energy == pytest.approx(float(divergence - elbo(best)))
    other = (expected + 0.3 * torch.randn(12, 3, generator=torch.Generator().manual_seed(1))).softmax(-1)
    assert energy < float(divergence - elbo(other))


def test_energies_of_parts_add_up_and_batches_do_not_matter() -> None:
    energy, x = GaussianMixture(3).bound(), points()
    params = {"loc": points(3), "log_scale": points(6)[3:] - 1}
    data = Data(x)
    erased, retained = data.split([0, 4, 7])
    share = sum(float(energy.share(params, batch)) for batch in erased.batches())
    total = float(energy.total(params, data))
    assert total - float(energy.total(params, retained)) == pytest.approx(share)
    assert float(energy.total(params, data.with_batch_size(5))) == pytest.approx(total)


def test_the_predictive_density_integrates_the_posterior_out() -> None:
    model, loc, scale = GaussianMixture(2, num_dims=1), torch.tensor([[-1.0], [2.0]]), torch.tensor([[0.3], [0.8]])
    grid = torch.linspace(-15, 15, 3001)
    density = model.log_density(loc, scale, grid[:, None]).exp()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0)
    draws = loc + scale * torch.randn(200_000, 2, 1, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([0.5])
    sampled = torch.distributions.Normal(draws, 1.0).log_prob(at).exp().mean()
    assert float(model.log_density(loc, scale, at[None]).exp()) == pytest.approx(float(sampled), rel=1e-2)


def test_components_are_matched_before_any_distance() -> None:
    like = Centres(torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]]), torch.ones(3, 2))
    moved = Centres(like.loc[[2, 0, 1]] + 0.4, like.std)
    assert moved.loc[moved.order_like(like)].sub(like.loc).abs().max() == pytest.approx(0.4)


@pytest.mark.parametrize("method", ["default", "published"])
def test_the_study_forgets_and_draws_what_it_found(method: str, tmp_path: Path) -> None:
    settings = replace(SMALL, method=method)
    found = run(settings, 0, "cpu", tmp_path)
    assert found["remaining"] < (0.02 if method == "default" else 1.0)
    assert found["floor"] < 1e-6
    before, after = found["density"]["before"], found["density"]["after"]
    assert after["erased"] < before["erased"]
    assert after["retained"] > before["retained"]
    assert len(found["requests"]) == 2
    folder = tmp_path / "gaussian_mixture" / "simulated" / "variational" / method / "published-seed0"
    folder.mkdir(parents=True)
    about = {"experiment": "gaussian_mixture", "seed": 0, "settings": settings.__dict__}
    save_json(folder / "settings.json", about)
    save_json(folder / "result.json", found)
    summarise(tmp_path)
    assert (tmp_path / "gaussian_mixture" / "simulated-variational-seed0.png").stat().st_size > 10_000
    assert f"| simulated | variational | {method} | 0 |" in (tmp_path / "gaussian_mixture" / "table.md").read_text()


@pytest.mark.parametrize("fit", ["sgld", "sghmc"])
def test_the_chain_goes_on_at_its_last_step_size(fit: str) -> None:
    fitting = replace(SMALL, fit=fit).fitting()
    method = fitting.forgetter("published", 200, 3)
    assert isinstance(method, PublishedChain) and (method.num_draws, method.thin, method.seed) == (500, 4, 3)
    sizes = [200 * method.rule.schedule.step_size(step) for step in (0, 1_000)]
    assert sizes == pytest.approx([(4.0 if fit == "sgld" else 2.0) * 4_000**-0.15] * 2)
    assert method.recursion == Recursion(1.0, 32, batch_size=64, num_draws=5, chunk=4)
    assert isinstance(fitting.forgetter("default", 200, 3), Transport)


def test_drawing_again_is_timed_apart_from_forgetting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Settings.fitting
    monkeypatch.setattr(Settings, "fitting", lambda self: replace(whole(self), num_steps=100, num_draws=50))
    own = replace(SMALL, fit="sgld", num_erased=16, chunk=8, recursion_steps=4)
    found = run(replace(own, method="published"), 0, "cpu", tmp_path)
    for name in ("seconds", "draw_seconds"):
        assert found[name] == pytest.approx(sum(step[name] for step in found["requests"])) and found[name] > 0
    found = run(replace(own, method="default"), 0, "cpu", tmp_path)
    assert found["seconds"] > 0 == found["draw_seconds"]


def test_settings_that_are_not_known_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"`fit` is 'hmc': choose from variational, sgld, sghmc"):
        replace(SMALL, fit="hmc")
    with pytest.raises(ValueError, match="lower --num-erased"):
        replace(SMALL, num_erased=190).task(0)


def test_points_go_to_the_device_and_ids_do_not() -> None:
    """On the device without values, which every machine has."""
    here, there = SMALL.task(0), SMALL.task(0).to("meta")
    assert there.points.device.type == "meta"
    (batch,) = there.data.split(there.erased)[0].batches()
    assert batch.args[0].device.type == "meta"
    assert torch.equal(there.erased, here.erased) and torch.equal(there.retained, here.retained)


def test_the_study_runs_on_the_device_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(Task, "to", lambda task, device: asked.append(device) or task)
    run(replace(SMALL, num_erased=4, chunk=4), 0, "abacus", tmp_path)
    assert asked == ["abacus"]


@pytest.mark.gpu
@pytest.mark.parametrize("fit", ["variational", "sgld"])
def test_the_study_on_a_device(fit: str, tmp_path: Path) -> None:
    settings = replace(SMALL, fit=fit, num_erased=30)
    task, fitting = settings.task(0).to("cuda"), settings.fitting()
    posterior = fitting.fitted(task.data, 0)
    assert {value.device.type for value in posterior.params.values()} == {"cuda"}
    there, here = (run(settings, 0, device, tmp_path) for device in ("cuda", "cpu"))
    # Minima of one energy; chains have other noise on every device.
    assert there["remaining"] == pytest.approx(here["remaining"], abs=1e-3 if fit == "variational" else 1.0)


def test_points_that_are_not_there_say_where_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYRO_FORGET_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="--data-root"):
        Settings().task(0)
