"""Distances against closed forms, with cases that tell KL(a ‖ b) from KL(b ‖ a)."""

import math

import pytest
import torch
from torch.distributions import Categorical, MultivariateNormal, Normal, kl_divergence

from pyro_forget.evaluation import (
    gaussian_kl,
    mmd,
    moment_kl,
    predictive_kl,
    remaining_fraction,
    sliced_wasserstein,
)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def gaussian(seed, dim):
    """A location and a well-conditioned lower Cholesky factor."""
    random = generator(seed)
    below, diagonal = torch.randn(dim, dim, generator=random).tril(-1), 0.5 + torch.rand(dim, generator=random)
    return torch.randn(dim, generator=random), 0.3 * below + torch.diag(diagonal)


# --- gaussian_kl --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_diagonal_gaussians_agree_with_torch(shape):
    random = generator(0)
    loc0, loc1 = torch.randn(2, *shape, generator=random)
    scale0, scale1 = 0.2 + torch.rand(2, *shape, generator=random)
    expected = kl_divergence(Normal(loc0, scale0), Normal(loc1, scale1)).sum()
    torch.testing.assert_close(gaussian_kl(loc0, scale0, loc1, scale1), expected)
    assert not torch.isclose(gaussian_kl(loc1, scale1, loc0, scale0), expected)


def test_triangular_and_mixed_scales_agree_with_torch():
    loc0, factor0 = gaussian(1, 4)
    loc1, factor1 = gaussian(2, 4)
    scale0, scale1 = factor0.diagonal(), factor1.diagonal()
    for s0, s1 in [(factor0, factor1), (scale0, factor1), (factor0, scale1)]:
        full0, full1 = (s if s.ndim == 2 else torch.diag(s) for s in (s0, s1))
        expected = kl_divergence(MultivariateNormal(loc0, scale_tril=full0), MultivariateNormal(loc1, scale_tril=full1))
        torch.testing.assert_close(gaussian_kl(loc0, s0, loc1, s1), expected)
        assert not torch.isclose(gaussian_kl(loc1, s1, loc0, s0), expected)


def test_float32_is_summed_in_float64():
    loc, scale = torch.zeros(1000, dtype=torch.float32), torch.full((1000,), 0.1, dtype=torch.float32)
    result = gaussian_kl(loc, scale, loc + 1e-5, scale)
    assert result.dtype == torch.float64
    assert float(result) == pytest.approx(1000 * 0.5 * 1e-8, rel=1e-5)


def test_gaussian_kl_has_a_gradient():
    loc, factor = gaussian(3, 3)
    shifted = loc.clone().requires_grad_()
    gaussian_kl(shifted, factor, loc + 1, factor).backward()
    torch.testing.assert_close(shifted.grad, torch.cholesky_solve(-torch.ones(3, 1), factor)[:, 0])


