"""Moment matching against exact posteriors, and honest figures where it must fail."""

import math

import pytest
import torch

from pyro_forget.evaluation import gaussian_kl, moment_kl
from pyro_forget.importance import effective_sample_size, khat_threshold
from pyro_forget.inference import Affine, affine_fit, held_out_weights, moment_matching
from pyro_forget.inference.moment_matching import tempered
from tests.draws import Logistic, Regression

NUM_DRAWS = 2000


def weighted_moments(result):
    weights = result.log_weights.exp()
    mean = weights @ result.draws
    centred = result.draws - mean
    return mean, torch.linalg.cholesky((weights * centred.T) @ centred)


def influence_map(model, retained, erased, draws):
    """The affine fit of θ + d̄ + ½(d − d̄), d = H⁻¹∇h(θ)."""
    curvature = torch.stack([retained.precision(draw) for draw in draws[::20]]).mean(0)
    forces = -(erased.gradient(draws) + draws)
    steps = torch.linalg.solve(curvature, forces.T).T
    return affine_fit(draws, draws + steps.mean(0) + 0.5 * (steps - steps.mean(0)))


@pytest.fixture(scope="module")
def regression():
    torch.set_default_dtype(torch.float64)
    model = Regression.drawn(60, 4, seed=0)
    yield model, model.rows(slice(0, 40)), model.sample(NUM_DRAWS, seed=1)
    torch.set_default_dtype(torch.float32)


# --- exact answers ------------------------------------------------------------------------------------------------


def test_erasing_reaches_the_exact_posterior(regression):
    model, retained, draws = regression
    result = moment_matching(draws, retained.log_joint, model.log_joint(draws))
    before = gaussian_kl(*model.posterior(), *retained.posterior())
    after = gaussian_kl(*weighted_moments(result), *retained.posterior())
    floor = moment_kl(draws, model.sample(NUM_DRAWS, seed=2))
    assert float(before) > 5
    assert float(after) < float(floor)
    assert result.ess >= 0.95 * NUM_DRAWS
    assert result.khat < khat_threshold(NUM_DRAWS)
    assert result.start == "identity" and not result.diagonal


def test_the_wrong_sign_goes_the_other_way(regression):
    """A map that adds the erased data once more looks as good by k̂ and ESS: only the target's sign tells."""
    model, retained, draws = regression
    erased = model.rows(slice(40, 60))
    wrong = moment_matching(
        draws, lambda moved: model.log_joint(moved) + erased.log_likelihood(moved), model.log_joint(draws)
    )
    right = moment_matching(draws, retained.log_joint, model.log_joint(draws))
    towards = retained.posterior()[0] - model.posterior()[0]
    assert torch.dot(weighted_moments(right)[0] - model.posterior()[0], towards) > 0
    assert torch.dot(weighted_moments(wrong)[0] - model.posterior()[0], towards) < 0
    assert wrong.ess >= 0.95 * NUM_DRAWS


def test_adding_data_is_the_inverse_of_erasing(regression):
    model, retained, _ = regression
    draws = retained.sample(NUM_DRAWS, seed=3)
    result = moment_matching(draws, model.log_joint, retained.log_joint(draws))
    assert float(gaussian_kl(*weighted_moments(result), *model.posterior())) < 0.02


def test_the_exact_map_leaves_equal_weights_after_one_pass(regression):
    model, retained, draws = regression
    (mean, factor), (new_mean, new_factor) = model.posterior(), retained.posterior()
    matrix = new_factor @ torch.linalg.inv(factor)
    exact = Affine(matrix, new_mean - matrix @ mean)
    result = moment_matching(draws, retained.log_joint, model.log_joint(draws), exact)
    assert result.num_passes == 1
    assert result.khat == -math.inf
    assert result.start == "initial"
    torch.testing.assert_close(result.draws, exact(draws))
    torch.testing.assert_close(result.log_weights, torch.full((NUM_DRAWS,), -math.log(NUM_DRAWS)))


