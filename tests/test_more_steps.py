"""Draws that go on by stochastic-gradient MCMC on the retained data, against exact posteriors."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_forget import Edit, Evidence, MoreSteps, Refused, SampledPosterior, forget
from pyro_forget.data import Data
from pyro_forget.forgetters import Finetune, Reweight, Transport, more_steps
from pyro_forget.forgetters.health import input_health
from pyro_forget.inference.stochastic import PSGLD, SGHMC, SGLD, SGNHT, Cyclic, Rule, ScaleAdaptedSGHMC
from pyro_forget.models import MLP
from tests.oracles import LinearGaussian
from tests.stochastic import NOISE, PRIOR_STD, assert_same_law, correlated, langevin_covariance, linear_model

NUM_DRAWS = 4000
ERASED = range(30, 40)


def spoiled() -> LinearGaussian:
    """The last ten rows pull to where no other row does, so that adding and erasing them differ."""
    clean = correlated()
    y = clean.y.clone()
    y[30:] += clean.x[30:] @ torch.tensor([3.0, -1.0, -4.0]).double()
    return LinearGaussian(clean.x, y, PRIOR_STD, NOISE)


WHOLE = spoiled()
RETAINED = WHOLE.without(list(ERASED))
DATA = Data(WHOLE.x, WHOLE.y)
LARGEST = float(torch.linalg.eigvalsh(WHOLE.precision)[-1])
QUICK = SGLD(0.3 / LARGEST, batch_size=None)


def drawn(num_draws: int = NUM_DRAWS) -> SampledPosterior:
    """Independent draws of the exact posterior of all data, in two chains."""
    noise = torch.randn(num_draws, 3, generator=torch.Generator().manual_seed(1))
    draws = WHOLE.mean + noise @ torch.linalg.cholesky(WHOLE.covariance).T
    return SampledPosterior(linear_model, {"w": draws.reshape(2, -1, 3)}, DATA)


def moved(posterior: SampledPosterior, rule: Rule, num_steps: int, **options: Any) -> tuple[SampledPosterior, Any]:
    return forget(posterior, *DATA.split(ERASED), MoreSteps(rule, num_steps, progress=False, **options))


def flat(posterior: SampledPosterior) -> Tensor:
    return posterior.latents["w"].flatten(0, 1)


def test_many_steps_reach_the_retained_posterior():
    """The exact law of the discrete dynamics: mean and covariance within 5 σ, where the erased rows moved both."""
    before = drawn()
    after, report = moved(before, QUICK, 150)
    exact = langevin_covariance(RETAINED, 0.3 / LARGEST)
    assert input_health(after)[1] > 0.8 * NUM_DRAWS
    assert_same_law(flat(after), RETAINED.mean, exact)
    gap = (WHOLE.mean - RETAINED.mean).abs() / RETAINED.covariance.diagonal().sqrt()
    assert float(gap.max()) > 1.5
    assert report.evidence.method == "150 steps of SGLD on the retained data from each draw"
    assert (report.evidence.num_draws, report.evidence.rhat_input < 1.01) == (NUM_DRAWS, True)
    assert report.evidence.extra["refresh"].keys() == {"steps", "seconds", "step_size"}
    assert report.evidence.extra["refresh"]["step_size"] == 0.3 / LARGEST


@pytest.mark.parametrize(
    ("rule", "num_steps"),
    [
        (SGLD(0.05 / LARGEST, batch_size=10), 600),
        (SGHMC(0.02 / LARGEST, friction=0.2, batch_size=10), 400),
        (SGNHT(0.02 / LARGEST, friction=0.2, batch_size=10), 500),
        (PSGLD(5e-3, decay=0.999, batch_size=10), 1000),
        (ScaleAdaptedSGHMC(0.05, friction=0.2, subtract_noise=False, batch_size=10), 700),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_rule_moves_draws_to_the_retained_posterior(rule, num_steps, monkeypatch):
    """Mini-batches of 10 of 30 rows, in four groups."""
    monkeypatch.setattr(more_steps, "_MOST_DRAWS_AT_ONCE", 150)
    after, _ = moved(drawn(600), rule, num_steps)
    assert_same_law(flat(after), RETAINED.mean, RETAINED.covariance, bias=0.1)


@pytest.mark.parametrize(("name", "limit"), [("_MOST_DRAWS_AT_ONCE", 700), ("_NUMBERS_AT_ONCE", 30 * 700)])
def test_groups_have_the_law_of_all_at_once(name, limit, monkeypatch):
    """Six groups, the last of other size, each with noise of its own."""
    monkeypatch.setattr(more_steps, name, limit)
    after, _ = moved(drawn(), QUICK, 150)
    assert_same_law(flat(after), RETAINED.mean, langevin_covariance(RETAINED, 0.3 / LARGEST))
    noise = flat(after) - RETAINED.mean
    correlation = (noise[:700] * noise[700:1400]).mean(0) / noise.square().mean(0)
    assert bool((correlation.abs() < 5 / 700**0.5).all())


@pytest.mark.parametrize("limit", [1, 4, 4096])
def test_every_draw_keeps_its_place(limit, monkeypatch):
    """One tiny step moves nobody far, whatever the groups."""
    monkeypatch.setattr(more_steps, "_MOST_DRAWS_AT_ONCE", limit)
    x, y = torch.randn(20, 5), torch.randint(3, (20,))
    model, data = MLP((5, 7, 3)), Data(x, y)
    shapes = {"layer0.weight": (7, 5), "layer0.bias": (7,), "layer1.weight": (3, 7), "layer1.bias": (3,)}
    before = SampledPosterior(model, {name: torch.randn(2, 3, *shape) for name, shape in shapes.items()}, data)
    forgetter = MoreSteps(SGLD(1e-12, batch_size=10), 1, progress=False)
    after, report = forget(before, *data.split([3]), forgetter)
    for name, value in before.params.items():
        torch.testing.assert_close(after.params[name], value, atol=1e-4, rtol=0)
        length = report.evidence.step_norm[name]
        assert length == pytest.approx((2e-12 * value[0, 0].numel()) ** 0.5, rel=0.5)


@pytest.mark.parametrize(
    ("num_entries", "num_rows", "size"), [(100_000, 128, 20), (3_000_000, 128, 1), (10, 10_000, 200), (10, 128, 4096)]
)
def test_groups_are_bounded_in_numbers(num_entries, num_rows, size):
    """Two million, of the draws' entries or of their rows, and every draw is in one group."""
    groups = list(more_steps._groups({"w": torch.empty(9000, num_entries, device="meta")}, num_rows))
    assert {group.stop - group.start for group in groups[:-1]} == {size}
    assert [group.start for group in groups] == [0, *(group.stop for group in groups[:-1])] and groups[-1].stop == 9000


