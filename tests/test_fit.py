"""Fitting guides through the energy that forgetting edits."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive, autoguide
from torch import Tensor

from pyro_forget.data import Batch, Data
from pyro_forget.energy import FunctionEnergy, value_and_gradient
from pyro_forget.guides import MeanField, local_reparametrization
from pyro_forget.inference.fit import Training, adam, fit_guide
from pyro_forget.inference.lbfgs import LBFGS
from pyro_forget.params import Params, flatten
from pyro_forget.posterior import VariationalPosterior
from tests import fits
from tests.oracles import LinearGaussian

GUIDES: dict[str, Any] = {
    "MeanField": MeanField,
    "AutoNormal": autoguide.AutoNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
}


def assert_near(posterior: VariationalPosterior, exact: LinearGaussian, atol: float) -> None:
    torch.testing.assert_close(fits.loc(posterior), exact.mean.double(), rtol=0, atol=atol)
    best = fits.covariance(fits.placed(posterior, exact))
    torch.testing.assert_close(fits.covariance(posterior), best, rtol=0, atol=atol)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("name", GUIDES)
def test_a_linear_gaussian_model_is_fitted_exactly(name: str, local: bool) -> None:
    """Whatever the noise, for its moments are exact."""
    exact, model, data = fits.linear()
    wrapped = local_reparametrization(model) if local else model
    fit = fit_guide(wrapped, GUIDES[name](wrapped), data, num_steps=20, polish_gradient=1e-8, progress=False)
    assert_near(fit.posterior, exact, atol=1e-7)
    assert fit.gradient_norm is not None and fit.gradient_norm < 1e-5
    assert len(fit.losses) < 300  # it stops where rounding lets nothing fall any more
    final = exact.energy(fits.loc(fit.posterior), fits.covariance(fit.posterior))
    assert float(fit.losses[-1]) == pytest.approx(float(final))
    assert fit.posterior.parent is None and torch.equal(fit.posterior.ids, data.ids)


def test_adam_alone_comes_near() -> None:
    exact, model, data = fits.linear()
    settings: dict[str, Any] = {"learning_rate": 0.05, "polish": None, "progress": False}
    fit = fit_guide(model, MeanField(model), data, num_steps=600, batch_size=20, num_draws=4, **settings)
    assert fit.gradient_norm is None and fit.losses.shape == (600,)
    assert float(fit.losses[-50:].mean()) < 0.7 * float(fit.losses[:50].mean())
    gap = (fits.loc(fit.posterior) - exact.mean) / exact.covariance.diagonal().sqrt()
    assert float(gap.abs().max()) < 1


def test_a_hard_coded_number_of_data_does_not_matter() -> None:
    """A plate of 60 around 40 rows would count each for one and a half."""
    exact, _, data = fits.linear()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 2.0).to_event(1))
        with pyro.plate("data", 60):
            pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)

    kept = data.split(range(20, 60))[0]
    fit = fit_guide(model, MeanField(model), kept, num_steps=20, polish_gradient=1e-8, progress=False)
    assert_near(fit.posterior, exact.without(list(range(20))), atol=1e-8)


def test_batches_do_not_matter_to_the_polish() -> None:
    exact, model, data = fits.linear()
    fit = fit_guide(model, MeanField(model), data.with_batch_size(7), num_steps=0, polish_gradient=1e-8, progress=False)
    assert_near(fit.posterior, exact, atol=1e-8)


def learned(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 2.0).to_event(1))
    scale = pyro.param("scale", torch.tensor(3.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, scale), obs=y)


def test_a_models_own_parameters_are_fitted_too() -> None:
    """They need not have been made before."""
    exact, _, data = fits.linear()
    posterior = fit_guide(learned, MeanField(learned), data, num_steps=50, progress=False).posterior
    rows = LinearGaussian(exact.x, exact.y, 2.0, float(posterior.params["model.scale"].exp()))
    assert_near(posterior, rows, atol=1e-4)
    residuals = (exact.y - exact.x @ fits.loc(posterior)).square() + (
        exact.x @ fits.covariance(posterior) * exact.x
    ).sum(1)
    assert rows.noise == pytest.approx(float(residuals.mean().sqrt()), rel=1e-4)
    assert not list(pyro.get_param_store().keys())


# --- what is left alone


def test_the_users_guide_store_and_generator_stay_as_they_were() -> None:
    _, model, data = fits.linear()
    guide = MeanField(model)
    state = torch.get_rng_state()
    first, second = (fit_guide(model, guide, data, num_steps=5, progress=False).posterior for _ in range(2))
    assert guide.prototype_trace is None and not list(guide.parameters())
    assert not list(pyro.get_param_store().keys())
    assert torch.equal(state, torch.get_rng_state())
    assert first.digest == second.digest
    other = fit_guide(model, guide, data, num_steps=5, polish=None, seed=1, progress=False).posterior
    assert other.digest != first.digest


def test_a_fitted_guide_is_where_the_fit_starts() -> None:
    exact, model, data = fits.linear()
    first = fit_guide(model, MeanField(model), data, num_steps=20, polish_gradient=1e-8, progress=False).posterior
    again = fit_guide(model, first.guide, data, num_steps=0, polish_gradient=1e-6, progress=False)
    assert len(again.losses) < 60 and again.posterior.num_data == 60
    assert_near(again.posterior, exact, atol=1e-6)


def test_the_fitted_guide_predicts() -> None:
    exact, model, data = fits.linear()
    posterior = fit_guide(model, MeanField(model), data, num_steps=20, progress=False).posterior
    drawn = Predictive(model, guide=posterior.guide, num_samples=500)(exact.x[:3], None)["weight"].reshape(500, 4)
    assert float((drawn.mean(0) - exact.mean).abs().max()) < 0.1


def test_single_precision(float32: None) -> None:
    exact, model, data = fits.linear()
    posterior = fit_guide(model, MeanField(model), data, num_steps=20, polish_steps=100, progress=False).posterior
    assert all(value.dtype == torch.float32 for value in posterior.params.values())
    assert_near(posterior, exact, atol=1e-3)


def test_an_interrupted_fit_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle: the guide was never touched."""
    _, model, data = fits.linear()
    guide, calls = MeanField(model), []

    def step(self: Any, closure: Any = None) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    with pytest.raises(KeyboardInterrupt):
        fit_guide(model, guide, data, num_steps=10, progress=False)
    assert guide.prototype_trace is None and not list(pyro.get_param_store().keys())


