"""The published algorithm on a chain that goes on, against exact posteriors."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_forget import PSGLD, SGHMC, SGLD, SGNHT, Refused, SampledPosterior, ScaleAdaptedSGHMC, forget
from pyro_forget.data import Data
from pyro_forget.forgetters import PublishedChain, Reweight, Transport
from pyro_forget.forgetters.health import input_health
from pyro_forget.inference.recursion import Recursion
from pyro_forget.inference.stochastic import SVRG, Cyclic, FixedMode, Rule
from tests.oracles import LinearGaussian
from tests.stochastic import NOISE, PRIOR_STD, assert_same_law, correlated, langevin_covariance, linear_model

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
STABLE = 40 / LARGEST  # the recursion's step is this over the number of data, and below 2 over the largest curvature
STILL = SGLD(1e-20, batch_size=None)


def recursion(num_steps: int = 200, chunk: int = 2, scaling: float = STABLE, num_draws: int = 1) -> Recursion:
    """On all rows at once."""
    return Recursion(scaling, num_steps, batch_size=100, num_draws=num_draws, chunk=chunk)


def drawn(num_draws: int = 20, mean: Tensor = WHOLE.mean) -> SampledPosterior:
    """Independent draws of the exact posterior of all data, the last one at its mean, or about another place."""
    noise = torch.randn(num_draws, 3, generator=torch.Generator().manual_seed(1))
    noise[-1] = 0.0
    draws = mean + noise @ torch.linalg.cholesky(WHOLE.covariance).T
    return SampledPosterior(linear_model, {"w": draws.reshape(1, -1, 3)}, DATA)


def moved(posterior: SampledPosterior, rule: Rule, own: Recursion, **options: Any) -> tuple[SampledPosterior, Any]:
    return forget(posterior, *DATA.split(ERASED), PublishedChain(rule, own, progress=False, **options))


def flat(posterior: SampledPosterior) -> Tensor:
    return posterior.latents["w"].flatten(0, 1)


def newton(start: Tensor, chunk: int) -> Tensor:
    """θ + H⁻¹∇h for one chunk after another, H of the data that are left with the chunk among them."""
    left, place = list(range(40)), start
    for first in range(ERASED.start, ERASED.stop, chunk):
        rows = list(range(first, first + chunk))
        own = LinearGaussian(WHOLE.x[left], WHOLE.y[left], PRIOR_STD, NOISE)
        force = WHOLE.x[rows].T @ (WHOLE.x[rows] @ place - WHOLE.y[rows]) / NOISE**2
        place = place + own.covariance @ force
        left = [row for row in left if row not in rows]
    return place


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("start", [WHOLE.mean, torch.tensor([0.5, 1.0, -2.0]).double()], ids=["mean", "elsewhere"])
def test_a_chain_that_stands_still_goes_by_newton_steps(start, chunk):
    """To where the retained posterior is: a wrong sign would double the distance."""
    before = drawn(mean=start)
    after, report = moved(before, STILL, recursion(chunk=chunk))
    expected = newton(start, chunk)
    torch.testing.assert_close(flat(after), expected.expand(20, 3), atol=1e-6, rtol=0)
    length = float((expected - start).norm())
    assert report.evidence.step_norm["w"] == pytest.approx(length)
    if chunk == 1 and start is WHOLE.mean:
        gap = float((WHOLE.mean - RETAINED.mean).norm())
        assert float((flat(after)[0] - RETAINED.mean).norm()) < 0.2 * gap


def test_without_sampler_steps_it_is_the_common_shift():
    """Of one draw, far from convergence, on all rows: no batch and no draw is chosen."""
    short = recursion(num_steps=7, chunk=3)
    alone, _ = forget(drawn(1), *DATA.split(ERASED), Transport.published(short))
    after, _ = moved(drawn(1), STILL, short)
    torch.testing.assert_close(after.params["w"], alone.params["w"], atol=1e-7, rtol=0)
    assert float((after.params["w"] - drawn(1).params["w"]).norm()) > 0.1


@pytest.mark.parametrize(
    ("rule", "thin", "bias"),
    [
        (SGLD(1 / LARGEST, batch_size=None), 30, 0.0),
        (SGLD(0.3 / LARGEST, batch_size=10, control=FixedMode({"w": RETAINED.mean})), 60, 0.15),
    ],
    ids=["all rows", "fixed mode"],
)
def test_its_draws_are_of_the_retained_posterior(rule, thin, bias):
    """The anchor's gradient is of the data that are left, or the chain would stay with those that went."""
    after, _ = moved(drawn(), rule, recursion(num_steps=20, chunk=5), num_draws=100, thin=thin)
    assert after.shape == (1, 100) and input_health(after)[1] > 60
    exact = RETAINED.covariance if bias else langevin_covariance(RETAINED, 1 / LARGEST)
    assert_same_law(flat(after), RETAINED.mean, exact, bias=bias)


