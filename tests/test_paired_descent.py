"""Paired descent on networks: an unbiased gradient of the tilted energy, steps that are judged by rows not seen."""

from dataclasses import dataclass, replace

import pytest
import torch

from pyro_forget.data import Batch, Data
from pyro_forget.energy.points import prior_gradient
from pyro_forget.forgetters.default import Otherwise, default_forgetter
from pyro_forget.forgetters.influence import Influence
from pyro_forget.forgetters.network import Network, is_network
from pyro_forget.forgetters.paired_descent import PairedDescent
from pyro_forget.forgetters.transport import Transport
from pyro_forget.forgetting import Refused, forget
from pyro_forget.guides import MeanField, local_reparametrization
from pyro_forget.importance import pareto_smooth
from pyro_forget.inference.paired import PairedSteps
from pyro_forget.inference.pairing import Beta, Problem, batch_gradient, judge
from pyro_forget.models import MLP
from pyro_forget.outcome import Edit, Evidence, Forgetter
from pyro_forget.params import Params, add, axpy, norm, scale, subtract
from pyro_forget.posterior import EnergyPosterior, Posterior, SampledPosterior, VariationalPosterior
from tests import fits, networks

QUICK = PairedDescent(num_steps=60, batch_size=64)


def problem_of(kind: str = "delta") -> tuple[Problem, Data]:
    posterior, data = networks.drawn() if kind in ("draws", "each") else networks.network(kind)
    erased, retained = data.split(networks.SPOILED)
    network = Network.of(posterior, erased, 0, jointly=kind == "draws")
    return network.problem(retained, 0, slice(None)), erased


def parts(problem: Problem, size: int) -> list[Batch]:
    """All rows to descend on, in batches of equal size."""
    whole = len(problem.rows) // size * size
    return list(problem.rows.split(problem.rows.ids[:whole])[0].with_batch_size(size).batches())


def slopes(problem: Problem, params: Params, batch: Batch) -> Params:
    """Mean ∇(−log likelihood) by row."""
    noise = problem.points.noise(batch, 0)
    return batch_gradient(problem.points, params, batch, noise, lambda run: (), 1 / len(batch))[0]


def away(problem: Problem) -> Params:
    generator = torch.Generator().manual_seed(4)
    return {n: v + 0.1 * torch.randn(v.shape, generator=generator) for n, v in problem.origin.items()}


# --- the gradient


@pytest.mark.parametrize("kind", ["delta", "each"])
def test_its_mean_is_the_tilted_energys_gradient(kind: str) -> None:
    problem, _ = problem_of(kind)
    params, batches, rule = away(problem), parts(problem, 32), PairedSteps(1, 1e-3, beta=1.0, shrink=False)
    found = [rule.gradient(problem, rule.state(problem, None), params, batch, 0) for batch in batches]
    mean = scale(_total(found), 1 / len(batches))
    here, there = (
        scale(_total([slopes(problem, point, batch) for batch in batches]), 1 / len(batches))
        for point in (params, problem.origin)
    )
    pull = subtract(prior_gradient(problem.points, params, 0), scale(problem.tilt, -1.0))
    wanted = axpy(1 / problem.num_data, pull, subtract(here, there))
    assert norm(subtract(mean, wanted)) < 1e-12 * norm(wanted)


def _total(parts: list[Params]) -> Params:
    total = parts[0]
    for part in parts[1:]:
        total = add(total, part)
    return total


@pytest.mark.parametrize("kind", ["delta", "local"])
def test_without_beta_it_is_fine_tuning(kind: str) -> None:
    problem, _ = problem_of(kind)
    rule, params, batch = PairedSteps(1, 1e-3, beta=0.0), away(problem), parts(problem, 32)[0]
    found = rule.gradient(problem, rule.state(problem, None), params, batch, 7)
    noise = problem.points.noise(batch, 7)
    plain = batch_gradient(problem.points, params, batch, noise, lambda run: (), 1 / len(batch))[0]
    wanted = axpy(1 / problem.num_data, prior_gradient(problem.points, params, 0), plain)
    assert norm(subtract(found, wanted)) < 1e-12 * norm(wanted)


def test_at_the_origin_only_the_request_is_left() -> None:
    """Rows and noise cancel whatever the batch; what is left is −∇h/N."""
    posterior, data = networks.network("local")
    erased, retained = data.split(networks.SPOILED)
    network = Network.of(posterior, erased, 0)
    problem = network.problem(retained, 0, slice(None))
    rule = PairedSteps(1, 1e-3, beta=1.0, shrink=False)
    for number, batch in enumerate(parts(problem, 16)):
        found = rule.gradient(problem, rule.state(problem, None), problem.origin, batch, number)
        assert norm(axpy(1 / problem.num_data, network.reading.force, found)) < 1e-12 * norm(network.reading.force)


