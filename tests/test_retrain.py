"""Fitting again from scratch: guides made anew, draws sampled anew."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, NUTS, SVI, Trace_ELBO, autoguide
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pyro_forget.data import Data
from pyro_forget.effects.adoption import first_params
from pyro_forget.energy import FunctionEnergy
from pyro_forget.evaluation import gaussian_kl
from pyro_forget.forgetters.retrain import Retrain
from pyro_forget.forgetting import Refused, forget
from pyro_forget.guides import MeanField
from pyro_forget.posterior import EnergyPosterior, SampledPosterior, VariationalPosterior
from tests import fits
from tests.oracles import LinearGaussian

QUICK = Retrain(num_steps=30, progress=False)
LAST = range(40, 60)


def trained(model: Any, guide: Any, data: Data, num_steps: int = 40) -> VariationalPosterior:
    """An SVI run of Pyro's own, taken over."""
    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    batch = next(data.batches())
    for _ in range(num_steps):
        svi.step(*batch.args)
    return VariationalPosterior(model, guide, data)


# --- guides


@pytest.mark.parametrize("make", [MeanField, autoguide.AutoNormal, autoguide.AutoMultivariateNormal])
def test_a_guide_is_fitted_to_what_is_left(make: Callable[[Any], Any]) -> None:
    exact, model, data = fits.linear()
    before = trained(model, make(model), data)
    after, report = forget(before, *data.split(LAST), QUICK)
    assert fits.distance(after, fits.placed(after, exact.without(list(LAST)))) < 1e-8
    assert report.evidence.method == ("retraining from scratch: 30 steps of Adam at 0.01, then L-BFGS on pinned noise")
    assert report.evidence.solver == "converged" and report.evidence.untilted_fall > 0 and not report.warnings
    assert after.parent == before.digest


def test_the_plate_counts_each_row_once() -> None:
    exact, _, data = fits.linear()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 2.0).to_event(1))
        with pyro.plate("data", 60):
            pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)

    after, _ = forget(trained(model, MeanField(model), data), *data.split(LAST), QUICK)
    assert fits.distance(after, fits.placed(after, exact.without(list(LAST)))) < 1e-8


def by_function(x: Tensor, y: Tensor | None = None) -> None:
    loc = pyro.param("loc", torch.full((4,), 0.25))
    scale = pyro.param("scale", torch.full((4,), 0.5), constraint=dist.constraints.positive)
    pyro.sample("weight", dist.Normal(loc, scale).to_event(1))


def mixed(model: Any) -> Any:
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(pyro.poutine.block(model, expose=["weight"])))
    guide.append(autoguide.AutoDelta(pyro.poutine.block(model, expose=["noise_std"])))
    return guide


MADE_ANEW: dict[str, Callable[[Any], Any]] = {
    "MeanField": MeanField,
    "AutoNormal": autoguide.AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRank": autoguide.AutoLowRankMultivariateNormal,
    "AutoStructured": lambda model: autoguide.AutoStructured(model, conditionals="mvn", dependencies="linear"),
    "AutoIAFNormal": autoguide.AutoIAFNormal,
    "AutoDelta": autoguide.AutoDelta,
    "AutoGuideList": mixed,
}


@pytest.mark.parametrize("name", MADE_ANEW)
def test_a_guide_starts_where_a_new_one_does(name: str) -> None:
    """Not where the old one ended, whose parameters the erased rows shaped; and the old one stays."""
    _, _, data = fits.linear()
    model = fits.LinearRegression(4, noise_std=None)
    guide = MADE_ANEW[name](model)
    posterior = trained(model, guide, data)
    own = {key: value.detach().clone() for key, value in guide.named_parameters()}
    stored = {key: value.detach().clone() for key, value in pyro.get_param_store().items()}
    start = first_params(posterior.energy.whole.guide, data, seed=3)
    pyro.clear_param_store()
    new = MADE_ANEW[name](model)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        new(*next(data.batches()).args)
    assert start.keys() == posterior.params.keys()
    for key, value in new.named_parameters():
        torch.testing.assert_close(start[key], value.detach())
    assert any(not torch.equal(start[key], posterior.params[key]) for key in start)
    assert all(torch.equal(value, own[key]) for key, value in guide.named_parameters())
    trained(model, MADE_ANEW[name](model), data, num_steps=1)  # the store is whole
    assert set(pyro.get_param_store().keys()) == set(stored)