def test_the_weights_are_target_over_source():
    """One pass from a map that stretches a little too far: the bulk of the weights in closed form."""
    draws = torch.randn(NUM_DRAWS, 2, generator=torch.Generator().manual_seed(20))
    stretch = Affine(torch.diag(torch.tensor([2.2, 0.5])), torch.tensor([3.1, 0.0]))
    new_mean, new_scale = torch.tensor([3.0, 0.0]), torch.tensor([2.0, 0.5])

    def log_target(moved):
        return -0.5 * ((moved - new_mean) / new_scale).square().sum(-1)

    result = moment_matching(draws, log_target, -0.5 * draws.square().sum(-1), stretch, num_passes=1)
    assert result.start == "initial"
    raw = log_target(stretch(draws)) + 0.5 * draws.square().sum(-1)
    bulk = raw.argsort()[:-200]
    torch.testing.assert_close(result.log_weights[bulk].diff(), raw[bulk].diff())


def test_the_draws_follow_the_composed_map_in_their_order(regression):
    model, retained, draws = regression
    kept = draws.clone()
    result = moment_matching(draws, retained.log_joint, model.log_joint(draws))
    torch.testing.assert_close(result.draws, draws @ result.map.matrix.T + result.map.offset)
    assert torch.equal(draws, kept)
    assert float(result.log_weights.exp().sum()) == pytest.approx(1)
    assert result.ess == pytest.approx(effective_sample_size(result.log_weights))


def test_a_target_equal_to_the_source_moves_nothing(regression):
    model, _, draws = regression
    result = moment_matching(draws, model.log_joint, model.log_joint(draws))
    assert torch.equal(result.draws, draws)
    assert result.num_passes == 1 and result.khat == -math.inf


def test_draws_that_carry_weights(regression):
    """Draws from a wider Gaussian stand for the posterior by their weights; less these, the source is the Gaussian."""
    model, retained, _ = regression
    mean, factor = model.posterior()
    noise = torch.randn(NUM_DRAWS, 4, generator=torch.Generator().manual_seed(4))
    draws = mean + 1.3 * noise @ factor.T
    log_weights = model.log_joint(draws) + 0.5 * noise.square().sum(-1)
    result = moment_matching(draws, retained.log_joint, model.log_joint(draws) - log_weights)
    assert float(gaussian_kl(*weighted_moments(result), *retained.posterior())) < 0.02
    ignored = moment_matching(draws, retained.log_joint, model.log_joint(draws))
    assert float(gaussian_kl(*weighted_moments(ignored), *retained.posterior())) > 0.1


# --- the affine fit -----------------------------------------------------------------------------------------------


def test_affine_fit_recovers_an_asymmetric_map():
    generator = torch.Generator().manual_seed(5)
    draws = 3 + torch.randn(50, 3, generator=generator)
    exact = Affine(torch.randn(3, 3, generator=generator), torch.randn(3, generator=generator))
    found = affine_fit(draws, exact(draws))
    torch.testing.assert_close(found.matrix, exact.matrix)
    torch.testing.assert_close(found.offset, exact.offset)


def test_affine_fit_is_least_squares():
    generator = torch.Generator().manual_seed(6)
    draws, moved = torch.randn(2, 40, 3, generator=generator)
    design = torch.cat([draws, torch.ones(40, 1)], 1)
    expected = torch.linalg.lstsq(design, moved).solution
    found = affine_fit(draws, moved)
    torch.testing.assert_close(found.matrix, expected[:3].T)
    torch.testing.assert_close(found.offset, expected[3])


def test_affine_fit_wants_draws_that_span_the_space():
    with pytest.raises(ValueError, match="in 5 dimensions needs more than the 4 draws"):
        affine_fit(torch.randn(4, 5), torch.randn(4, 5))


