"""Going on under the retained data: parameters by Adam, draws by Hamiltonian moves."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from torch import Tensor

from pyro_forget.data import Data
from pyro_forget.energy import FunctionEnergy
from pyro_forget.evaluation import gaussian_kl, moment_kl
from pyro_forget.forgetters.cloud import Cloud
from pyro_forget.forgetters.finetune import Finetune
from pyro_forget.forgetters.influence import Influence
from pyro_forget.forgetting import Refused, forget
from pyro_forget.guides import MeanField
from pyro_forget.inference.hmc import HMC
from pyro_forget.params import Params
from pyro_forget.posterior import EnergyPosterior, SampledPosterior
from tests import fits
from tests.oracles import LinearGaussian, dense_gradient

QUICK = Finetune(num_steps=200, learning_rate=0.02, progress=False)
LAST = range(40, 60)


def exact_guide(make: Callable[[Any], Any] = MeanField) -> tuple[LinearGaussian, Any, Data]:
    exact, model, data = fits.linear()
    return exact, fits.placed(fits.started(model, make(model), data), exact), data


# --- guides


@pytest.mark.parametrize("make", [MeanField, autoguide.AutoNormal, autoguide.AutoMultivariateNormal])
def test_it_goes_toward_the_retained_data(make: Callable[[Any], Any]) -> None:
    exact, before, data = exact_guide(make)
    after, report = forget(before, *data.split(LAST), QUICK)
    refit = fits.placed(after, exact.without(list(LAST)))
    wanted, done = fits.loc(refit) - fits.loc(before), fits.loc(after) - fits.loc(before)
    assert float(done @ wanted / wanted.square().sum()) == pytest.approx(1, abs=0.1)
    assert fits.remaining(after, before, refit) < 0.2
    assert report.evidence.method == "fine-tuning: 200 steps of Adam at 0.02"
    assert report.evidence.untilted_fall > 0 and not report.warnings


def test_with_a_polish_it_is_a_refit_from_here() -> None:
    exact, before, data = exact_guide()
    tuner = Finetune(num_steps=10, polish="lbfgs", progress=False)
    after, report = forget(before, *data.split(LAST), tuner)
    assert fits.distance(after, fits.placed(after, exact.without(list(LAST)))) < 1e-8
    assert report.evidence.solver == "converged" and report.evidence.extra["gradient_norm"] <= 1e-4
    assert report.evidence.method == "fine-tuning: 10 steps of Adam at 0.005, then L-BFGS on pinned noise"


def test_the_plate_counts_each_row_once() -> None:
    """A plate of 60 around 40 rows would count each for one and a half."""
    exact, _, data = fits.linear()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 2.0).to_event(1))
        with pyro.plate("data", 60):
            pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)

    before = fits.placed(fits.started(model, MeanField(model), data), exact)
    after, _ = forget(before, *data.split(LAST), Finetune(num_steps=0, polish="lbfgs", progress=False))
    assert fits.distance(after, fits.placed(after, exact.without(list(LAST)))) < 1e-8


def test_influence_beats_a_few_steps() -> None:
    """Few rows of many: the noise of mini-batches hides what is asked, the tilt does not."""
    exact, before, data = exact_guide()
    refit = fits.placed(before, exact.without([59]))
    tuned, _ = forget(before, *data.split([59]), Finetune(num_steps=50, batch_size=16, progress=False))
    influenced, _ = forget(before, *data.split([59]), Influence())
    assert fits.distance(influenced, refit) < 1e-9 < fits.distance(tuned, refit)


def test_the_seed_decides() -> None:
    _, before, data = exact_guide()
    split = data.split(LAST)
    digests = [
        forget(before, *split, Finetune(num_steps=5, batch_size=16, seed=seed, progress=False))[0].digest
        for seed in (1, 1, 2)
    ]
    assert digests[0] == digests[1] != digests[2]


def by_hand() -> tuple[EnergyPosterior, Data]:
    """A mean, and the chance to diverge."""
    data = Data(fits.normal(0, 20))

    def share(params: Params, batch: Any) -> Tensor:
        return 0.5 * (params["mean"] - batch.args[0]).square().sum()

    def total(params: Params, batch: Any) -> Tensor:
        return share(params, batch) - 0.01 * params["mean"].square().exp()

    return EnergyPosterior({"mean": torch.tensor(0.0)}, FunctionEnergy(total, share), data), data


def test_an_energy_by_hand() -> None:
    posterior, data = by_hand()
    after, _ = forget(posterior, *data.split(range(3)), Finetune(num_steps=300, learning_rate=0.05, progress=False))
    assert float(after.params["mean"]) == pytest.approx(float(next(data.batches()).args[0][3:].mean()), abs=0.01)


def test_a_training_that_diverges_is_refused() -> None:
    posterior, data = by_hand()
    wild = Finetune(num_steps=50, learning_rate=30.0, progress=False)
    with pytest.raises(Refused, match=r"the training diverged \(The energy is -inf"):
        forget(posterior, *data.split(range(3)), wild)
    after, report = forget(posterior, *data.split(range(3)), wild, throw=False)
    assert after is posterior and report.refused


def test_steps_that_make_it_worse_are_warned_of() -> None:
    _, before, data = exact_guide()
    _, report = forget(before, *data.split([3]), Finetune(num_steps=3, learning_rate=0.5, progress=False))
    assert report.evidence.untilted_fall < 0
    assert any("higher than before" in warning for warning in report.warnings)


# --- draws


def drawn(num_draws: int = 1000, chains: int = 4) -> tuple[LinearGaussian, SampledPosterior, Data]:
    exact, model, data = fits.linear()
    draws = exact.mean + fits.normal(9, num_draws, 4) @ torch.linalg.cholesky(exact.covariance).T
    return exact, SampledPosterior(model, {"weight": draws.reshape(chains, -1, 4)}, data), data


def matrix(posterior: SampledPosterior) -> Tensor:
    return posterior.params["weight"].reshape(-1, 4)


def kl_to(exact: LinearGaussian, draws: Tensor) -> float:
    factor = torch.linalg.cholesky(draws.T.cov())
    return float(gaussian_kl(draws.mean(0), factor, exact.mean, torch.linalg.cholesky(exact.covariance)))


def test_draws_move_to_the_posterior_of_what_is_left() -> None:
    exact, before, data = drawn()
    after, report = forget(before, *data.split(LAST), Finetune(num_moves=20, progress=False))
    left = exact.without(list(LAST))
    assert kl_to(left, matrix(before)) > 10
    assert kl_to(left, matrix(after)) < 0.03
    evidence = report.evidence
    assert evidence.num_draws == 1000 and evidence.method.startswith("fine-tuning: 20 Hamiltonian moves of 5 steps")
    assert 0.7 < evidence.extra["acceptance"] < 1 and evidence.rhat_input < 1.01
    assert after.params["weight"].shape == (4, 250, 4) and after.log_weights is None
    length = float((matrix(after) - matrix(before)).square().sum(1).mean().sqrt())
    assert evidence.step_norm == pytest.approx({"weight": length})


def test_too_few_moves_are_seen_to_drift() -> None:
    _, before, data = drawn()
    _, report = forget(before, *data.split(LAST), Finetune(num_moves=2, num_leapfrog=1, progress=False))
    assert report.evidence.extra["drift"] > 5
    assert any("still on their way" in warning for warning in report.warnings)


def test_moves_that_go_nowhere_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws far too wide for what they are: nearly every trajectory is rejected."""
    exact, before, data = drawn()
    wide = before.edited({"weight": 40 * (before.params["weight"] - exact.mean) + exact.mean}, before.ids)
    _, report = forget(wide, *data.split([0]), Finetune(num_moves=2, progress=False))
    assert report.evidence.extra["acceptance"] < 0.4
    assert any("hardly moved" in warning for warning in report.warnings)


