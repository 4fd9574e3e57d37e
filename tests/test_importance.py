"""Pareto smoothing with the sign that deletes, effective sample size and systematic resampling."""

import math

import pytest
import torch

from pyro_forget.importance import (
    effective_sample_size,
    khat_threshold,
    normalise,
    pareto_smooth,
    systematic_resample,
)

SIGMA, TAU = 1.0, 10.0


def exact_mean(y: torch.Tensor) -> tuple[float, float]:
    """Posterior mean and standard deviation of the mean of N(·, SIGMA²) data under the prior N(0, TAU²)."""
    precision = len(y) / SIGMA**2 + TAU**-2
    return float(y.sum() / SIGMA**2 / precision), precision**-0.5


@pytest.fixture
def outlier():
    """40 data of which the last lies 3.5 standard deviations out, and exact posterior draws."""
    generator = torch.Generator().manual_seed(0)
    y = 1 + torch.randn(40, generator=generator)
    y[-1] = 4.5
    mean, sd = exact_mean(y)
    return y, mean + sd * torch.randn(4, 1000, generator=generator)


def log_likelihood(y, draws):
    return -0.5 * ((y - draws[..., None]) / SIGMA).square().sum(-1)


def test_minus_the_log_likelihood_deletes_and_plus_duplicates(outlier):
    y, draws = outlier
    without, with_all = exact_mean(y[:-1])[0], exact_mean(y)[0]
    weights = pareto_smooth(-log_likelihood(y[-1:], draws))
    mean = float((weights.log_weights.exp() * draws).sum())
    assert mean == pytest.approx(without, abs=0.01)
    assert without < with_all - 0.05
    wrong = pareto_smooth(log_likelihood(y[-1:], draws))
    assert float((wrong.log_weights.exp() * draws).sum()) > with_all + 0.05
    assert weights.khat < 0.7 and wrong.khat < 0.7  # k̂ does not see the sign: hence this test


def test_chains_are_flattened_and_the_shape_restored(outlier):
    y, draws = outlier
    raw = -log_likelihood(y[-1:], draws)
    weights, flat = pareto_smooth(raw), pareto_smooth(raw.reshape(-1))
    assert weights.log_weights.shape == raw.shape
    assert torch.equal(weights.log_weights.reshape(-1), flat.log_weights)
    assert weights.khat == flat.khat
    assert float(weights.log_weights.exp().sum()) == pytest.approx(1)
    assert weights.ess == pytest.approx(float(1 / weights.log_weights.exp().square().sum()))


def test_only_the_upper_tail_is_smoothed_and_the_order_kept(outlier):
    y, draws = outlier
    raw = -log_likelihood(y[-1:], draws).reshape(-1)
    smoothed = pareto_smooth(raw).log_weights
    order = raw.argsort()
    assert bool((smoothed[order].diff() >= -1e-12).all())
    bulk = order[: -math.ceil(3 * math.sqrt(len(raw)))]
    torch.testing.assert_close(smoothed[bulk].diff(), raw[bulk].diff())


@pytest.mark.parametrize("shape", [0.3, 1.2])
def test_khat_is_the_shape_of_a_pareto_tail(shape):
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    assert pareto_smooth(-shape * uniform.log()).khat == pytest.approx(shape, abs=0.12)


def test_many_erased_data_are_flagged(outlier):
    y, draws = outlier
    weights = pareto_smooth(-log_likelihood(y.sort().values[-12:], draws))
    assert weights.khat > khat_threshold(draws.numel())
    assert weights.ess < 200


def test_constant_weights_are_uniform():
    weights = pareto_smooth(torch.full((2, 50), -1234.5))
    assert weights.khat == -math.inf
    assert weights.ess == pytest.approx(100)
    torch.testing.assert_close(weights.log_weights, torch.full((2, 50), -math.log(100)))


def test_a_constant_tail_keeps_the_raw_weights():
    raw = torch.cat([torch.linspace(-3, -1, 100), torch.zeros(300)])
    weights = pareto_smooth(raw)
    assert weights.khat == -math.inf
    torch.testing.assert_close(weights.log_weights, normalise(raw))


