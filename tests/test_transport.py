"""Forgetting by moving and weighting draws, against exact posteriors."""

import json
import math
from dataclasses import asdict

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_forget.data import Data
from pyro_forget.energy import FunctionEnergy
from pyro_forget.evaluation import gaussian_kl, moment_kl
from pyro_forget.forgetters.cloud import Cloud, Request
from pyro_forget.forgetters.reweight import Reweight
from pyro_forget.forgetters.transport import Transport, _unweighted
from pyro_forget.importance import effective_sample_size
from pyro_forget.inference.moment_matching import Affine, MomentMatching
from pyro_forget.inference.recursion import Recursion
from pyro_forget.outcome import Evidence
from pyro_forget.posterior import EnergyPosterior, SampledPosterior
from tests.draws import Logistic, Regression


def linear(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 2.0).expand([x.shape[-1]]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def logistic(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def poisson(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 100.0).expand([x.shape[-1]]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson((x @ w).exp()), obs=y)


def location_scale(y):
    """The normal-inverse-gamma posterior, with the variance on its own scale: a constrained site."""
    variance = pyro.sample("variance", dist.InverseGamma(3.0, 2.0))
    mean = pyro.sample("mean", dist.Normal(0.0, 2 * variance.sqrt()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, variance.sqrt()), obs=y)


def location_scale_draws(y, num_draws, seed):
    n, precision = len(y), len(y) + 0.25
    loc = y.sum() / precision
    rate = 2 + 0.5 * (y.square().sum() - precision * loc.square())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        variance = dist.InverseGamma(3 + n / 2, rate).sample((num_draws,))
        return {"variance": variance, "mean": loc + (variance / precision).sqrt() * torch.randn(num_draws)}


def chained(draws, num_chains=4):
    return draws.reshape(num_chains, -1, *draws.shape[1:])


def regression_task(num_draws=2000, num_data=60, dim=4, seed=0):
    task = Regression.drawn(num_data, dim, seed)
    data = Data(task.x, task.y)
    draws = task.sample(num_draws, seed=seed + 1)
    return task, data, SampledPosterior(linear, {"w": chained(draws)}, data)


def rows_of(task, data):
    return task.rows(data.ids)


def cloud(posterior):
    matrix = torch.cat([value.reshape(posterior.num_draws, -1) for value in posterior.params.values()], 1)
    return matrix, None if posterior.log_weights is None else posterior.log_weights.flatten()


def moments(posterior):
    matrix, log_weights = cloud(posterior)
    weights = torch.full((len(matrix),), 1 / len(matrix)) if log_weights is None else log_weights.exp()
    mean = weights @ matrix
    return mean, torch.linalg.cholesky((weights * (matrix - mean).T) @ (matrix - mean))


LAST_THIRD = range(40, 60)


# --- exact answers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def carried():
    """A regression whose corrupted third was forgotten."""
    torch.set_default_dtype(torch.float64)
    task, data, posterior = regression_task()
    erased, retained = data.split(LAST_THIRD)
    digest = posterior.digest
    edit = Transport().edit(posterior, erased, retained)
    yield task, retained, posterior, edit, digest
    torch.set_default_dtype(torch.float32)


def test_transport_reaches_the_exact_posterior(carried):
    task, retained, posterior, edit, _ = carried
    exact = rows_of(task, retained).posterior()
    assert float(gaussian_kl(*moments(posterior), *exact)) > 5
    assert float(gaussian_kl(*moments(edit.posterior), *exact)) < 0.01
    towards = exact[0] - task.posterior()[0]
    assert float((moments(edit.posterior)[0] - task.posterior()[0]) @ towards / towards.square().sum()) > 0.98


def test_the_evidence_says_what_was_seen(carried):
    _, _, posterior, edit, _ = carried
    evidence = edit.evidence
    assert evidence.refused is None
    assert evidence.num_draws == posterior.num_draws == 2000
    assert evidence.ess == pytest.approx(effective_sample_size(edit.posterior.log_weights))
    assert evidence.ess > 0.95 * 2000 and evidence.khat < 0.7
    assert 0.9 * 1000 < evidence.ess_held_out <= 1000
    assert evidence.rhat_input < 1.01 and evidence.ess_input > 1500
    assert evidence.num_products == 4 and evidence.solver == "Cholesky: converged"
    assert evidence.extra["weighted"] and evidence.extra["start"] == "initial"
    assert set(evidence.step_norm) == {"w"} and evidence.step_norm["w"] > 0.1
    assert "sampler's own bias" in evidence.extra["limits"]
    json.dumps(asdict(evidence))


def test_the_edit_is_a_new_posterior_in_chain_order(carried):
    _, retained, posterior, edit, digest = carried
    new = edit.posterior
    assert posterior.digest == digest and posterior.log_weights is None
    assert new.parent == digest
    assert torch.equal(new.ids, retained.ids)
    assert new.params["w"].shape == (4, 500, 4) and new.log_weights.shape == (4, 500)
    assert float(new.log_weights.logsumexp((0, 1))) == pytest.approx(0, abs=1e-12)
    before, after = cloud(posterior)[0], cloud(new)[0]
    design = torch.cat([before, torch.ones(2000, 1)], 1)
    fitted = design @ torch.linalg.lstsq(design, after).solution
    torch.testing.assert_close(fitted, after)  # one affine map took each draw to its place


def test_nothing_erased_is_the_identity():
    _, data, posterior = regression_task(num_draws=200)
    nothing, everything = data.split([])
    for forgetter in (Transport(), Transport.published(), Transport(resample=True), Reweight()):
        assert forgetter.edit(posterior, nothing, everything).posterior is posterior


def test_a_constrained_site_and_several_shapes():
    generator = torch.Generator().manual_seed(1)
    y = torch.cat([torch.randn(40, generator=generator), 2 + 2 * torch.randn(15, generator=generator)])
    data = Data(y)
    draws = location_scale_draws(y, 2000, seed=2)
    posterior = SampledPosterior(location_scale, {name: chained(value) for name, value in draws.items()}, data)
    erased, retained = data.split(range(40, 55))
    edit = Transport().edit(posterior, erased, retained)

    def refit(seed):
        kept = {name: chained(value) for name, value in location_scale_draws(y[:40], 2000, seed).items()}
        return cloud(SampledPosterior(location_scale, kept, retained))[0]

    floor = float(moment_kl(refit(3), refit(4)))
    assert float(moment_kl(cloud(posterior)[0], refit(4))) > 3
    matrix, log_weights = cloud(edit.posterior)
    assert float(moment_kl(matrix, refit(4), log_weights)) < floor + 0.01
    assert set(edit.evidence.step_norm) == {"variance", "mean"}
    assert bool((edit.posterior.draws()["variance"] > 0).all())


def test_logistic_regression_reaches_the_floor():
    task = Logistic.drawn(1)
    data = Data(task.x, task.y)
    posterior = SampledPosterior(logistic, {"w": chained(task.sample(800, seed=1))}, data)
    erased, retained = data.split(range(10))
    edit = Transport().edit(posterior, erased, retained)
    refit, again = (task.rows(slice(10, None)).sample(800, seed) for seed in (2, 3))
    matrix, log_weights = cloud(edit.posterior)
    assert float(moment_kl(matrix, refit, log_weights)) < float(moment_kl(again, refit)) + 0.03


def test_batches_do_not_matter():
    _, data, posterior = regression_task(num_draws=400)
    small = data.with_batch_size(7)
    whole = Transport().edit(posterior, *data.split(LAST_THIRD))
    parts = Transport().edit(posterior, *small.split(LAST_THIRD))
    torch.testing.assert_close(parts.posterior.params["w"], whole.posterior.params["w"])
    torch.testing.assert_close(parts.posterior.log_weights, whole.posterior.log_weights)


def test_float32_draws_stay_float32(float32):
    task = Regression.drawn(60, 4, 0)
    data = Data(task.x, task.y)
    posterior = SampledPosterior(linear, {"w": chained(task.sample(1000, seed=1))}, data)
    edit = Transport().edit(posterior, *data.split(LAST_THIRD))
    assert edit.posterior.params["w"].dtype == torch.float32
    exact = task.rows(slice(0, 40)).posterior()
    matrix, log_weights = cloud(edit.posterior)
    assert float(gaussian_kl(*moments_of(matrix.double(), log_weights), *(part.double() for part in exact))) < 0.02


def moments_of(matrix, log_weights):
    mean = log_weights.exp() @ matrix
    return mean, torch.linalg.cholesky((log_weights.exp() * (matrix - mean).T) @ (matrix - mean))


# --- several requests ---------------------------------------------------------------------------------------------


def erase(forgetter, posterior, data, ids):
    left, _ = data.split(posterior.ids)
    erased, retained = left.split(ids)
    return forgetter.edit(posterior, erased, retained).posterior


def test_the_order_of_requests_does_not_matter():
    task, data, posterior = regression_task()
    first, second = list(range(40, 50)), list(range(50, 60))
    ab = erase(Transport(), erase(Transport(), posterior, data, first), data, second)
    ba = erase(Transport(), erase(Transport(), posterior, data, second), data, first)
    both = erase(Transport(), posterior, data, first + second)
    exact = task.rows(slice(0, 40)).posterior()
    for result in (ab, ba, both):
        assert float(gaussian_kl(*moments(result), *exact)) < 0.02
    assert float(gaussian_kl(*moments(ab), *moments(both))) < 0.01
    assert float(gaussian_kl(*moments(ba), *moments(both))) < 0.01


def test_a_second_request_multiplies_its_weights_in():
    """By weights alone the bulk of A then B is that of A ∪ B, which only tail smoothing tells apart."""
    task, data, posterior = regression_task()
    ab = erase(Reweight(), erase(Reweight(), posterior, data, [1]), data, [2])
    both = erase(Reweight(), posterior, data, [1, 2])
    bulk = both.log_weights.flatten().argsort()[:-400]
    gap = (ab.log_weights - both.log_weights).flatten()[bulk]
    assert float(gap.std()) < 1e-6
    assert ab.num_data == both.num_data == 58
    exact = task.rows(torch.tensor([0, *range(3, 60)])).posterior()
    assert float(gaussian_kl(*moments(ab), *exact)) < float(gaussian_kl(*moments(posterior), *exact))


# --- reweighting --------------------------------------------------------------------------------------------------


def test_reweighting_has_the_sign_that_deletes():
    task, data, posterior = regression_task()
    worst = int((task.y - task.x @ task.posterior()[0]).abs().argmax())
    erased, retained = data.split([worst])
    edit = Reweight().edit(posterior, erased, retained)
    exact = rows_of(task, retained).posterior()
    assert torch.equal(edit.posterior.params["w"], posterior.params["w"])
    before, after = (float(gaussian_kl(*moments(p), *exact)) for p in (posterior, edit.posterior))
    assert after < 0.2 * before
    assert edit.evidence.step_norm == {"w": 0.0}
    assert edit.evidence.ess == pytest.approx(effective_sample_size(edit.posterior.log_weights))


def test_reweighting_too_much_is_reported():
    _, data, posterior = regression_task()
    edit = Reweight().edit(posterior, *data.split(LAST_THIRD))
    assert edit.evidence.khat > 0.7 and edit.evidence.ess < 200
    assert any("too much was erased for weights alone" in warning for warning in edit.evidence.warnings)


# --- other moves --------------------------------------------------------------------------------------------------


def newton(task, chosen, draws):
    """H⁻¹∇h of the rows that go, in closed form: H of the rows that stay."""
    kept = torch.ones(len(task.y), dtype=torch.bool)
    kept[list(chosen)] = False
    precision = task.x[kept].T @ task.x[kept] + torch.eye(task.x.shape[1]) / 4
    forces = (draws @ task.x[~kept].T - task.y[~kept]) @ task.x[~kept]
    return torch.linalg.solve(precision, forces.T).T


def test_the_common_shift_is_the_mean_newton_step():
    task, data, posterior = regression_task(num_draws=400)
    edit = Transport(shift_only=True).edit(posterior, *data.split(LAST_THIRD))
    draws = cloud(posterior)[0]
    torch.testing.assert_close(cloud(edit.posterior)[0], draws + newton(task, LAST_THIRD, draws).mean(0))
    assert edit.posterior.log_weights is None
    # A quadratic energy falls exactly as predicted.
    assert edit.evidence.realised_fall == pytest.approx(edit.evidence.predicted_fall)
    assert edit.evidence.predicted_fall > 0 and edit.evidence.ess is not None


def test_each_draw_by_its_own_newton_step():
    task, data, posterior = regression_task(num_draws=400)
    edit = Transport(per_draw=True).edit(posterior, *data.split(LAST_THIRD))
    draws = cloud(posterior)[0]
    torch.testing.assert_close(cloud(edit.posterior)[0], draws + newton(task, LAST_THIRD, draws))
    assert edit.posterior.log_weights is None


def test_resampled_draws_are_equally_weighted():
    task, data, posterior = regression_task()
    weighted = Transport().edit(posterior, *data.split(LAST_THIRD)).posterior
    edit = Transport(resample=True).edit(posterior, *data.split(LAST_THIRD))
    assert edit.posterior.log_weights is None
    assert edit.posterior.params["w"].shape == (4, 500, 4)
    known = {tuple(row) for row in cloud(weighted)[0].tolist()}
    assert all(tuple(row) in known for row in cloud(edit.posterior)[0].tolist())
    assert float(gaussian_kl(*moments(edit.posterior), *task.rows(slice(0, 40)).posterior())) < 0.02


def test_the_published_recursion_goes_the_way_of_the_newton_step():
    task, data, posterior = regression_task(num_draws=400, num_data=200)
    erased, retained = data.split(range(180, 200))
    recursion = Recursion(scaling=0.3, num_steps=100, batch_size=64, num_draws=5, chunk=10)
    edit = Transport.published(recursion).edit(posterior, erased, retained)
    draws = cloud(posterior)[0]
    moved = cloud(edit.posterior)[0] - draws
    torch.testing.assert_close(moved, moved.mean(0).expand_as(moved))
    exact = newton(task, range(180, 200), draws).mean(0)
    assert float(torch.cosine_similarity(moved[0], exact, dim=0)) > 0.95
    assert float(moved[0].norm() / exact.norm()) == pytest.approx(1, abs=0.3)
    again = Transport.published(recursion).edit(posterior, erased, retained)
    assert torch.equal(again.posterior.params["w"], edit.posterior.params["w"])
    assert "published recursion" in edit.evidence.method


def test_a_diverging_recursion_is_refused():
    _, data, posterior = regression_task(num_draws=400)
    edit = Transport.published(Recursion(scaling=50.0, num_steps=200)).edit(posterior, *data.split(LAST_THIRD))
    assert edit.posterior is posterior
    assert "diverged: lower its `scaling`" in edit.evidence.refused


# --- few draws, many dimensions -----------------------------------------------------------------------------------


def test_too_few_draws_for_a_map_are_shifted():
    task, data, posterior = regression_task(num_draws=36, dim=8)
    edit = Transport().edit(posterior, *data.split(LAST_THIRD))
    draws = cloud(posterior)[0]
    torch.testing.assert_close(cloud(edit.posterior)[0], draws + newton(task, LAST_THIRD, draws).mean(0))
    assert edit.posterior.log_weights is None
    assert any("36 draws are too few for a map in 8 dimensions" in warning for warning in edit.evidence.warnings)
    assert edit.evidence.method == "transport by a common shift"


def test_each_draw_by_its_own_step_in_many_dimensions(monkeypatch):
    monkeypatch.setattr("pyro_forget.forgetters.steps.DENSE", 3)
    task, data, posterior = regression_task(num_draws=36, dim=8)
    edit = Transport(per_draw=True).edit(posterior, *data.split(LAST_THIRD))
    draws = cloud(posterior)[0]
    expected = newton(task, LAST_THIRD, draws)
    assert float((cloud(edit.posterior)[0] - draws - expected).norm() / expected.norm()) < 0.01
    assert edit.evidence.solver == "conjugate gradients: converged"
    assert edit.evidence.residual < 1e-3 and 0 < edit.evidence.num_products <= 8 * 36


def test_many_dimensions_start_from_the_common_shift(monkeypatch):
    monkeypatch.setattr("pyro_forget.forgetters.transport.DENSE", 3)
    task, data, posterior = regression_task()
    edit = Transport().edit(posterior, *data.split(LAST_THIRD))
    assert edit.evidence.solver == "Lanczos" and edit.evidence.damping == 0
    assert float(gaussian_kl(*moments(edit.posterior), *task.rows(slice(0, 40)).posterior())) < 0.01


def test_weights_that_would_add_noise_stay_evidence():
    _, data, posterior = regression_task(num_draws=100, dim=8)
    edit = Transport().edit(posterior, *data.split(LAST_THIRD))
    assert edit.posterior.log_weights is None
    assert edit.evidence.ess is not None and not edit.evidence.extra["weighted"]
    assert any("below 20 a dimension (160)" in warning for warning in edit.evidence.warnings)


def test_too_few_draws_for_a_tail_say_so():
    _, data, posterior = regression_task(num_draws=20, dim=2)
    evidence = Transport().edit(posterior, *data.split([0, 1])).evidence
    assert evidence.khat is None
    assert any("k̂ needs 25 draws, there are 20" in warning for warning in evidence.warnings)


def test_hopeless_requests_say_so():
    task = Logistic.drawn(0, num_data=100, dim=24)
    data = Data(task.x, task.y)
    posterior = SampledPosterior(logistic, {"w": chained(task.sample(200, seed=1))}, data)
    edit = Transport().edit(posterior, *data.split(range(60)))
    assert edit.evidence.ess < 0.5 * 200
    assert any("draws count" in warning for warning in edit.evidence.warnings)


def test_a_map_that_fits_its_own_draws_says_so():
    task = Logistic.drawn(0, num_data=200, dim=10)
    data = Data(task.x, task.y)
    posterior = SampledPosterior(logistic, {"w": chained(task.sample(120, seed=1))}, data)
    edit = Transport().edit(posterior, *data.split(range(100)))
    assert edit.evidence.ess > 0.5 * 120 and edit.evidence.ess_held_out < 0.4 * 60
    assert any("fits the noise of its own draws" in warning for warning in edit.evidence.warnings)


def test_draws_of_bad_chains_are_pointed_out():
    task = Regression.drawn(60, 2, 0)
    data = Data(task.x, task.y)
    draws = chained(task.sample(800, seed=1))
    draws[0] += 1.0
    posterior = SampledPosterior(linear, {"w": draws}, data)
    edit = Transport().edit(posterior, *data.split([0]))
    assert edit.evidence.rhat_input > 1.1
    assert "R-hat" in edit.evidence.warnings[0] and "Sample longer" in edit.evidence.warnings[0]


def test_a_single_chain_is_cut_in_two():
    task = Regression.drawn(60, 2, 0)
    data = Data(task.x, task.y)
    drifting = task.sample(600, seed=1) + torch.linspace(0, 1, 600)[:, None]
    posterior = SampledPosterior(linear, {"w": drifting[None]}, data)
    assert Transport().edit(posterior, *data.split([0])).evidence.rhat_input > 1.1


# --- refusals -----------------------------------------------------------------------------------------------------


def wall(num_draws, num_erased):
    """Rates that are 1 under all data: without the zeros, a Newton step would make them astronomic."""
    data = Data(torch.ones(5 + num_erased, 1), torch.cat([torch.ones(5), torch.zeros(num_erased)]))
    posterior = SampledPosterior(poisson, {"w": 0.01 * torch.randn(1, num_draws, 1)}, data)
    return posterior, Transport(shift_only=True).edit(posterior, *data.split(range(5, 5 + num_erased)))


def test_a_step_into_the_wall_is_damped():
    posterior, edit = wall(20, 40)
    assert edit.evidence.damping > 0
    assert edit.evidence.realised_fall >= 0.25 * edit.evidence.predicted_fall > 0
    assert bool((edit.posterior.params["w"] > posterior.params["w"]).all())


def test_a_step_that_no_damping_helps_is_refused():
    posterior, edit = wall(4, 400)  # too few draws to tell their spread, which damping is measured in
    assert edit.posterior is posterior
    assert "promised to lower the tilted retained energy" in edit.evidence.refused
    assert edit.evidence.realised_fall < 0 < edit.evidence.predicted_fall


def test_a_saddle_is_refused():
    def cauchy(y):
        w = pyro.sample("w", dist.Normal(0.0, 100.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Cauchy(w, 1.0), obs=y)

    data = Data(torch.full((400,), 2.0))
    posterior = SampledPosterior(cauchy, {"w": 0.01 * torch.randn(1, 4)}, data)
    edit = Transport(shift_only=True).edit(posterior, *data.split([0]))
    assert edit.posterior is posterior
    assert "far from positive definite" in edit.evidence.refused


def test_draws_without_density_are_refused():
    _, data, posterior = regression_task(num_draws=100)
    broken = posterior.params["w"].clone()
    broken[0, 3] = math.inf
    bad = posterior.edited({"w": broken}, posterior.ids)
    edit = Transport().edit(bad, *data.split([0]))
    assert edit.posterior is bad
    assert "not finite at 1 of 100 draws" in edit.evidence.refused


def test_too_few_draws_for_khat_are_said_to_be():
    """20 draws: nothing is said of how much was erased, which they cannot tell."""
    regression = Regression.drawn(40, 2, 1)
    draws = {"w": regression.sample(20, 3)[None]}
    posterior = SampledPosterior(linear, draws, Data(regression.x, regression.y))
    edit = Reweight().edit(posterior, *Data(regression.x, regression.y).split([0]))
    assert edit.evidence.khat is None
    assert "Pareto k̂ needs at least 25 draws, got 20: sample longer." in edit.evidence.warnings
    assert not any("too much was erased" in warning for warning in edit.evidence.warnings)


def test_reweighting_without_density_is_refused():
    _, data, posterior = regression_task(num_draws=100)
    broken = posterior.params["w"].clone()
    broken[0, 3] = math.inf
    bad = posterior.edited({"w": broken}, posterior.ids)
    edit = Reweight().edit(bad, *data.split([0]))
    assert edit.posterior is bad
    assert "no finite log density at 1 of 100 draws" in edit.evidence.refused


@pytest.mark.parametrize("forgetter", [Transport(), Reweight()], ids=["Transport", "Reweight"])
def test_only_draws_can_be_moved(forgetter):
    data = Data(torch.zeros(5))
    energy = FunctionEnergy(lambda params, batch: params["a"].sum(), lambda params, batch: params["a"].sum())
    posterior = EnergyPosterior({"a": torch.zeros(2)}, energy, data)
    with pytest.raises(ValueError, match="edits draws, got a EnergyPosterior"):
        forgetter.edit(posterior, *data.split([0]))


def test_options_exclude_each_other():
    with pytest.raises(ValueError, match="`shift_only` and `resample` exclude each other"):
        Transport(shift_only=True, resample=True)


# --- the published size -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("num_erased", "min_ess"), [(10, 1900), (30, 1850), (60, 1750), (100, 1500)])
def test_logistic_regression_at_the_published_size(num_erased, min_ess):
    for seed in range(3):
        task = Logistic.drawn(seed)
        data = Data(task.x, task.y)
        posterior = SampledPosterior(logistic, {"w": chained(task.sample(2000, seed=1))}, data)
        edit = Transport().edit(posterior, *data.split(range(num_erased)))
        refit, again = (task.rows(slice(num_erased, None)).sample(2000, seed) for seed in (2, 3))
        matrix, log_weights = cloud(edit.posterior)
        assert float(moment_kl(matrix, refit, log_weights)) < float(moment_kl(again, refit)) + 0.03
        assert edit.evidence.ess > min_ess and edit.evidence.khat < 0.5


# --- moves after the map ------------------------------------------------------------------------------------------


def test_moves_after_a_shift_mend_the_covariance():
    """A common shift keeps the covariance of all data; moves on the retained data bring theirs."""
    task, data, posterior = regression_task()
    erased, retained = data.split(LAST_THIRD)
    mean, factor = rows_of(task, retained).posterior()
    left = {}
    for moves in (0, 8):
        edit = Transport(shift_only=True, refresh=moves).edit(posterior, erased, retained)
        left[moves] = float(gaussian_kl(*moments(edit.posterior), mean, factor))
    assert left[8] < 0.1 * left[0]
    assert left[8] < 0.02
    assert edit.evidence.extra["refresh"]["moves"] == 8
    assert edit.evidence.extra["refresh"]["acceptance"] > 0.7
    assert "then 8 Hamiltonian moves" in edit.evidence.method


def test_moves_leave_what_is_right_as_it_is_and_keep_its_weights():
    task, data, posterior = regression_task()
    erased, retained = data.split([0, 1, 2])
    plain, moved = (Transport(refresh=moves).edit(posterior, erased, retained).posterior for moves in (0, 3))
    assert not torch.equal(plain.params["w"], moved.params["w"])
    torch.testing.assert_close(plain.log_weights, moved.log_weights)
    mean, factor = rows_of(task, retained).posterior()
    assert float(gaussian_kl(*moments(moved), mean, factor)) < 0.02
    with pytest.raises(ValueError, match="`refresh` must be 0 or more"):
        Transport(refresh=-1)


def test_where_hardly_a_draw_counts_the_higher_map_is_returned_unweighted():
    task, data, posterior = regression_task()
    erased, retained = data.split(LAST_THIRD)
    whole = Cloud(posterior)
    request = Request(whole, erased, retained, whole.log_joint(whole.matrix, data))
    mean, factor = rows_of(task, retained).posterior()
    before = moments(posterior)
    away = Affine(torch.eye(4), torch.full((4,), 3.0))
    change = factor @ torch.linalg.inv(before[1])
    exact = Affine(change, mean - change @ before[0])
    for matched, initial in ((away, exact), (exact, away), (exact, None)):
        found = MomentMatching(matched(whole.matrix), whole.log_weights, None, 1.5, 7, matched, "initial", False)
        move = _unweighted(request, Evidence("a map"), found, initial)
        torch.testing.assert_close(move.matrix, exact(whole.matrix))
        assert move.log_weights is None and "more than 2 of 2000 draws" in move.evidence.warnings[-1]


def test_a_far_request_goes_by_newtons_method():
    """Two thirds go, and the rest says something else: the influence map ends far from the retained posterior."""
    x = torch.randn(90, 2, generator=torch.Generator().manual_seed(0)) + 1.0
    y = torch.cat([torch.full((60,), 0.2), torch.full((30,), 4.0)])
    data = Data(x.abs(), y.round())
    refit, start = _poisson_draws(data.split(range(60))[1]), _poisson_draws(data)
    posterior = SampledPosterior(poisson, {"w": chained(start)}, data)
    edit = Transport().edit(posterior, *data.split(range(60)))
    assert "Newton's method" in edit.evidence.method and edit.evidence.refused is None
    matrix, log_weights = cloud(edit.posterior)
    before = float(moment_kl(start, refit))
    assert before > 50
    assert float(moment_kl(matrix, refit, log_weights)) < 0.1


def _poisson_draws(data, num_draws=2000):
    """Of log-linear Poisson weights, by independence sampling from a wide Gaussian at the mode, resampled."""
    (batch,) = data.batches()
    x, y = batch.args

    def log_joint(w):
        rate = w @ x.T
        return (y * rate - rate.exp()).sum(-1) - 0.5 * (w / 100).square().sum(-1)

    mode = torch.zeros(2)
    for _ in range(60):
        rate = (x @ mode).exp()
        hessian = (x.T * rate) @ x + torch.eye(2) / 1e4
        step = torch.linalg.solve(hessian, x.T @ (y - rate) - mode / 1e4)
        mode = mode + step / max(1.0, float(step.norm()))
    generator = torch.Generator().manual_seed(1)
    factor = 1.5 * torch.linalg.cholesky(torch.linalg.inv(hessian))
    noise = torch.randn(20 * num_draws, 2, generator=generator)
    draws = mode + noise @ factor.T
    log_weights = log_joint(draws) + 0.5 * noise.square().sum(-1)
    weights = (log_weights - log_weights.max()).exp()
    return draws[torch.multinomial(weights, num_draws, replacement=True, generator=generator)]


def test_a_recursion_whose_next_chunk_has_no_energy_any_more_is_refused():
    """The first chunk throws the draws out of the support; the second must not raise."""
    x = torch.ones(40, 1)
    data = Data(x, torch.full((40,), 2.0))
    draws = 0.7 + 0.1 * torch.randn(1, 50, 1, generator=torch.Generator().manual_seed(0))
    posterior = SampledPosterior(poisson, {"w": draws}, data)
    method = Transport.published(Recursion(scaling=50.0, num_steps=40, batch_size=8, num_draws=2, chunk=2))
    edit = method.edit(posterior, *data.split(range(8)))
    assert "diverged: lower its `scaling`" in edit.evidence.refused
    assert edit.posterior is posterior