def test_every_expectation_is_over_states_of_the_chain():
    """A chain without noise, written out: one step before each value, on what is left with the chunk among it."""
    own = recursion(num_steps=6, chunk=5, num_draws=3)
    total = 2 * 3 * 7
    schedule = Cyclic(0.3 / LARGEST, 2 * total, 0.5)
    before = drawn(mean=WHOLE.mean + 2.0)
    _, report = moved(before, SGLD(schedule, batch_size=None), own, num_draws=1)
    place, sizes = flat(before)[-1], iter([schedule.step_size(step) for step in range(total)])
    shifts = torch.zeros(3).double()
    for rows, left in ((range(30, 35), WHOLE), (range(35, 40), WHOLE.without(list(range(30, 35))))):
        force, curvature = torch.zeros(3).double(), left.precision

        def walk(place: Tensor, left: LinearGaussian = left, curvature: Tensor = curvature) -> Tensor:
            return place - next(sizes) * curvature @ (place - left.mean)

        for _ in range(3):
            place = walk(place)
            force += WHOLE.x[rows].T @ (WHOLE.x[rows] @ place - WHOLE.y[rows]) / NOISE**2 / 3
        vector, step = force, own.scaling / len(left.y)
        for _ in range(6):
            for _ in range(3):
                place = walk(place)
            vector = force + vector - step * curvature @ vector
        place, shifts = place + step * vector, shifts + step * vector
    said = report.evidence
    assert said.step_norm["w"] == pytest.approx(float(shifts.norm()), rel=1e-9)
    assert (said.extra["chain"]["steps"], said.num_products) == (total, 2 * 3 * 6)


def test_momenta_go_on_from_chunk_to_chunk():
    """Almost no friction and no force: the chain flies straight on, as fast at its end as on average."""
    rule = SGHMC(1e-10, friction=1e-9, batch_size=None)
    before = drawn()
    after, report = moved(before, rule, recursion(num_steps=1, chunk=2, scaling=1e-30), num_draws=2)
    first, last = flat(after)
    speed = (first - flat(before)[-1]) / (report.evidence.extra["chain"]["steps"] + 1)
    torch.testing.assert_close(last - first, speed, rtol=0.05, atol=0.0)


RULES = {
    "SGLD": SGLD(1e-4, batch_size=8, max_gradient_norm=100.0),
    "SGHMC": SGHMC(1e-4, batch_size=8, control=SVRG(10)),
    "SGNHT": SGNHT(1e-4, batch_size=8),
    "PSGLD": PSGLD(1e-4, batch_size=8),
    "scale-adapted": ScaleAdaptedSGHMC(1e-3, batch_size=8, hyperprior=(1.0, 1.0)),
}


@pytest.mark.parametrize("name", RULES)
def test_the_seeds_decide(name):
    own, before = Recursion(STABLE / 10, 5, batch_size=8, num_draws=2, chunk=4), drawn()
    found = [moved(before, RULES[name], own, seed=seed)[0].digest for seed in (1, 1, 2)]
    other = Recursion(STABLE / 10, 5, batch_size=8, num_draws=2, chunk=4, seed=1)
    assert found[0] == found[1] != found[2]
    assert moved(before, RULES[name], other, seed=1)[0].digest != found[0]


def test_what_it_says_of_itself():
    after, report = moved(drawn(6), STILL, recursion(num_steps=3, chunk=4), thin=2, num_draws=5)
    said = report.evidence
    assert after.shape == (1, 5) and after.log_weights is None and said.num_draws == 5
    assert said.method.startswith("published algorithm on a chain of SGLD that goes on (Recursion(scaling=")
    assert said.method.endswith("then 5 draws, 2 steps each") and said.solver == "recursion"
    assert said.num_products == 3 * 3
    assert "tests nothing" in said.warnings[0]
    chain = said.extra["chain"]
    assert (chain["chunks"], chain["steps"]) == (3, 3 * 4)
    assert 0 < chain["seconds"] + chain["draw_seconds"] <= report.seconds


def test_it_starts_at_the_last_draw_that_counts():
    erased, retained = DATA.split([0])
    draws = drawn(8)
    weighted, _ = forget(draws, erased, retained, Reweight())
    weights = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -700.0, -900.0])
    weighted = weighted.edited(weighted.params, weighted.ids, weights[None])
    method = PublishedChain(STILL, recursion(scaling=1e-30), num_draws=1, progress=False)
    after, _ = forget(weighted, *retained.split([5]), method)
    torch.testing.assert_close(flat(after)[0], flat(draws)[5], atol=1e-7, rtol=0)


@pytest.mark.parametrize("num_draws", [1, 20])
def test_a_diverging_recursion_is_refused(num_draws):
    before = drawn(num_draws)
    after, report = forget(
        before,
        *DATA.split(ERASED),
        PublishedChain(STILL, recursion(scaling=50 * STABLE, num_steps=500), progress=False),
        throw=False,
    )
    assert after is before and "diverged: lower its `scaling`" in report.refused


def test_a_chain_that_runs_away_is_refused():
    before = drawn()
    with pytest.raises(Refused, match=r"not finite any more at step \d+.* Or it was shifted"):
        moved(before, SGLD(10 / LARGEST, batch_size=None), recursion())
    with pytest.raises(Refused, match="not finite any more"):
        moved(before, SGLD(10 / LARGEST, batch_size=None), recursion(num_steps=1, chunk=10), num_draws=2000)


def test_bad_input():
    with pytest.raises(ValueError, match=r"`num_draws` must be at least 1, or None .*, got 0"):
        PublishedChain(STILL, num_draws=0)
    with pytest.raises(ValueError, match="`thin` must be at least 1, got 0"):
        PublishedChain(STILL, thin=0)
    with pytest.raises(ValueError, match=r"`batch_size` is 31, the data have 30 rows"):
        moved(drawn(), SGLD(1e-4, batch_size=31), recursion())


def test_a_bar_is_shown(capsys):
    forget(drawn(), *DATA.split(ERASED), PublishedChain(STILL, recursion(num_steps=1, chunk=2)))
    assert "5/5" in capsys.readouterr().err