def test_weighted_draws_are_resampled_first() -> None:
    exact, before, data = drawn()
    weights = matrix(before)[:, 0]  # favours a side
    weighted = before.edited(before.params, before.ids, weights.reshape(4, 250))
    after, report = forget(weighted, *data.split([0]), Finetune(num_moves=30, progress=False))
    assert after.log_weights is None and after.params["weight"].shape == (1, 1000, 4)
    assert kl_to(exact.without([0]), matrix(after)) < 0.03
    some, report = forget(before, *data.split([0]), Finetune(num_starts=100, progress=False))
    assert some.params["weight"].shape == (1, 100, 4) and report.evidence.num_draws == 100


def test_few_draws_move_by_their_standard_deviations() -> None:
    exact, before, data = drawn(num_draws=12, chains=1)
    after, report = forget(before, *data.split(LAST), Finetune(num_moves=40, progress=False))
    assert report.evidence.extra["acceptance"] > 0.2
    left = exact.without(list(LAST))
    assert float((matrix(after).mean(0) - left.mean).abs().max()) < float(
        (matrix(before).mean(0) - left.mean).abs().max()
    )
    one = SampledPosterior(before.model, {"weight": before.latents["weight"][:, :1]}, data)
    alone, _ = forget(one, *data.split(LAST), Finetune(progress=False))
    assert alone.params["weight"].shape == (1, 1, 4)


