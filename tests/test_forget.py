"""The verb: what it demands of a request, what it leaves alone, what it reports. Laws hold for every forgetter."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

from pyro_forget.data import Data
from pyro_forget.energy import FunctionEnergy
from pyro_forget.evaluation import gaussian_kl
from pyro_forget.forgetters.default import Otherwise, default_forgetter
from pyro_forget.forgetters.finetune import Finetune
from pyro_forget.forgetters.influence import Influence
from pyro_forget.forgetters.more_steps import MoreSteps
from pyro_forget.forgetters.paired_descent import PairedDescent
from pyro_forget.forgetters.published_chain import PublishedChain
from pyro_forget.forgetters.retrain import Retrain
from pyro_forget.forgetters.reweight import Reweight
from pyro_forget.forgetters.transport import Transport
from pyro_forget.forgetting import Refused, forget
from pyro_forget.guides import MeanField
from pyro_forget.inference.recursion import Recursion
from pyro_forget.inference.stochastic import SGHMC, SGLD
from pyro_forget.outcome import Edit, Evidence, Forgetter
from pyro_forget.params import Params
from pyro_forget.posterior import EnergyPosterior, Posterior, SampledPosterior, VariationalPosterior
from tests import fits
from tests.oracles import LinearGaussian

NUM_DRAWS = 400


def guided() -> tuple[VariationalPosterior, Data]:
    exact, model, data = fits.linear()
    return fits.placed(fits.started(model, MeanField(model), data), exact), data


def drawn() -> tuple[SampledPosterior, Data]:
    """Independent draws of the exact posterior, in two chains."""
    exact, model, data = fits.linear()
    noise = fits.normal(9, NUM_DRAWS, 4)
    draws = exact.mean + noise @ torch.linalg.cholesky(exact.covariance).T
    return SampledPosterior(model, {"weight": draws.reshape(2, -1, 4)}, data), data


def by_hand() -> tuple[EnergyPosterior, Data]:
    data = Data(fits.normal(0, 60))

    def share(params: Params, batch: Any) -> Tensor:
        return 0.5 * (params["mean"] - batch.args[0]).square().sum()

    energy = FunctionEnergy(lambda params, batch: share(params, batch) + 0.5 * params["mean"].square(), share)
    return EnergyPosterior({"mean": next(data.batches()).args[0].sum() / 61}, energy, data), data


FORGETTERS: dict[str, tuple[Callable[[], tuple[Any, Data]], Forgetter]] = {
    "Influence": (guided, Influence()),
    "Influence, one sweep in chunks": (guided, Influence(max_sweeps=1, chunk=4)),
    "Influence, Hessian": (guided, Influence(curvature="hessian")),
    "Influence, published": (guided, Influence.published(num_steps=5)),
    "Influence by hand": (by_hand, Influence()),
    "Finetune": (guided, Finetune(num_steps=20, progress=False)),
    "Finetune by hand": (by_hand, Finetune(num_steps=20, progress=False)),
    "Finetune draws": (drawn, Finetune(num_moves=2, progress=False)),
    "More steps": (drawn, MoreSteps(SGLD(1e-4, batch_size=16), 5, progress=False)),
    "More steps after transport": (drawn, MoreSteps(SGHMC(1e-4, batch_size=16), 5, after=Transport(), progress=False)),
    "A chain that goes on": (
        drawn,
        PublishedChain(SGHMC(1e-4, batch_size=16), Recursion(0.05, 5, 16), thin=2, progress=False),
    ),
    "Retrain": (guided, Retrain(num_steps=20, progress=False)),
    "Retrain draws": (drawn, Retrain(num_chains=1, num_draws=10, num_warmup=10, progress=False)),
    "Reweight": (drawn, Reweight()),
    "Transport": (drawn, Transport()),
    "Transport, shift": (drawn, Transport(shift_only=True)),
    "Transport, published": (drawn, Transport.published()),
}


def stored() -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def user_of(posterior: Any) -> dict[str, Tensor]:
    """The tensors that the user's own guide holds."""
    if not isinstance(posterior, VariationalPosterior):
        return {}
    program = posterior.energy.whole.guide.guide.program
    return {name: value.detach().clone() for name, value in program.named_parameters()}


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# --- laws of every forgetter


@pytest.mark.parametrize("name", FORGETTERS)
def test_forgetting_nothing_is_the_identity(name: str) -> None:
    make, forgetter = FORGETTERS[name]
    posterior, data = make()
    digest, params = posterior.digest, {name: value.clone() for name, value in posterior.params.items()}
    after, report = forget(posterior, *data.split([]), forgetter)
    assert after is posterior and after.digest == digest and after.parent is None
    assert_same(after.params, params)
    assert report.num_erased == 0 and report.refused is None and report.kl is None


@pytest.mark.parametrize("name", FORGETTERS)
def test_everything_that_was_there_stays_as_it_was(name: str) -> None:
    """Posterior, guide, parameter store, data and generator; the result is a posterior of its own."""
    make, forgetter = FORGETTERS[name]
    posterior, data = make()
    erased, retained = data.split(range(50, 58))
    before = posterior.digest, data.ids, stored(), user_of(posterior), torch.get_rng_state()
    after, report = forget(posterior, erased, retained, forgetter)
    assert posterior.digest == before[0] and torch.equal(data.ids, before[1])
    assert_same(stored(), before[2])
    assert_same(user_of(posterior), before[3])
    assert torch.equal(torch.get_rng_state(), before[4])
    assert after.parent == before[0] != after.digest
    assert torch.equal(after.ids, retained.ids) and after.num_data == report.num_retained == 52
    assert report.evidence.method and report.num_erased == 8 and report.seconds > 0
    json.dumps(report.to_dict())