def test_fully_shrunk_it_is_the_retained_energys_gradient() -> None:
    """A fit far from stationary: the measured gradient takes the tilt's place."""
    problem, _ = problem_of("delta")
    far = replace(problem, tilt=scale(problem.tilt, 1e4))
    rule = PairedSteps(1, 1e-3, beta=1.0)
    state, batches = rule.state(far, None), parts(far, 32)
    for batch in batches:
        rule.gradient(far, state, far.origin, batch, 0)
    assert state.s > 0.99
    kept = PairedSteps(1, 1e-3).state(problem, None)
    for batch in batches:
        PairedSteps(1, 1e-3).gradient(problem, kept, problem.origin, batch, 0)
    assert 0 <= kept.s < state.s


def test_beta_is_one_for_equal_residuals_and_zero_for_opposite_ones() -> None:
    residual = torch.tensor([[0.5, -0.2, 0.1], [-0.3, 0.4, 0.2]])
    flipped = residual * torch.tensor([1.0, -1.0, 0.5])
    values = Beta.one(None, 3, residual).after(flipped, residual).values
    assert torch.allclose(values[:3], torch.tensor([1.0, 0.0, 0.5]), atol=1e-9)


# --- what it does


@pytest.mark.parametrize("kind", ["local", "mean-field", "AutoNormal", "delta", "draws", "each"])
def test_spoiled_rows_are_forgotten(kind: str) -> None:
    before, data = networks.drawn() if kind in ("draws", "each") else networks.network(kind)
    kept = {name: value.clone() for name, value in before.params.items()}
    erased, retained = data.split(networks.SPOILED)
    after, report = forget(before, erased, retained, replace(QUICK, jointly=kind == "draws"))
    assert report.log_likelihood_after < report.log_likelihood_before - 0.3
    assert report.evidence.held_out_fall > 0 and report.evidence.solver == "returned: paired descent"
    assert _likelihood(after, retained) > _likelihood(before, retained) - 0.02
    assert torch.equal(after.ids, retained.ids) and after.parent == before.digest
    assert all(torch.equal(before.params[name], value) for name, value in kept.items())


def _likelihood(posterior: Posterior, data: Data) -> float:
    """Mean log likelihood, nats a row."""
    assert isinstance(posterior, (VariationalPosterior, SampledPosterior))
    args = () if isinstance(posterior, SampledPosterior) else (50,)
    return float(posterior.log_likelihood(data, *args).mean())


def test_removing_is_not_adding() -> None:
    """The other sign would raise the erased rows' likelihood: they are spoiled, so the two differ."""
    problem, erased = problem_of("delta")
    rule = PairedSteps(60, 2e-2, 64, beta=1.0, shrink=False)
    back = scale(prior_gradient(problem.points, problem.origin, 0), -1.0)
    other = replace(problem, tilt=subtract(scale(back, 2.0), problem.tilt))
    changes = [_erased_gain(p, rule.run(p, None).params, erased) for p in (problem, other)]
    assert changes[0] < -5 < 1 < changes[1]


def _erased_gain(problem: Problem, params: Params, erased: Data) -> float:
    def total(point: Params) -> float:
        batch, first = next(erased.batches()), {name: value[0] for name, value in point.items()}
        run = problem.points.run(first, batch, problem.points.noise(batch, 0))
        return float(run.log_likelihood().sum())

    return total(params) - total(problem.origin)


def test_it_goes_where_a_refit_goes() -> None:
    """On a convex model there is one place to go."""
    x, y = networks.clouds()
    model = local_reparametrization(MLP((2, 3)))
    before = fits.fitted(model, MeanField(model), Data(x, y))
    erased, retained = Data(x, y).split(networks.SPOILED)
    refit = fits.refitted(before, retained)
    after, _ = forget(before, erased, retained, PairedDescent(400, 2e-2, 64))
    assert float(fits.remaining(after, before, refit)) < 0.3