# --- the parts


def quadratic(seed: int | None = None) -> tuple[FunctionEnergy, Data]:
    """Σ (p − y)²; noise moves the minimum by the seed."""
    data = Data(torch.arange(6.0))

    def share(params: Params, batch: Batch) -> Tensor:
        return (params["p"] - batch.args[0] - (seed or 0)).square().sum()

    return FunctionEnergy(share, share), data


def test_patience_stops_a_fit_that_no_longer_falls() -> None:
    energy, data = quadratic()
    start = {"p": torch.tensor(2.5)}  # the minimum
    _, losses = adam(energy, start, data, num_steps=500, learning_rate=0.01, patience=20, progress=False)
    assert len(losses) == 40


def test_adam_is_adam() -> None:
    energy, data = quadratic()
    found, _ = adam(energy, {"p": torch.tensor(0.0)}, data, num_steps=3, learning_rate=0.1, progress=False)
    leaf = torch.tensor(0.0, requires_grad=True)
    optimiser = torch.optim.Adam([leaf], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 3)
    for _ in range(3):
        leaf.grad = 2 * (6 * leaf.detach() - 15)
        optimiser.step()
        schedule.step()
    assert float(found["p"]) == pytest.approx(float(leaf.detach()))


def test_lbfgs_finds_the_minimum_and_says_so() -> None:
    model, data = fits.logistic()
    posterior = fits.started(model, MeanField(model), data)
    energy = posterior.energy.with_noise(1)
    minimum = LBFGS(500, 1e-7, False).minimise(energy, posterior.params, data.with_batch_size(7))
    _, gradient = value_and_gradient(lambda leaves: energy.total(leaves, data), minimum.params)
    assert float(flatten(gradient).norm()) == pytest.approx(minimum.gradient_norm, abs=1e-9)
    assert minimum.gradient_norm < 1e-6
    short = LBFGS(3, 1e-7, False).minimise(energy, posterior.params, data)
    assert short.gradient_norm > 1e-7 and float(short.losses[-1]) < float(short.losses[0])


def test_a_bar_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    _, model, data = fits.linear()
    fit_guide(model, MeanField(model), data, num_steps=3, polish_steps=20)
    assert "fit:" in (shown := capsys.readouterr().err) and "polish:" in shown
    fit_guide(model, MeanField(model), data, num_steps=3, polish_steps=20, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"polish": "adam"}, "`polish` must be 'lbfgs' or None, got 'adam'"),
        ({"num_steps": -1}, "`num_steps` must not be negative"),
        ({"learning_rate": 0.0}, "`learning_rate` positive"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Training(**settings)
    _, model, data = fits.linear()
    with pytest.raises(ValueError, match=words):
        fit_guide(model, MeanField(model), data, **settings)


def test_a_fit_that_diverges_is_an_error() -> None:
    def share(params: Params, batch: Batch) -> Tensor:
        return params["p"] / batch.args[0].sum()

    energy, data = FunctionEnergy(share, share), Data(torch.zeros(3))
    with pytest.raises(ValueError, match="The energy is inf"):
        adam(energy, {"p": torch.tensor(1.0)}, data, num_steps=5, learning_rate=0.5, progress=False)