def test_draws_keep_their_type(float32: None) -> None:
    _, before, data = drawn()
    after, _ = forget(before, *data.split(LAST), Finetune(num_moves=2, progress=False))
    assert after.params["weight"].dtype == torch.float32


def scale_and_mean(y: Tensor) -> None:
    """A site with a support, a site without dims, and a site of another shape."""
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, scale).to_event(1), obs=y)


def constrained(seed: int = 0) -> tuple[Cloud, Data]:
    data = Data(1 + 0.5 * fits.normal(seed, 30, 2))
    draws = {"scale": 0.5 + 0.05 * fits.normal(1, 2, 50).tanh(), "mean": 1 + 0.1 * fits.normal(2, 2, 50, 2)}
    return Cloud(SampledPosterior(scale_and_mean, draws, data)), data


def test_the_log_joint_and_its_gradient() -> None:
    cloud, data = constrained()
    value, gradient = cloud.log_joint_and_gradient(cloud.matrix, data.with_batch_size(7))
    torch.testing.assert_close(value, cloud.log_joint(cloud.matrix, data))
    for draw in (0, 57):
        row = {"row": cloud.matrix[draw]}
        expected = dense_gradient(
            lambda params: cloud.posterior.log_joint(cloud.params(params["row"][None]), data).sum(), row
        )
        torch.testing.assert_close(gradient[draw], expected)


def test_moves_in_another_support() -> None:
    cloud, data = constrained()
    after, _ = forget(cloud.posterior, *data.split(range(10)), Finetune(num_moves=4, progress=False))
    assert bool((after.latents["scale"] > 0).all()) and after.latents["mean"].shape == (2, 50, 2)


# --- the moves themselves


def target(factor: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    precision = torch.cholesky_inverse(factor)

    def density(draws: Tensor) -> tuple[Tensor, Tensor]:
        pull = draws @ precision
        return -0.5 * (draws * pull).sum(1), -pull

    return density


@pytest.mark.parametrize("diagonal", [False, True])
def test_moves_leave_their_target_alone(diagonal: bool) -> None:
    """And reach it from elsewhere; asymmetric, so that a sign cannot hide."""
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-2.0, 0.3, 3.0]])
    metric = factor.square().sum(1).sqrt() if diagonal else factor
    inside = fits.normal(0, 4000, 3) @ factor.T
    shift = torch.tensor([3.0, -1.0, 2.0])
    moves = HMC(num_moves=40, seed=3)
    for start in (inside, inside + shift):
        moved = moves.run(target(factor), start, metric)
        assert float(moment_kl(moved.draws, inside)) < 0.01
        assert moved.acceptance > 0.5
    again = moves.run(target(factor), inside, metric)
    assert torch.equal(again.draws, moves.run(target(factor), inside, metric).draws)
    assert not torch.equal(again.draws, HMC(num_moves=40, seed=4).run(target(factor), inside, metric).draws)


def test_energy_is_conserved_by_small_steps() -> None:
    factor = torch.eye(2)
    exact = HMC(num_moves=1, step_size=1e-3).run(target(factor), fits.normal(0, 500, 2), factor)
    assert exact.acceptance > 1 - 1e-6


def test_a_trajectory_out_of_the_support_is_not_taken() -> None:
    def density(draws: Tensor) -> tuple[Tensor, Tensor]:
        inside = draws[:, 0] > 0
        value = torch.where(inside, -draws[:, 0], math.nan)
        return value, torch.where(inside[:, None], -torch.ones_like(draws), math.nan)

    draws = HMC(num_moves=200).run(density, torch.full((2000, 1), 0.5), torch.ones(1)).draws
    assert bool((draws > 0).all())
    assert float(draws.mean()) == pytest.approx(1, abs=0.1)  # the exponential distribution


@pytest.mark.parametrize("name", ["num_moves", "num_leapfrog", "num_starts"])
def test_settings_that_make_no_sense(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        Finetune(**{name: 0})


def test_a_bar_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    _, before, data = drawn(num_draws=20)
    forget(before, *data.split([0]), Finetune(num_moves=2))
    assert "moves:" in capsys.readouterr().err