def test_the_judge_sees_the_request_alone() -> None:
    """φ of no move is 0, of the way to the refit negative, of the way back positive."""
    problem, _ = problem_of("delta")
    found = PairedSteps(60, 2e-2, 64, beta=1.0, shrink=False).run(problem, None).params
    back = axpy(-1.0, subtract(found, problem.origin), problem.origin)
    assert judge(problem, problem.origin, None).rise == pytest.approx(0, abs=1e-9)
    assert judge(problem, found, None).rise < 0 < judge(problem, back, None).rise


def test_a_seed_gives_the_same_result() -> None:
    before, data = networks.network()
    results = [forget(before, *data.split(networks.SPOILED), replace(QUICK, seed=s))[0] for s in (1, 1, 2)]
    assert results[0].digest == results[1].digest != results[2].digest


@pytest.mark.parametrize("kind", ["local", "delta"])
def test_nothing_erased_is_the_identity(kind: str) -> None:
    before, data = networks.network(kind)
    assert forget(before, *data.split([]), QUICK)[0] is before


def deviations(posterior: Posterior) -> torch.Tensor:
    """Of draws from their mean, flat."""
    rows = torch.cat([value.flatten(0, 1).flatten(1) for value in posterior.params.values()], 1)
    return (rows - rows.mean(0)).flatten()


def test_draws_that_move_alone_keep_their_deviations() -> None:
    """Each moves on its own, none to the mode."""
    before, data = networks.drawn()
    after, _ = forget(before, *data.split(networks.SPOILED), replace(QUICK, jointly=False))
    mine, theirs = deviations(before), deviations(after)
    assert not torch.allclose(mine, theirs)
    assert float(torch.cosine_similarity(mine, theirs, dim=0)) > 0.4
    assert float(theirs.norm() / mine.norm()) > 0.8


def test_draws_in_groups_end_where_they_end_together(monkeypatch: pytest.MonkeyPatch) -> None:
    before, data = networks.drawn()
    alone = replace(QUICK, jointly=False)
    whole, _ = forget(before, *data.split(networks.SPOILED), alone)
    size = sum(value[0, 0].numel() for value in before.params.values())
    monkeypatch.setattr("pyro_forget.forgetters.reading._NUMBERS_AT_ONCE", 2 * size)
    parts, report = forget(before, *data.split(networks.SPOILED), alone)
    assert report.evidence.solver == "returned: paired descent"
    assert norm(subtract(parts.params, whole.params)) < 1e-6 * norm(whole.params)


def test_refused_groups_refuse_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    before, data = networks.drawn()
    wild = PairedDescent(num_steps=20, learning_rate=3.0, head_start=False, jointly=False)
    monkeypatch.setattr("pyro_forget.forgetters.reading._NUMBERS_AT_ONCE", 1)
    after, report = forget(before, *data.split(networks.SPOILED), wild, throw=False)
    assert after is before and report.evidence.solver == "returned: nothing"


def test_draws_that_move_jointly_all_take_one_step() -> None:
    before, data = networks.drawn()
    after, report = forget(before, *data.split(networks.SPOILED), QUICK)
    assert torch.allclose(deviations(before), deviations(after), atol=1e-12)
    assert any("covariance is still that of all data" in said for said in report.warnings)


@pytest.mark.parametrize("jointly", [True, False])
def test_the_reach_of_a_request_is_told_in_function_space(jointly: bool) -> None:
    """Weights 1/p(erased | θ) of the draws as they came, against the posterior's own log likelihoods."""
    before, data = networks.drawn(60)
    erased, retained = data.split(networks.SPOILED)
    _, report = forget(before, erased, retained, replace(QUICK, jointly=jointly), throw=False)
    wanted = pareto_smooth(-before.log_likelihood(erased).sum(-1).flatten())
    found = report.evidence.extra["reach"]
    assert found["space"] == "function" and found["draws"] == 60 and "sampler's own bias" in found["limits"]
    assert found["ess"] == pytest.approx(wanted.ess, rel=1e-6) and found["khat"] == pytest.approx(wanted.khat, rel=1e-4)
    guide, rows = networks.network("delta")
    assert "reach" not in forget(guide, *rows.split(networks.SPOILED), QUICK)[1].evidence.extra


def test_weights_of_draws_count_in_their_common_step() -> None:
    """With all weight on one draw the step is that draw's own, and the weights come back."""
    posterior, data = networks.drawn()
    erased, retained = data.split(networks.SPOILED)
    weights = torch.full((2, 3), -60.0)
    weights[1, 2] = 0.0
    weighted = posterior.edited(posterior.params, data.ids, weights)
    alone = posterior.edited({n: v[1:, 2:].expand(2, 3, *v.shape[2:]) for n, v in posterior.params.items()}, data.ids)
    steps = []
    for before in (weighted, alone):
        after, _ = forget(before, erased, retained, QUICK)
        steps.append(subtract(after.params, before.params))
    assert norm(steps[1]) > 0.1
    assert norm(subtract(*steps)) < 1e-9 * norm(steps[1])
    assert after.log_weights is None
    after, _ = forget(weighted, erased, retained, QUICK)
    assert torch.equal(after.log_weights, weighted.log_weights)