def test_a_guide_that_is_a_function_starts_from_its_first_values() -> None:
    exact, model, data = fits.linear()
    before = trained(model, by_function, data)
    start = first_params(before.energy.whole.guide, data)
    assert torch.equal(start["loc"], torch.full((4,), 0.25))
    torch.testing.assert_close(start["scale"], torch.full((4,), 0.5).log())
    after, _ = forget(before, *data.split(LAST), QUICK)
    assert fits.distance(after, fits.placed(after, exact.without(list(LAST)))) < 1e-8


class Own(PyroModule):
    """A module with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(4))
        self.scale = PyroParam(torch.ones(4), dist.constraints.positive)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("weight", dist.Normal(self.loc, self.scale).to_event(1))


def test_a_module_that_cannot_be_made_anew_is_refused() -> None:
    _, model, data = fits.linear()
    before = trained(model, Own(), data)
    with pytest.raises(Refused, match="Own is a module whose parameters were made when it was"):
        forget(before, *data.split(LAST), QUICK)
    after, report = forget(before, *data.split(LAST), QUICK, throw=False)
    assert after is before and "fit_guide" in str(report.refused)


def learned(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("weight", dist.Normal(torch.zeros(4), 2.0).to_event(1))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, scale), obs=y)


def test_a_models_own_parameters_are_learned_again() -> None:
    exact, _, data = fits.linear()
    before = trained(learned, MeanField(learned), data, num_steps=200)
    after, report = forget(before, *data.split(LAST), Retrain(num_steps=300, progress=False))
    assert not report.warnings
    left = exact.without(list(LAST))
    scale = float(after.params["model.scale"].exp())
    assert float(before.params["model.scale"].exp()) > 1.2 * scale  # the last rows were spoiled
    rows = LinearGaussian(left.x, left.y, 2.0, scale)
    assert fits.distance(after, fits.placed(after, rows)) < 1e-6


class Linear(PyroModule):
    """A layer of fixed weights under a latent scale of the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.layer(x)[:, 0], noise), obs=y)


def test_a_modules_own_parameters_go_on_from_where_they_are() -> None:
    """They cannot be made anew, and the report says so."""
    _, _, data = fits.linear()
    model = Linear()
    before = trained(model, MeanField(model), data)
    _, report = forget(before, *data.split(LAST), Retrain(num_steps=20, polish=None, progress=False), throw=False)
    assert any("start from their fitted values" in warning for warning in report.warnings)


def test_a_retraining_that_ends_higher_is_warned_of() -> None:
    exact, model, data = fits.linear()
    before = fits.placed(fits.started(model, MeanField(model), data), exact)
    _, report = forget(before, *data.split([0]), Retrain(num_steps=5, polish=None, progress=False))
    assert report.evidence.untilted_fall < 0
    assert any("higher than before" in warning for warning in report.warnings)


def test_an_energy_by_hand_has_no_start() -> None:
    data = Data(torch.zeros(3))
    energy = FunctionEnergy(lambda params, batch: params["p"].square(), lambda params, batch: 0 * params["p"])
    posterior = EnergyPosterior({"p": torch.tensor(0.0)}, energy, data)
    with pytest.raises(Refused, match="does not say where a fit starts"):
        forget(posterior, *data.split([0]), QUICK)


# --- draws


def drawn(num_draws: int = 40) -> tuple[LinearGaussian, SampledPosterior, Data]:
    exact, model, data = fits.linear()
    draws = exact.mean + fits.normal(9, num_draws, 4) @ torch.linalg.cholesky(exact.covariance).T
    return exact, SampledPosterior(model, {"weight": draws[None]}, data), data


def kl_to(exact: LinearGaussian, posterior: SampledPosterior) -> float:
    draws = posterior.params["weight"].reshape(-1, 4)
    factor = torch.linalg.cholesky(draws.T.cov())
    return float(gaussian_kl(draws.mean(0), factor, exact.mean, torch.linalg.cholesky(exact.covariance)))