@pytest.mark.parametrize(
    ("loc0", "scale0", "loc1", "message"),
    [
        (torch.zeros(2), torch.ones(3), torch.zeros(2), r"`scale0` has shape \(3,\) for a location of shape \(2,\)"),
        (torch.zeros(2), torch.tensor([1.0, -1.0]), torch.zeros(2), "`scale0` must be positive"),
        (torch.zeros(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.zeros(2), "`scale0` must be positive"),
        (torch.zeros(3), torch.ones(3), torch.zeros(2), "locations differ"),
    ],
)
def test_gaussian_kl_checks_its_arguments(loc0, scale0, loc1, message):
    with pytest.raises(ValueError, match=message):
        gaussian_kl(loc0, scale0, loc1, torch.ones(2))


# --- clouds -------------------------------------------------------------------------------------------------------


def test_moment_kl_of_draws_approaches_the_gaussians():
    (loc0, factor0), (loc1, factor1) = gaussian(4, 3), gaussian(5, 3)
    a = loc0 + torch.randn(200_000, 3, generator=generator(6)) @ factor0.T
    b = loc1 + torch.randn(200_000, 3, generator=generator(7)) @ factor1.T
    expected = gaussian_kl(loc0, factor0, loc1, factor1)
    torch.testing.assert_close(moment_kl(a, b), expected, rtol=0.02, atol=0)
    assert not torch.isclose(moment_kl(b, a), expected, rtol=0.1)


def test_moment_kl_has_the_expected_floor():
    dim, num_draws = 8, 2000
    floors = [float(moment_kl(*torch.randn(2, num_draws, dim, generator=generator(seed)))) for seed in range(20)]
    assert sum(floors) / 20 == pytest.approx((dim + dim * (dim + 1) / 2) / num_draws, rel=0.15)


def test_weights_move_the_moments():
    draws = torch.randn(100_000, 2, generator=generator(8))
    log_weights = (draws @ torch.tensor([0.5, -0.3])) + 7  # tilts N(0, I) to N((0.5, −0.3), I)
    target = torch.tensor([0.5, -0.3]) + torch.randn(100_000, 2, generator=generator(9))
    assert float(moment_kl(draws, target, log_weights)) < 1e-3
    assert float(moment_kl(target, draws, None, log_weights)) < 1e-3
    assert float(moment_kl(draws, target)) == pytest.approx(0.17, rel=0.1)


def test_equal_weights_are_no_weights():
    a, b = torch.randn(2, 500, 2, 2, generator=generator(10))
    for distance in (moment_kl, mmd, sliced_wasserstein):
        torch.testing.assert_close(distance(a, b, torch.zeros(500), torch.zeros(500)), distance(a, b))


def test_integer_weights_are_repeated_draws():
    a, b = torch.randn(30, 2, generator=generator(11)), torch.randn(40, 2, generator=generator(12))
    counts = torch.arange(30) % 3
    log_weights = counts.double().log()
    torch.testing.assert_close(
        sliced_wasserstein(a, b, log_weights), sliced_wasserstein(a.repeat_interleave(counts, 0), b)
    )


def test_few_draws_have_no_covariance():
    with pytest.raises(ValueError, match="draws_b have no covariance of full rank: 5 draws"):
        moment_kl(torch.randn(50, 6), torch.randn(5, 6))
    concentrated = torch.full((50,), -1e3)
    concentrated[:3] = 0.0
    with pytest.raises(ValueError, match=r"draws_a .* \(effectively 3\)"):
        moment_kl(torch.randn(50, 6), torch.randn(50, 6), concentrated)


@pytest.mark.parametrize("distance", [moment_kl, mmd, sliced_wasserstein])
def test_clouds_are_checked(distance):
    with pytest.raises(ValueError, match=r"shapes \(50, 3\) and \(50, 2\)"):
        distance(torch.randn(50, 3), torch.randn(50, 2))
    with pytest.raises(ValueError, match=r"`log_weights_a` has shape \(49,\) for 50 draws"):
        distance(torch.randn(50, 2), torch.randn(50, 2), torch.zeros(49))


def kernel_mean(loc, variance, h):
    """E exp(−(x − y)²/2h²) where x − y is N(loc, variance)."""
    return h / math.sqrt(h**2 + variance) * math.exp(-(loc**2) / (2 * (h**2 + variance)))


def test_mmd_of_gaussians_has_a_closed_form():
    a = torch.randn(2000, generator=generator(13))
    b = 0.7 + 0.5 * torch.randn(1500, generator=generator(14))
    h = 0.9
    expected = kernel_mean(0, 2, h) + kernel_mean(0, 0.5, h) - 2 * kernel_mean(0.7, 1.25, h)
    assert float(mmd(a, b, bandwidth=h)) == pytest.approx(expected, rel=0.05)


def test_mmd_is_unbiased_also_with_weights():
    values = []
    for seed in range(400):
        a, b = torch.randn(2, 20, 2, generator=generator(seed))
        log_weights = torch.randn(20, generator=generator(1000 + seed))  # independent of the draws
        values.append([float(mmd(a, b, bandwidth=1.0)), float(mmd(a, b, log_weights, bandwidth=1.0))])
    means, errors = torch.tensor(values).mean(0), torch.tensor(values).std(0) / 20
    assert bool((means.abs() < 4 * errors).all())
    biased = kernel_mean(0, 2, 1) ** 2  # the diagonal would add (1 − E k)/20 for each cloud
    assert (1 - biased) / 20 > 8 * float(errors[0])


def test_mmd_is_the_same_in_blocks_and_far_from_zero(monkeypatch):
    a, b = torch.randn(300, 2, generator=generator(15)), 0.3 + torch.randn(200, 2, generator=generator(16))
    whole = mmd(a, b)
    torch.testing.assert_close(mmd(a + 1e6, b + 1e6), whole, rtol=1e-6, atol=1e-9)
    monkeypatch.setattr("pyro_forget.evaluation.distance._BLOCK", 1000)
    torch.testing.assert_close(mmd(a, b), whole)


def test_the_bandwidth_is_the_median_distance():
    a, b = torch.zeros(10, 1), torch.full((9, 1), 3.0)
    # 90 of the 171 pairs are 3 apart
    torch.testing.assert_close(mmd(a, b), mmd(a, b, bandwidth=3.0))
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        mmd(a, a)


def test_a_shift_is_measured_exactly():
    a = torch.randn(400, 5, generator=generator(17))
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0, 0.3])
    expected = float(shift.norm()) / math.sqrt(5)
    assert float(sliced_wasserstein(a, a + shift, num_directions=20)) == pytest.approx(expected)
    assert float(sliced_wasserstein(a, (a + shift)[torch.randperm(400)], num_directions=5)) == pytest.approx(expected)
    assert float(sliced_wasserstein(a, a + shift, num_directions=3)) != pytest.approx(expected)