# --- refusals


def test_steps_that_make_it_worse_are_not_returned() -> None:
    before, data = networks.network()
    wild = PairedDescent(num_steps=20, learning_rate=3.0)
    _, report = forget(before, *data.split(networks.SPOILED), wild)
    assert report.evidence.solver == "returned: output layer" and "raised the tilted energy" in report.warnings[0]
    assert any(size == 0 for name, size in report.evidence.step_norm.items() if "loc" in name)
    with pytest.raises(Refused, match="held-out retained rows rose"):
        forget(before, *data.split(networks.SPOILED), replace(wild, head_start=False))
    kept, report = forget(before, *data.split(networks.SPOILED), replace(wild, head_start=False), throw=False)
    assert kept is before and report.evidence.solver == "returned: nothing"


def test_bad_input_is_an_error() -> None:
    x, y = networks.clouds()
    before, data = networks.network()
    with pytest.raises(ValueError, match="`pool` is 500, the retained data have 280 rows"):
        forget(before, *data.split(networks.SPOILED), PairedDescent(pool=500))
    counts = Data(x, y.to(x))
    with pytest.raises(ValueError, match="Poisson"):
        forget(networks.started(networks.counts_network, counts), *counts.split(range(5)), QUICK)
    y[:20] = 7
    with pytest.raises(ValueError, match="classes such as 7"):
        forget(before, *Data(x, y).split(networks.SPOILED), QUICK)


def test_an_energy_by_hand_has_no_output() -> None:
    posterior, data = fits.fitted(*_linear()), fits.linear()[2]
    by_hand = EnergyPosterior(posterior.params, posterior.energy, data)
    with pytest.raises(ValueError, match="has no model whose output could be read"):
        forget(by_hand, *data.split(range(5)), QUICK)


def _linear():
    _, model, data = fits.linear()
    return model, MeanField(model), data


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_steps": 0}, "`num_steps` must be at least 1"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive"),
    ],
)
def test_settings_are_checked(setting, message) -> None:
    with pytest.raises(ValueError, match=message):
        PairedDescent(**setting)


# --- the default


def test_the_default_for_a_network() -> None:
    x, y = networks.clouds()
    data = Data(x, y)
    wide, narrow = networks.started(MLP((2, 300, 3)), data), networks.network()[0]
    assert default_forgetter(wide) == PairedDescent() and is_network(wide)
    assert default_forgetter(narrow) == Otherwise(Influence(), PairedDescent())
    flat = networks.started(MLP((2, 600)), Data(x, y))
    assert not is_network(flat)
    assert default_forgetter(networks.drawn()[0]) == Transport()


@dataclass(frozen=True)
class Stub:
    refused: str | None

    def edit(self, posterior: Posterior, erased: Data, retained: Data) -> Edit:
        return Edit(posterior, Evidence("stub", refused=self.refused))


@dataclass(frozen=True)
class Failing:
    def edit(self, posterior: Posterior, erased: Data, retained: Data) -> Edit:
        raise ValueError("cannot read this model")


def test_where_influence_is_refused_paired_descent_takes_its_place() -> None:
    before, data = networks.network()
    _, report = forget(before, *data.split(networks.SPOILED), Otherwise(Stub("beyond it"), QUICK))
    assert report.evidence.method.startswith("PairedDescent")
    assert "stub was refused (beyond it)" in report.warnings[0]
    assert report.evidence.extra["refused_before"] == "beyond it"


@pytest.mark.parametrize("second", [Stub("nor this"), Failing()])
def test_what_both_refuse_is_refused_by_the_first(second: Forgetter) -> None:
    before, data = networks.network()
    after, report = forget(before, *data.split([1]), Otherwise(Stub("beyond it"), second), throw=False)
    assert after is before and report.refused == "beyond it" and report.evidence.extra["refused_after"]


def test_what_the_first_accepts_is_returned() -> None:
    before, data = networks.network()
    _, report = forget(before, *data.split([1]), Otherwise(Stub(None), Failing()))
    assert report.evidence.method == "stub" and not report.warnings