def test_draws_of_a_new_run_follow_the_new_posterior() -> None:
    exact, before, data = drawn()
    state = torch.get_rng_state()
    settings: dict[str, Any] = {"num_draws": 100, "num_warmup": 60, "progress": False}
    after, report = forget(before, *data.split(LAST), Retrain(**settings))
    assert torch.equal(state, torch.get_rng_state())
    assert kl_to(exact.without(list(LAST)), after) < 0.15
    assert after.params["weight"].shape == (2, 100, 4) and after.log_weights is None
    evidence = report.evidence
    assert evidence.num_draws == 200 and evidence.extra["rhat"] < 1.1 and evidence.extra["divergences"] == 0
    assert evidence.method == (
        "retraining by NUTS: 2 chains of 100 draws after 60 of warm-up, each from a start of its own"
    )
    chains = after.params["weight"]
    assert not torch.equal(chains[0], chains[1])


def test_any_kernel_that_takes_a_potential() -> None:
    _, before, data = drawn()
    kernel = partial(HMC, step_size=0.1, num_steps=2, adapt_step_size=False)
    settings: dict[str, Any] = {"num_chains": 1, "num_draws": 20, "num_warmup": 5, "progress": False}
    digests = []
    for seed in (1, 1, 2):
        after, report = forget(before, *data.split(LAST), Retrain(kernel=kernel, seed=seed, **settings))
        digests.append(after.digest)
    assert report.evidence.method.startswith("retraining by HMC: 1 chains of 20 draws")
    assert digests[0] == digests[1] != digests[2]


def test_too_short_a_run_is_warned_of() -> None:
    _, before, data = drawn()
    _, report = forget(before, *data.split(LAST), Retrain(num_draws=10, num_warmup=5, progress=False))
    assert any("sample longer before relying on them" in warning for warning in report.warnings)


def scale_and_mean(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 30):
        pyro.sample("y", dist.Normal(mean, scale).to_event(1), obs=y)


def test_sites_of_other_supports_and_a_hard_coded_plate() -> None:
    """The scale's exact answer: with the mean summed out, Σ over 20 rows and not 20 · 30/20."""
    data = Data(1 + 0.5 * fits.normal(0, 30, 2))
    draws = {"scale": torch.full((1, 4), 0.5), "mean": torch.ones(1, 4, 2)}
    before = SampledPosterior(scale_and_mean, draws, data)
    kernel = partial(NUTS, max_tree_depth=4)
    settings: dict[str, Any] = {"num_chains": 1, "num_draws": 100, "num_warmup": 50, "progress": False}
    erased, retained = data.split(range(10))
    after, _ = forget(before, erased, retained, Retrain(kernel=kernel, **settings))
    scale, mean = after.latents["scale"], after.latents["mean"]
    assert scale.shape == (1, 100) and mean.shape == (1, 100, 2) and bool((scale > 0).all())
    y = next(retained.batches()).args[0]
    precision = 20 / 0.25 + 1
    torch.testing.assert_close(mean.mean((0, 1)), 20 / 0.25 * y.mean(0) / precision, rtol=0, atol=0.05)
    assert float(mean.std((0, 1)).mean()) == pytest.approx(precision**-0.5, rel=0.3)


def test_single_precision(float32: None) -> None:
    _, before, data = drawn()
    settings: dict[str, Any] = {"num_chains": 1, "num_draws": 10, "num_warmup": 10, "progress": False}
    after, _ = forget(before, *data.split(LAST), Retrain(**settings))
    assert after.params["weight"].dtype == torch.float32


def test_no_start_with_a_density() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(100.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Uniform(mean, mean + 1, validate_args=False), obs=y)

    data = Data(torch.full((4,), 100.5))
    before = SampledPosterior(model, {"mean": torch.full((1, 4), 100.2)}, data)
    with pytest.raises(ValueError, match="None of 100 starts between"):
        forget(before, *data.split([0]), Retrain(progress=False))


def test_a_bar_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("CI", "PYTEST_XDIST_WORKER"):  # where Pyro shows no bar
        monkeypatch.delenv(name, raising=False)
    _, before, data = drawn()
    forget(before, *data.split([0]), Retrain(num_chains=1, num_draws=5, num_warmup=5))
    assert "Sample" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_chains": 0}, "`num_chains` must be at least 1, got 0"),
        ({"num_draws": 0}, "`num_draws` must be at least 1"),
        ({"num_warmup": -1}, "`num_warmup` must be at least 0"),
        ({"polish": "sgd"}, "`polish` must be 'lbfgs' or None"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Retrain(**settings)