def test_few_draws_are_normalised_only():
    raw = torch.linspace(0, 2, 24)
    weights = pareto_smooth(raw)
    assert weights.khat is None
    torch.testing.assert_close(weights.log_weights, raw.log_softmax(0))
    assert pareto_smooth(torch.linspace(0, 2, 25)).khat is not None


def test_a_tail_of_repeated_draws_has_no_khat():
    raw = torch.cat([torch.linspace(-4, 0, 200), torch.full((80,), 1.0), torch.linspace(1.1, 2, 20)])
    weights = pareto_smooth(raw)
    assert weights.khat is None
    torch.testing.assert_close(weights.log_weights, normalise(raw))


@pytest.mark.parametrize("scale", [2e3, 1e6])
def test_weights_that_underflow_are_hopeless(scale):
    raw = scale * torch.randn(400, generator=torch.Generator().manual_seed(2))
    weights = pareto_smooth(raw)
    assert weights.khat == math.inf
    assert weights.ess == pytest.approx(1)


def test_draws_without_density_have_weight_zero():
    raw = torch.randn(400, generator=torch.Generator().manual_seed(3))
    raw[:100] = -math.inf
    weights = pareto_smooth(raw)
    assert bool((weights.log_weights[:100] == -math.inf).all())
    assert float(weights.log_weights.exp().sum()) == pytest.approx(1)
    assert 0 < weights.ess < 300


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([0.0, math.nan, math.inf], "2 of 3 log weights are NaN or"),
        ([-math.inf, -math.inf], "every draw has weight 0"),
        ([], "hold no draw"),
    ],
)
def test_weights_that_mean_nothing_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        pareto_smooth(torch.tensor(raw))
    with pytest.raises(ValueError, match=message):
        systematic_resample(torch.tensor(raw), 5)


@pytest.mark.parametrize(("num_draws", "threshold"), [(100, 0.5), (1000, 2 / 3), (2000, 0.697), (4000, 0.7)])
def test_khat_threshold(num_draws, threshold):
    assert khat_threshold(num_draws) == pytest.approx(threshold, abs=5e-4)


def test_khat_threshold_wants_draws():
    with pytest.raises(ValueError, match="at least 2 draws, got 1"):
        khat_threshold(1)


def test_effective_sample_size_ignores_the_scale():
    raw = torch.tensor([0.0, 0.0, math.log(2.0)])
    assert effective_sample_size(raw) == pytest.approx(16 / 6)
    assert effective_sample_size(raw + 5000) == pytest.approx(16 / 6)
    assert effective_sample_size(torch.zeros(3, 4)) == pytest.approx(12)


def test_each_draw_is_resampled_in_proportion():
    log_weights = torch.randn(3, 40, generator=torch.Generator().manual_seed(4))
    log_weights[1, 7] = -math.inf
    expected = 500 * normalise(log_weights).exp().reshape(-1)
    for seed in range(20):
        counts = systematic_resample(log_weights, 500, seed).bincount(minlength=120)
        assert int(counts.sum()) == 500
        assert bool(((counts - expected).abs() < 1 + 1e-9).all())
        assert int(counts[47]) == 0


def test_resampling_is_unbiased():
    log_weights = torch.tensor([0.0, 1.0, -1.0, 0.5])
    counts = torch.stack([systematic_resample(log_weights, 3, seed).bincount(minlength=4) for seed in range(2000)])
    torch.testing.assert_close(counts.double().mean(0), 3 * log_weights.softmax(0), atol=0.05, rtol=0)


def test_resampling_uniform_weights_returns_every_draw_and_leaves_the_callers_generator():
    state = torch.get_rng_state()
    indices = systematic_resample(torch.zeros(1000), 1000, seed=3)
    assert torch.equal(indices, torch.arange(1000))
    assert torch.equal(indices, systematic_resample(torch.zeros(1000), 1000, seed=3))
    assert torch.equal(torch.get_rng_state(), state)


def test_trailing_draws_of_weight_zero_are_never_taken():
    log_weights = torch.tensor([0.3, -math.inf, 0.1, -math.inf, -math.inf])
    for seed in range(50):
        assert set(systematic_resample(log_weights, 1001, seed).tolist()) == {0, 2}


def test_resampling_wants_a_positive_number():
    with pytest.raises(ValueError, match="`num_draws` must be at least 1, got 0"):
        systematic_resample(torch.zeros(3), 0)