@pytest.mark.parametrize("name", [name for name in FORGETTERS if "published" not in name])
def test_two_requests_in_a_row(name: str) -> None:
    make, forgetter = FORGETTERS[name]
    posterior, data = make()
    erased, retained = data.split(range(50, 55))
    first, _ = forget(posterior, erased, retained, forgetter)
    second, report = forget(first, *retained.split([3, 7]), forgetter)
    assert second.parent == first.digest and second.num_data == 53 and report.num_data == 55
    with pytest.raises(ValueError, match="erased before, or never there"):
        forget(second, erased, retained, forgetter)


# --- the request


@pytest.mark.parametrize("make", [guided, drawn, by_hand], ids=["guide", "draws", "by hand"])
class TestRequest:
    def test_the_two_overlap(self, make: Callable[[], tuple[Any, Data]]) -> None:
        posterior, data = make()
        with pytest.raises(ValueError, match=r"share 60 ids, such as \[0, 1, 2, 3, 4\]: use `data.split"):
            forget(posterior, data, data)

    def test_the_two_are_incomplete(self, make: Callable[[], tuple[Any, Data]]) -> None:
        posterior, data = make()
        erased, rest = data.split([0])
        with pytest.raises(ValueError, match=r"lack 2 of the posterior's ids, such as \[1, 2\]"):
            forget(posterior, erased, rest.split([1, 2])[1])

    def test_ids_that_the_posterior_never_had(self, make: Callable[[], tuple[Any, Data]]) -> None:
        posterior, data = make()
        known = posterior.edited(posterior.params, data.ids[:58])
        with pytest.raises(ValueError, match=r"2 ids are not the posterior's, such as \[58, 59\]"):
            forget(known, *data.split([0]))

    def test_nothing_would_be_left(self, make: Callable[[], tuple[Any, Data]]) -> None:
        posterior, data = make()
        everything, nothing = data.split(data.ids)
        with pytest.raises(ValueError, match="what is left is the prior"):
            forget(posterior, everything, nothing)

    def test_ids_are_given_once(self, make: Callable[[], tuple[Any, Data]]) -> None:
        _, data = make()
        with pytest.raises(ValueError, match="5"):
            data.split([5, 5])


def test_retained_and_erased_the_other_way_round() -> None:
    """No error can tell; the report can."""
    posterior, data = guided()
    erased, retained = data.split(range(8))
    after, report = forget(posterior, retained, erased)
    assert after.num_data == 8 and report.num_erased == 52


# --- the report


def test_the_default_forgetter() -> None:
    assert default_forgetter(guided()[0]) == Otherwise(Influence(), PairedDescent())
    assert isinstance(default_forgetter(by_hand()[0]), Influence)
    assert isinstance(default_forgetter(drawn()[0]), Transport)


def test_the_report_of_a_guide() -> None:
    posterior, data = guided()
    exact, _, _ = fits.linear()
    rows = list(range(40, 60))
    after, report = forget(posterior, *data.split(rows))
    assert report.kl == pytest.approx(float(gaussian_kl(*fits.flat(after), *fits.flat(posterior))))
    left = LinearGaussian(exact.x[rows], exact.y[rows], 2.0, 0.7)
    for figure, one in ((report.log_likelihood_before, posterior), (report.log_likelihood_after, after)):
        spread = (left.x @ fits.covariance(one) * left.x).sum(1) + 0.49
        density = torch.distributions.Normal(left.x @ fits.loc(one), spread.sqrt()).log_prob(left.y).mean()
        assert figure == pytest.approx(float(density), rel=0.05)
    assert report.log_likelihood_after < report.log_likelihood_before - 0.3


def test_the_report_of_draws() -> None:
    """The same figures; weights count in them."""
    posterior, data = drawn()
    exact, _, _ = fits.linear()
    rows = list(range(55, 60))
    _, report = forget(posterior, *data.split(rows), Reweight())
    new, old = exact.without(rows), exact
    truth = float(
        gaussian_kl(new.mean, torch.linalg.cholesky(new.covariance), old.mean, torch.linalg.cholesky(old.covariance))
    )
    assert report.kl == pytest.approx(truth, rel=0.5)
    assert report.log_likelihood_after < report.log_likelihood_before


def test_draws_that_never_moved_have_no_distance() -> None:
    """No reason to lose the edit."""
    posterior, data = drawn()
    still = posterior.edited({"weight": posterior.params["weight"][:, :1].expand(2, 200, 4)}, posterior.ids)
    after, report = forget(still, *data.split([1]), Finetune(num_moves=1, progress=False))
    assert report.kl is None and report.log_likelihood_after is not None and after.num_data == 59


@dataclass(frozen=True)
class Unwilling:
    """A forgetter that refuses."""

    def edit(self, posterior: Posterior, erased: Data, retained: Data) -> Edit:
        return Edit(posterior, Evidence("unwilling", refused="it is Sunday", warnings=("tomorrow, perhaps",)))


def test_a_refusal() -> None:
    posterior, data = guided()
    split = data.split([1])
    with pytest.raises(Refused, match="Nothing was forgotten: it is Sunday") as caught:
        forget(posterior, *split, Unwilling())
    assert caught.value.report.warnings == ("tomorrow, perhaps",)
    after, report = forget(posterior, *split, Unwilling(), throw=False)
    assert after is posterior and torch.equal(after.ids, data.ids)
    assert report.refused == "it is Sunday" and report.to_dict()["refused"] == "it is Sunday"
    assert report.kl is None


def test_batches_of_any_size() -> None:
    posterior, data = guided()
    whole, parts = (forget(posterior, *rows.split(range(9)))[1] for rows in (data, data.with_batch_size(4)))
    assert whole.kl == pytest.approx(parts.kl)
    assert whole.log_likelihood_after == pytest.approx(parts.log_likelihood_after)
