"""What each stochastic-gradient sampler converges to, beside exact answers."""

import math

import pytest
import torch

from pyro_forget.data import Data
from pyro_forget.inference.stochastic import (
    PSGLD,
    SGHMC,
    SGLD,
    SGNHT,
    FixedMode,
    Rule,
    ScaleAdaptedSGHMC,
)
from pyro_forget.inference.stochastic.rule import MOMENTUM
from tests.draws import Logistic
from tests.stochastic import (
    assert_same_law,
    chains_of,
    correlated,
    ends,
    hamiltonian_covariance,
    langevin_covariance,
    logistic_model,
)

TARGET = correlated()
DATA = Data(TARGET.x, TARGET.y)
PRECISION = TARGET.x.T @ TARGET.x / TARGET.noise**2 + torch.eye(3).double() / TARGET.prior_std**2
COVARIANCE = torch.linalg.inv(PRECISION)
MEAN = COVARIANCE @ TARGET.x.T @ TARGET.y / TARGET.noise**2
LARGEST = float(torch.linalg.eigvalsh(PRECISION)[-1])
START = {"w": torch.tensor([0.5, -1.0, 0.0])}
NUM_CHAINS = 4000

# Small steps, so that the discretisation's bias is a few percent; batch 8 of 40.
SMALL = 0.02 / LARGEST
RULES = {
    "sgld": (lambda batch: SGLD(0.05 / LARGEST, batch_size=batch), 900),
    "psgld": (lambda batch: PSGLD(5e-3, decay=0.999, batch_size=batch), 1500),
    "sghmc": (lambda batch: SGHMC(SMALL, friction=0.2, batch_size=batch), 500),
    "scale-adapted sghmc": (
        lambda batch: ScaleAdaptedSGHMC(0.05, friction=0.2, subtract_noise=batch is not None, batch_size=batch),
        800,
    ),
    "sgnht": (lambda batch: SGNHT(SMALL, friction=0.2, batch_size=batch), 700),
}


def test_sgld_has_its_exact_discrete_covariance():
    """At half the stable step the variance is up to a third too large, and by exactly so much."""
    size = 0.5 * 2 / LARGEST
    draws = ends(SGLD(size, batch_size=None), DATA, 150, NUM_CHAINS, start=START)
    exact = langevin_covariance(TARGET, size)
    assert float(exact[0, 0] / COVARIANCE[0, 0]) > 1.05
    assert_same_law(draws, MEAN, exact)


def test_sghmc_has_its_exact_discrete_covariance():
    size, friction = 1.0 / LARGEST, 0.3
    chains = chains_of(SGHMC(size, friction, batch_size=None), DATA, num_chains=NUM_CHAINS, start=START)
    for _ in range(150):
        chains.step()
    both = torch.cat([chains.latents()["w"], chains.potential.layout.views(chains.state[MOMENTUM])["w"]], 1)
    exact = hamiltonian_covariance(TARGET, size, friction)
    assert_same_law(both, torch.cat([MEAN, torch.zeros(3)]), exact)


@pytest.mark.parametrize("name", RULES)
def test_kernel_samples_a_correlated_gaussian(name):
    """Ends of independent chains, on mini-batches: the mean within 5 σ, covariances within 5 σ and a bias of 8 %."""
    rule, num_steps = RULES[name]
    draws = ends(rule(None), DATA, num_steps, 600, start=START, num_warmup=num_steps // 3)
    assert_same_law(draws, MEAN, COVARIANCE, bias=0.08)


@pytest.mark.parametrize("correction", [True, False])
def test_the_correction_of_psgld_is_needed_and_enough(correction):
    """With no memory the metric follows the position at once: Γ makes the law right, without it tails are too heavy."""
    rule = PSGLD(8e-3, decay=0.0, floor=5.0, correction=correction, batch_size=None)
    draws = ends(rule, DATA, 900, 1000, start=START)
    if correction:
        assert_same_law(draws, MEAN, COVARIANCE, bias=0.08)
    else:
        assert bool((draws.var(0) > 1.4 * COVARIANCE.diagonal()).all())


def logistic_rules(largest: float, batch: int | None, control: FixedMode | None) -> dict[str, tuple[Rule, int]]:
    """Rules for a posterior of this largest curvature, and the steps they take to forget where they began."""
    shared = {"batch_size": batch, "control": control}
    return {
        "sgld": (SGLD(0.1 / largest, **shared), 700),
        "psgld": (PSGLD(1e-2, decay=0.999, **shared), 1500),
        "sghmc": (SGHMC(0.02 / largest, friction=0.2, **shared), 600),
        "scale-adapted sghmc": (ScaleAdaptedSGHMC(0.05, friction=0.2, subtract_noise=False, **shared), 1000),
        "sgnht": (SGNHT(0.02 / largest, friction=0.2, **shared), 700),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("batch", [30, None])
def test_kernel_samples_a_logistic_posterior(name, batch):
    """8 weights, 300 rows; batches of 30 with the mode as control variate, or all rows. Truth: long MALA chains."""
    target = Logistic.drawn(0)
    truth, mode = target.sample(8000, seed=1), target.laplace()[0]
    largest = float(torch.linalg.eigvalsh(target.precision(mode))[-1])
    control = None if batch is None else FixedMode({"w": mode})
    rule, num_steps = logistic_rules(largest, batch, control)[name]
    data, start = Data(target.x, target.y), {"w": mode}
    draws = ends(rule, data, num_steps, 500, model=logistic_model, start=start, num_warmup=num_steps // 2)
    assert_same_law(draws, truth.mean(0), truth.T.cov(), bias=0.1, sigmas=5 * math.sqrt(1 + 500 / 8000))