def test_wasserstein_of_scaled_gaussians_with_unequal_sizes():
    a = torch.randn(12_000, 3, generator=generator(18))
    b = 0.5 + 2 * torch.randn(9_000, 3, generator=generator(19))
    expected = math.sqrt(0.5**2 + (2 - 1) ** 2)  # of each projection: shifts 0.5·⟨1, u⟩, of mean square 0.25
    assert float(sliced_wasserstein(a, b, num_directions=63)) == pytest.approx(expected, rel=0.03)


def test_wasserstein_of_steps_by_hand():
    a, b = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 3.0, 1.0])
    # quantiles: a = 0 on [0, ½), 1 on [½, 1); b = 0, 1, 3 on thirds
    expected = math.sqrt((1 / 2 - 1 / 3) * 1 + (1 / 3) * 4)
    assert float(sliced_wasserstein(a, b, num_directions=2)) == pytest.approx(expected)
    weighted = sliced_wasserstein(a, a, torch.tensor([0.25, 0.75]).log(), None)
    assert float(weighted) == pytest.approx(0.5)


def test_wasserstein_is_seeded_and_leaves_the_callers_generator(monkeypatch):
    a, b = torch.randn(50, 4, generator=generator(20)), torch.randn(60, 4, generator=generator(21))
    state = torch.get_rng_state()
    first = sliced_wasserstein(a, b, seed=1, num_directions=7)
    assert torch.equal(first, sliced_wasserstein(a, b, seed=1, num_directions=7))
    assert not torch.equal(first, sliced_wasserstein(a, b, seed=2, num_directions=7))
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr("pyro_forget.evaluation.distance._BLOCK", 1)
    torch.testing.assert_close(sliced_wasserstein(a, b, seed=1, num_directions=7), first)
    with pytest.raises(ValueError, match="num_directions"):
        sliced_wasserstein(a, b, num_directions=0)


# --- predictions --------------------------------------------------------------------------------------------------


def test_predictive_kl_averages_the_probabilities_first():
    a = torch.randn(5, 7, 3, generator=generator(22)).log_softmax(-1)
    b = torch.randn(4, 7, 3, generator=generator(23)).log_softmax(-1)
    expected = kl_divergence(Categorical(a.exp().mean(0)), Categorical(b.exp().mean(0))).mean()
    torch.testing.assert_close(predictive_kl(a, b), expected)
    assert not torch.isclose(predictive_kl(b, a), expected)


def test_predictive_kl_of_certain_predictions():
    certain = torch.tensor([[[1.0, 0.0]]]).log()
    half = torch.tensor([[[0.5, 0.5]]]).log()
    assert float(predictive_kl(certain, half)) == pytest.approx(math.log(2))
    assert float(predictive_kl(half, certain)) == math.inf
    assert float(predictive_kl(certain, certain)) == 0


def test_predictive_kl_checks_its_arguments():
    logits = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="`log_probs_a` do not sum to 1"):
        predictive_kl(logits, logits)
    with pytest.raises(ValueError, match="must agree in all but the first"):
        predictive_kl(logits, logits[:, :2])


# --- remaining_fraction -------------------------------------------------------------------------------------------


def test_remaining_fraction_puts_the_refit_second():
    asymmetric = [(0.0, 1.0), (2.0, 0.5), (1.0, 2.0), (1.1, 2.0)]
    before, after, refit, again = [(torch.tensor(loc), torch.tensor(scale)) for loc, scale in asymmetric]
    fraction = remaining_fraction(before, after, refit, again, distance=lambda p, q: gaussian_kl(*p, *q))
    kl = {
        name: float(kl_divergence(Normal(*posterior), Normal(*refit)))
        for name, posterior in [("before", before), ("after", after), ("again", again)]
    }
    assert fraction.value == pytest.approx(kl["after"] / kl["before"])
    assert fraction.floor == pytest.approx(kl["again"] / kl["before"])
    assert fraction.distance_before == pytest.approx(kl["before"])
    assert fraction.distance_after == pytest.approx(kl["after"])
    assert fraction.distance_floor == pytest.approx(kl["again"])
    assert fraction.meaningful


def test_remaining_fraction_says_when_it_means_nothing():
    def distance(p, q):
        return abs(p - q)

    assert not remaining_fraction(1.0, 0.5, 0.0, 0.9, distance=distance).meaningful
    assert remaining_fraction(1.0, 0.5, 0.0, 0.4, distance=distance).meaningful
    unpinned = remaining_fraction(1.0, 0.5, 0.0, distance=distance)
    assert unpinned.meaningful and unpinned.floor is None
    nowhere_to_go = remaining_fraction(0.0, 0.5, 0.0, 0.0, distance=distance)
    assert math.isnan(nowhere_to_go.value) and not nowhere_to_go.meaningful