def test_the_seed_decides():
    before = drawn(20)
    digests = [moved(before, SGLD(1e-4, batch_size=8), 5, seed=seed)[0].digest for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_it_goes_on_after_another_method():
    """Its evidence is kept, and so are its weights."""
    before = drawn(400)
    alone, first = forget(before, *DATA.split(ERASED), Transport())
    after, report = moved(before, SGLD(1e-9, batch_size=8), 3, after=Transport())
    assert alone.log_weights is not None and torch.equal(after.log_weights, alone.log_weights)
    torch.testing.assert_close(after.params["w"], alone.params["w"], atol=1e-3, rtol=0)
    assert after.parent == before.digest
    said = report.evidence
    assert said.method == f"{first.evidence.method}, then 3 steps of SGLD on the retained data"
    assert (said.ess, said.khat, said.warnings) == (first.evidence.ess, first.evidence.khat, first.evidence.warnings)
    assert said.extra.keys() == first.evidence.extra.keys() | {"refresh"}
    assert said.step_norm["w"] == pytest.approx(first.evidence.step_norm["w"], rel=1e-2)


def test_weights_that_came_with_the_draws_stay():
    erased, retained = DATA.split([0])
    weighted, _ = forget(drawn(400), erased, retained, Reweight())
    after, _ = forget(weighted, *retained.split([1]), MoreSteps(SGLD(1e-5, batch_size=8), 2, progress=False))
    assert weighted.log_weights is not None and torch.equal(after.log_weights, weighted.log_weights)


def test_other_draws_than_came():
    """A method that resamples may hand on fewer draws than there were."""
    after, report = moved(drawn(400), QUICK, 2, after=Finetune(num_starts=50, num_moves=1, progress=False))
    assert after.shape == (1, 50) and report.evidence.num_draws == 50 and report.evidence.step_norm["w"] > 0


class Refusing:
    """A method that always refuses."""

    def edit(self, posterior: Any, erased: Data, retained: Data) -> Edit:
        return Edit(posterior, Evidence("refusing", refused="no"))


def test_a_refusal_before_is_a_refusal():
    before = drawn(20)
    after, report = forget(before, *DATA.split(ERASED), MoreSteps(QUICK, 5, after=Refusing()), throw=False)
    assert after is before and report.refused == "no"


def test_steps_that_run_away_are_refused():
    before = drawn(20)
    wild = MoreSteps(SGLD(10 / LARGEST, batch_size=None), 2000, progress=False)
    with pytest.raises(Refused, match=r"not finite any more at step \d+: .* step size of .*Try"):
        forget(before, *DATA.split(ERASED), wild)
    after, report = forget(before, *DATA.split(ERASED), wild, throw=False)
    assert after is before and report.refused


def test_no_draw_is_left_in_an_exploration():
    """Seven steps of a cycle that descends for ten: the draws go on until noise is back."""
    after, report = moved(drawn(50), SGLD(Cyclic(1e-4, 20, 0.5), batch_size=None), 7)
    assert report.evidence.extra["refresh"]["steps"] == 11 and after.shape == (2, 25)


def test_the_share_of_cut_gradients_is_told(monkeypatch):
    """Over all groups; gradients of the second half of the steps, as for chains after their warm-up."""
    monkeypatch.setattr(more_steps, "_MOST_DRAWS_AT_ONCE", 20)
    before = drawn(50)
    shares = [
        moved(before, SGLD(1e-5, batch_size=None, max_gradient_norm=most), 4)[1].evidence.extra["refresh"]["clipped"]
        for most in (1e-6, 20.0, 1e9)
    ]
    assert shares[0] == 1.0 > shares[1] > 0.0 == shares[2]


def test_bad_input():
    with pytest.raises(ValueError, match="`num_steps` must be at least 1, got 0"):
        MoreSteps(QUICK, 0)
    with pytest.raises(ValueError, match=r"`batch_size` is 31, the data have 30 rows"):
        moved(drawn(20), SGLD(1e-4, batch_size=31), 1)


def test_a_bar_is_shown(capsys):
    forget(drawn(20), *DATA.split(ERASED), MoreSteps(QUICK, 3))
    assert "3/3" in capsys.readouterr().err