def test_maps_compose_from_right_to_left():
    generator = torch.Generator().manual_seed(7)
    first, second = (
        Affine(torch.randn(2, 2, generator=generator), torch.randn(2, generator=generator)) for _ in range(2)
    )
    draws = torch.randn(5, 2, generator=generator)
    torch.testing.assert_close(second.after(first)(draws), second(first(draws)))
    torch.testing.assert_close(second.after(first).log_det, first.log_det + second.log_det)
    assert torch.equal(Affine.identity(draws)(draws), draws)


# --- paths and guards ---------------------------------------------------------------------------------------------


def test_tempering_hits_the_effective_sample_size():
    log_weights = 5 * torch.randn(400, generator=torch.Generator().manual_seed(8))
    assert effective_sample_size(log_weights) < 20
    assert effective_sample_size(tempered(log_weights, 50.0)) == pytest.approx(50, rel=1e-6)


def test_tempering_carries_draws_far_away():
    """The first weights are worth one draw; the map still arrives, and keeps its best pass."""
    draws = torch.randn(NUM_DRAWS, 3, generator=torch.Generator().manual_seed(9))
    far = torch.tensor([9.0, -6.0, 3.0])

    def log_target(moved):
        return -0.5 * ((moved - far) / 0.5).square().sum(-1)

    source = -0.5 * draws.square().sum(-1)
    assert effective_sample_size(log_target(draws) - source) < 2
    result = moment_matching(draws, log_target, source)
    assert result.ess > 0.95 * NUM_DRAWS
    mean, factor = weighted_moments(result)
    torch.testing.assert_close(mean, far, atol=0.02, rtol=0)
    torch.testing.assert_close(factor, 0.5 * torch.eye(3), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "matrix", [torch.full((4, 4), math.nan), torch.zeros(4, 4), 1e200 * torch.eye(4)], ids=["nan", "singular", "huge"]
)
def test_a_useless_initial_map_is_replaced_by_the_identity(regression, matrix):
    model, retained, draws = regression
    bad = Affine(matrix.double(), torch.zeros(4))
    result = moment_matching(draws, retained.log_joint, model.log_joint(draws), bad)
    assert result.start == "identity"
    assert result.ess >= 0.95 * NUM_DRAWS


def test_draws_where_the_target_overflows_get_weight_zero():
    draws = torch.randn(500, 2, generator=torch.Generator().manual_seed(10))

    def log_target(moved):
        return torch.where(moved[:, 0] > 0, -0.5 * moved.square().sum(-1), math.nan)

    result = moment_matching(draws, log_target, -0.5 * draws.square().sum(-1))
    assert bool((result.log_weights[result.draws[:, 0] <= 0] == -math.inf).all())
    assert float(result.log_weights.exp() @ result.draws[:, 0]) > 0.5


def test_a_diagonal_map_helps_few_draws_of_many_dimensions():
    dim, num_draws = 20, 45
    draws = torch.randn(num_draws, dim, generator=torch.Generator().manual_seed(11))
    scale = torch.linspace(0.5, 2, dim)
    result = moment_matching(
        draws, lambda moved: -0.5 * (moved / scale).square().sum(-1), -0.5 * draws.square().sum(-1)
    )
    assert result.diagonal
    assert torch.equal(result.map.matrix, result.map.matrix.diagonal().diag())


@pytest.mark.parametrize(
    ("shape", "source", "passes", "message"),
    [
        ((10,), torch.zeros(10), 25, r"`draws` must be of shape \(draw, d\)"),
        ((10, 2), torch.zeros(9), 25, r"got \(10, 2\) and \(9,\)"),
        ((10, 2), torch.full((10,), math.nan), 25, "source density is not finite at 10 of 10 draws"),
        ((10, 2), torch.zeros(10), 0, "`num_passes` must be at least 1, got 0"),
    ],
)
def test_arguments_are_checked(shape, source, passes, message):
    with pytest.raises(ValueError, match=message):
        moment_matching(torch.randn(shape), lambda moved: moved.sum(-1), source, num_passes=passes)


def test_a_target_that_is_finite_nowhere_is_refused():
    draws = torch.randn(50, 2)
    with pytest.raises(ValueError, match="finite at none of the draws"):
        moment_matching(draws, lambda moved: torch.full((len(moved),), math.nan), torch.zeros(50))


# --- figures that must warn ---------------------------------------------------------------------------------------


def test_modes_that_no_affine_map_reaches_are_seen_by_the_ess():
    draws = torch.randn(NUM_DRAWS, 2, generator=torch.Generator().manual_seed(12))
    centre = torch.tensor([8.0, 0.0])

    def log_target(moved):
        sides = torch.stack([-2 * (moved - sign * centre).square().sum(-1) for sign in (1, -1)])
        return sides.logsumexp(0)

    result = moment_matching(draws, log_target, -0.5 * draws.square().sum(-1))
    assert result.ess < 0.5 * NUM_DRAWS


def test_half_of_the_data_in_many_dimensions_is_seen_by_the_ess():
    model = Logistic.drawn(0, num_data=120, dim=20)
    retained = model.rows(slice(60, None))
    draws = model.sample(400, seed=1)
    source = model.log_joint(draws)
    result = moment_matching(draws, retained.log_joint, source)
    held_out = held_out_weights(draws, retained.log_joint, source)
    assert result.ess < 0.5 * 400
    assert held_out.ess < 0.5 * result.ess


def test_held_out_weights_do_not_see_the_fit_of_the_map(regression):
    model, retained, draws = regression
    few = draws[:100]
    good = held_out_weights(draws, retained.log_joint, model.log_joint(draws))
    assert good.log_weights.shape == (NUM_DRAWS // 2,)
    assert good.ess > 0.9 * NUM_DRAWS / 2
    fitted = moment_matching(few, retained.log_joint, model.log_joint(few))
    held_out = held_out_weights(few, retained.log_joint, model.log_joint(few))
    assert held_out.ess / 50 < fitted.ess / 100


def test_a_held_out_half_without_any_density_counts_for_nothing():
    draws = torch.cat([torch.randn(100, 2), 50 + torch.randn(100, 2)])

    def log_target(moved):
        return torch.where(moved[:, 0] < 20, -0.5 * moved.square().sum(-1), math.nan)

    held_out = held_out_weights(draws, log_target, torch.zeros(200))
    assert held_out.ess == 0 and held_out.khat == math.inf


# --- logistic regression ------------------------------------------------------------------------------------------


def forget(model, num_erased, draws):
    retained, erased = model.rows(slice(num_erased, None)), model.rows(slice(0, num_erased))
    initial = influence_map(model, retained, erased, draws)
    return moment_matching(draws, retained.log_joint, model.log_joint(draws), initial)


def test_logistic_regression_reaches_the_floor():
    model = Logistic.drawn(0)
    retained = model.rows(slice(10, None))
    draws, refit, again = model.sample(800, seed=1), retained.sample(800, seed=2), retained.sample(800, seed=3)
    result = forget(model, 10, draws)
    assert float(moment_kl(draws, refit)) > 1.5
    assert float(moment_kl(result.draws, refit, result.log_weights)) < float(moment_kl(again, refit)) + 0.03
    assert result.ess > 0.95 * 800 and result.khat < 0.5
    assert result.start == "initial" and result.num_passes <= 5


@pytest.mark.slow
@pytest.mark.parametrize(("num_erased", "min_ess"), [(10, 1900), (30, 1850), (60, 1750), (100, 1500)])
def test_logistic_regression_at_the_published_size(num_erased, min_ess):
    for seed in range(3):
        model = Logistic.drawn(seed)
        retained = model.rows(slice(num_erased, None))
        draws = model.sample(NUM_DRAWS, seed=1)
        refit, again = (retained.sample(NUM_DRAWS, seed) for seed in (2, 3))
        result = forget(model, num_erased, draws)
        assert float(moment_kl(draws, refit)) > 2
        assert float(moment_kl(result.draws, refit, result.log_weights)) < float(moment_kl(again, refit)) + 0.03
        assert result.ess > min_ess and result.khat < 0.5
