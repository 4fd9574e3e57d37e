"""Energies: against closed forms, against Pyro, and the laws that forgetting rests on."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from pyro_forget.data import Batch, Data
from pyro_forget.effects.noise import Noise
from pyro_forget.energy import Energy, FunctionEnergy, gradient_over, share_of, value_and_gradient
from pyro_forget.energy.variational import default_pairs
from pyro_forget.guides import MeanField, local_reparametrization
from pyro_forget.models import MLP, LinearRegression, LogisticRegression
from pyro_forget.params import Params, dot, flatten, map_params, unflatten
from pyro_forget.posterior import EnergyPosterior, SampledPosterior, VariationalPosterior
from tests import guide_programs
from tests.guide_programs import GUIDES
from tests.oracles import LinearGaussian, dense_gradient, dense_hessian, finite_difference, normal_expectation
from tests.programs import ADOPTED, regression

PRIOR_STD, NOISE = 2.0, 0.7
GAUSSIAN_GUIDES = [MeanField, AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal]


def linear() -> LinearRegression:
    return LinearRegression(3, prior_std=PRIOR_STD, noise_std=NOISE)


def oracle() -> LinearGaussian:
    return LinearGaussian(*regression(dim=3), PRIOR_STD, NOISE)


def taken(model: Callable[..., Any], make: Callable[..., Any], *args: Tensor, seed: int = 0) -> VariationalPosterior:
    """A guide somewhere, taken over."""
    pyro.set_rng_seed(seed)
    guide = make(model)
    guide(*args)
    with torch.no_grad():
        for value in guide.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return VariationalPosterior(model, guide, Data(*args))


def moments(posterior: VariationalPosterior) -> tuple[Tensor, Tensor]:
    loc, scale = posterior.gaussian.flat()
    return loc, torch.diag(scale.square()) if scale.ndim == 1 else scale @ scale.T


# --- closed forms


@pytest.mark.parametrize("make", GAUSSIAN_GUIDES)
def test_a_linear_gaussian_energy_is_exact(make: Callable[..., Any]) -> None:
    posterior = taken(linear(), make, *regression(dim=3))
    data, exact = Data(*regression(dim=3)), oracle()
    loc, covariance = moments(posterior)
    params, energy = posterior.params, posterior.energy
    torch.testing.assert_close(energy.prior(params), exact.kl_to_prior(loc, covariance), rtol=1e-12, atol=0)
    torch.testing.assert_close(energy.total(params, data), exact.energy(loc, covariance), rtol=1e-12, atol=0)
    rows, _ = data.split([5, 20, 22])
    share = exact.expected_loss(loc, covariance)[[5, 20, 22]].sum()
    torch.testing.assert_close(share_of(energy, params, rows), share, rtol=1e-12, atol=0)
    # And whatever the noise, for its moments are exact.
    torch.testing.assert_close(energy.with_noise(9).total(params, data), exact.energy(loc, covariance))


def test_a_linear_gaussian_energy_is_exact_under_local_reparametrisation() -> None:
    posterior = taken(local_reparametrization(linear()), MeanField, *regression(dim=3))
    assert posterior.energy.gaussian.local == {"weight"}
    data, exact = Data(*regression(dim=3)), oracle()
    total = posterior.energy.total(posterior.params, data)
    torch.testing.assert_close(total, exact.energy(*moments(posterior)), rtol=1e-12, atol=0)


def test_the_energy_is_least_at_the_posterior() -> None:
    """There it is minus the logarithm of the evidence."""
    posterior = taken(linear(), AutoMultivariateNormal, *regression(dim=3))
    exact, data = oracle(), Data(*regression(dim=3))
    view = posterior.energy.whole.view
    factor = torch.linalg.cholesky(exact.covariance)
    best = view.write(posterior.params, type(posterior.gaussian)({"weight": exact.mean}, factor))
    value, gradient = value_and_gradient(lambda params: posterior.energy.total(params, data), best)
    assert value == pytest.approx(-float(exact.log_evidence()), rel=1e-12)
    assert flatten(gradient).abs().max() < 1e-8


def other_prior(x: Tensor, y: Tensor | None = None) -> Tensor:
    weight = pyro.sample("weight", dist.Normal(torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.3])).to_event(1))
    noise = pyro.sample("noise", dist.HalfCauchy(1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ weight, noise), obs=y)


def exact_kl(posterior: VariationalPosterior) -> Tensor:
    """KL of a Gaussian guide of `other_prior`: closed for the weights, by quadrature for the noise."""
    loc, covariance = moments(posterior)
    entropy = torch.distributions.MultivariateNormal(loc, covariance).entropy()
    spread, mean = torch.tensor([2.0, 0.3]), torch.tensor([0.5, -1.0])
    scale = covariance.diagonal().sqrt()
    cross = 0.5 * ((loc[:2] - mean).square() + scale[:2].square()) / spread**2 + spread.log()
    cross = cross.sum() + math.log(2 * math.pi)
    cauchy = torch.distributions.HalfCauchy(1.0)
    cross = cross - normal_expectation(lambda u: cauchy.log_prob(u.exp()) + u, loc[2], scale[2])
    return cross - entropy


@pytest.mark.parametrize("make", GAUSSIAN_GUIDES)
def test_the_kl_to_a_prior_without_a_closed_form(make: Callable[..., Any]) -> None:
    posterior = taken(other_prior, make, *regression())
    assert set(posterior.energy.gaussian.conjugate) == {"weight"}
    expected = exact_kl(posterior)
    found = torch.stack([posterior.energy.with_noise(seed, 8).prior(posterior.params) for seed in range(60)])
    # Frames are exact up to third moments and near in the fourth, so this is no matter of standard errors.
    assert (found - expected).abs().max() < 1e-4 * expected
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("make", GAUSSIAN_GUIDES)
def test_the_kl_equals_monte_carlo(make: Callable[..., Any]) -> None:
    """The same guide run by run, without its Gaussian being known: log q − log p of independent draws."""
    posterior = taken(other_prior, make, *regression())
    whole, expected = posterior.energy.whole, exact_kl(posterior)
    found = torch.stack([whole_under(whole, seed).prior(posterior.params) for seed in range(40)])
    assert (found.mean() - expected).abs() < 5 * found.std() / math.sqrt(40)


def whole_under(whole: Any, seed: int) -> Any:
    return type(whole)(whole.program, whole.guide, Noise(seed, 50, antithetic=False), whole.view)


# --- laws


@pytest.mark.parametrize("name", GUIDES)
def test_batches_do_not_matter(name: str) -> None:
    posterior, data = guide_programs.adopted(name), guide_programs.data()
    energy = posterior.energy.with_noise(0, 4)
    whole = energy.total(posterior.params, data)
    for size in (7, 23):
        again = energy.total(posterior.params, data.with_batch_size(size))
        torch.testing.assert_close(again, whole, rtol=1e-11, atol=0)


def network() -> tuple[VariationalPosterior, Data]:
    """A small network under local reparametrisation, with ids of its own."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(40, 4, generator=generator)
    labels = torch.randint(3, (40,), generator=generator)
    model = local_reparametrization(MLP([4, 6, 3]))
    guide = MeanField(model, init_scale=0.3)
    guide(x, labels)
    data = Data.of((x, labels), ids=torch.arange(40) * 11 - 100)
    return VariationalPosterior(model, guide, data), data


def test_noise_by_row_leaves_the_law_and_the_batches_alone() -> None:
    posterior, data = network()
    assert posterior.energy.gaussian.row_shapes and not posterior.energy.gaussian.drawn_sites
    energy, params = posterior.energy, posterior.params
    erased, retained = data.split(data.ids[[0, 3, 4, 39]])
    whole = energy.total(params, data)
    torch.testing.assert_close(energy.total(params, data.with_batch_size(7)), whole, rtol=1e-12, atol=0)
    gap = whole - energy.total(params, retained.with_batch_size(5))
    torch.testing.assert_close(gap, share_of(energy, params, erased), rtol=1e-9, atol=0)
    # It depends on the noise, so this is no closed form in disguise; and after an edit a row keeps its noise.
    assert abs(energy.with_noise(5).total(params, data) - whole) > 1e-3
    edited = posterior.edited(params, retained.ids)
    rest = edited.energy.total(edited.params, retained)
    torch.testing.assert_close(rest, energy.total(params, retained), rtol=1e-12, atol=0)


def test_local_reparametrisation_changes_no_expectation() -> None:
    x, labels = regression()[0], (regression()[1] > 0).double()
    plain = taken(LogisticRegression(2), MeanField, x, labels)
    local = VariationalPosterior(local_reparametrization(LogisticRegression(2)), plain.guide, Data(x, labels))
    assert local.energy.gaussian.quadrature is not None and plain.energy.gaussian.quadrature is None
    params, data = plain.params, Data(x, labels)
    drawn = torch.stack([plain.energy.with_noise(seed, 40).total(params, data) for seed in range(30)])
    gap = drawn.mean() - local.energy.total(params, data)
    assert gap.abs() < 5 * drawn.std() / math.sqrt(30) + 1e-6


def test_the_share_of_no_rows_is_zero() -> None:
    posterior, data = guide_programs.adopted("AutoNormal"), guide_programs.data()
    none, _ = data.split([])
    assert share_of(posterior.energy, posterior.params, none) == 0
    assert posterior.energy.total(posterior.params, none) == posterior.energy.prior(posterior.params)


@pytest.mark.parametrize("name", ["MeanField", "AutoStructured", "AutoIAFNormal", "gamma"])
def test_noise_is_pinned(name: str) -> None:
    posterior, data = guide_programs.adopted(name), guide_programs.data()
    energy, params = posterior.energy.with_noise(0, 5), posterior.params
    before = energy.noise

    def total(energy: Energy) -> Tensor:
        return energy.total(params, data)

    assert torch.equal(total(energy), total(energy))
    assert torch.equal(total(energy.with_noise(3, 5)), total(energy.with_noise(3, 5)))
    assert not torch.equal(total(energy.with_noise(3, 5)), total(energy.with_noise(4, 5)))
    assert energy.with_noise(3).noise == Noise(3, energy.noise.pairs)
    fresh = energy.with_fresh_noise(2, 6)
    assert fresh.noise.num_draws == 6 and not fresh.noise.antithetic
    assert energy.noise == before, "an energy is not changed"


def test_an_estimate_is_unbiased_over_batches() -> None:
    posterior, data = guide_programs.adopted("MeanField"), guide_programs.data()
    batches = list(data.with_batch_size(8).batches())
    found = torch.stack([posterior.energy.estimate(posterior.params, batch, len(data)) for batch in batches])
    torch.testing.assert_close(found.mean(), posterior.energy.total(posterior.params, data))


@pytest.mark.parametrize(
    ("size", "shapes", "num_data", "pairs"),
    [
        (3, [], 100_000, 8),
        (3, [], 60, 64),
        (200, [], 60, 200),
        (500, [], 60, 16),
        (0, [10], 60, 10),
        (0, [300, 10], 60, 10),
        (0, [1], 60, 8),
        (20, [10], 100_000, 20),
    ],
)
def test_as_many_pairs_as_exact_moments_need(size: int, shapes: list[int], num_data: int, pairs: int) -> None:
    assert default_pairs(size, {str(n): torch.Size([n]) for n in shapes}, num_data) == pairs


# --- derivatives


# The sampler of a Gamma rejects, so at one seed its draws are no smooth function, and it has no second derivative.
SMOOTH = [name for name in GUIDES if name != "gamma"]


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_those_of_the_energy(name: str) -> None:
    posterior, data = guide_programs.adopted(name), guide_programs.data()
    pyro.set_rng_seed(2)
    # Directions inside the parameters' space: a converted AutoLaplace keeps a triangular matrix in the open.
    random = map_params(torch.randn_like, posterior.params)
    direction = map_params(lambda value: value.tril() if value.ndim == 2 else value, random)

    def function(params: Params) -> Tensor:
        return posterior.energy.total(params, data)

    _, gradient = value_and_gradient(function, posterior.params)
    expected = finite_difference(function, posterior.params, direction)
    torch.testing.assert_close(dot(gradient, direction), expected.double(), rtol=1e-5, atol=1e-5)
    assert all(bool(value.any()) for value in gradient.values())


@pytest.mark.parametrize("name", SMOOTH)
def test_double_backward_gives_a_symmetric_hessian(name: str) -> None:
    """`torch.func.jvp` of a gradient fails for some autoguides; double backward must not."""
    posterior, data = guide_programs.adopted(name), guide_programs.data()
    hessian = dense_hessian(lambda params: posterior.energy.total(params, data), posterior.params)
    torch.testing.assert_close(hessian, hessian.T, rtol=1e-9, atol=1e-9)
    step = 1e-5 * torch.randn(len(hessian), generator=torch.Generator().manual_seed(1))
    flat = flatten(posterior.params)
    ends = [
        dense_gradient(lambda params: posterior.energy.total(params, data), unflatten(at, posterior.params))
        for at in (flat + step, flat - step)
    ]
    torch.testing.assert_close((ends[0] - ends[1]) / 2, hessian @ step, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "loss"),
    [(AutoNormal, Trace_ELBO), (MeanField, TraceMeanField_ELBO), (AutoDiagonalNormal, Trace_ELBO)],
)
def test_value_and_gradient_are_those_that_pyro_estimates(make: Callable[..., Any], loss: type) -> None:
    model, data = linear(), Data(*regression(dim=3))
    posterior = taken(model, make, *regression(dim=3))
    guide = posterior.guide
    elbo, values, gradients = loss(), [], []
    for _ in range(150):
        guide.zero_grad()
        values.append(torch.tensor(elbo.loss_and_grads(model, guide, *regression(dim=3))))
        gradients.append(torch.cat([value.grad.flatten() for value in guide.parameters()]))
    value, gradient = value_and_gradient(lambda params: posterior.energy.total(params, data), posterior.params)
    assert_mean(torch.stack(values)[:, None], torch.tensor([value]))
    assert_mean(torch.stack(gradients), flatten(gradient))


def assert_mean(draws: Tensor, expected: Tensor) -> None:
    """Within five standard errors."""
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() < 5 * error + 1e-9).all()


@pytest.mark.parametrize("make", GAUSSIAN_GUIDES)
def test_single_precision(float32: None, make: Callable[..., Any]) -> None:
    posterior = taken(linear(), make, *regression(dim=3))
    assert {value.dtype for value in posterior.params.values()} == {torch.float32}
    total = posterior.energy.total(posterior.params, Data(*regression(dim=3)))
    exact = LinearGaussian(*(value.double() for value in regression(dim=3)), PRIOR_STD, NOISE)
    assert total.dtype == torch.float64, "sums over large data differ in digits that float32 has lost"
    with default_dtype(torch.float64):
        torch.testing.assert_close(total, exact.energy(*moments(posterior)), rtol=1e-5, atol=0)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


# --- draws


@pytest.mark.parametrize("name", ["every_support", "reparametrised", "groups", "rows_that_are_vectors"])
def test_the_energy_of_draws_is_pyros_potential(name: str) -> None:
    program = ADOPTED[name]()
    posterior = program.sampled()
    args, kwargs = program.call
    _, potential, transforms, _ = initialize_model(program.model, args, kwargs)
    joint = posterior.log_joint(posterior.params, program.data.with_batch_size(5))
    for chain in range(2):
        for draw in range(3):
            inside = {site: transforms[site](value[chain, draw]) for site, value in posterior.latents.items()}
            torch.testing.assert_close(-joint[chain, draw], potential(inside), rtol=1e-10, atol=1e-9)
    mean = posterior.energy.total(posterior.params, program.data)
    torch.testing.assert_close(mean, -joint.mean())
    parts = posterior.energy.prior(posterior.params) + share_of(posterior.energy, posterior.params, program.data)
    torch.testing.assert_close(parts, mean)


def cloud() -> tuple[SampledPosterior, Data]:
    data = Data(*regression(dim=3))
    draws = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    return SampledPosterior(linear(), {"weight": draws}, data), data


def test_a_shift_moves_the_whole_cloud_or_each_draw() -> None:
    posterior, data = cloud()
    energy = posterior.energy.shifted(posterior.params)
    exact = oracle()

    def loss(weight: Tensor) -> Tensor:
        prior = dist.Normal(0.0, PRIOR_STD).log_prob(weight).sum(-1)
        return -prior - dist.Normal(weight @ exact.x.T, NOISE).log_prob(exact.y).sum(-1)

    together, apart = torch.tensor([0.3, -0.1, 0.2]), torch.randn(2, 5, 3)
    for shift in (together, apart):
        expected = loss(posterior.params["weight"] + shift).mean()
        torch.testing.assert_close(energy.total({"weight": shift}, data), expected)
    # One shift for all feels the mean curvature; a shift for each draw its own, over the number of draws.
    zero = {"weight": torch.zeros(3)}
    hessian = dense_hessian(lambda shift: energy.total(shift, data), zero)
    torch.testing.assert_close(hessian, exact.precision)
    zero = {"weight": torch.zeros(2, 5, 3)}
    hessian = dense_hessian(lambda shift: energy.total(shift, data), zero)
    torch.testing.assert_close(hessian, torch.block_diag(*[exact.precision / 10] * 10))


def test_a_cloud_has_no_other_noise_than_its_draws() -> None:
    posterior, data = cloud()
    energy = posterior.energy.shifted(posterior.params)
    assert energy.with_noise(3, 8) is energy
    fewer = energy.with_fresh_noise(1, 4)
    zero = {"weight": torch.zeros(3)}
    values = -posterior.log_joint(posterior.params, data).flatten()
    chosen = fewer.total(zero, data) * 4
    assert fewer.cloud(zero)["weight"].shape == (1, 4, 3)
    assert energy.with_fresh_noise(1, 4).total(zero, data) * 4 == chosen
    picks = (fewer.cloud(zero)["weight"][0, :, None] == posterior.params["weight"].flatten(0, 1)).all(-1)
    torch.testing.assert_close(chosen, picks.double().sum(0) @ values)


# --- by hand


def by_hand() -> tuple[Energy, Data, LinearGaussian]:
    exact = oracle()

    def share(params: Params, batch: Batch) -> Tensor:
        return -dist.Normal(batch.args[0] @ params["w"], NOISE).log_prob(batch.args[1]).sum()

    def total(params: Params, batch: Batch) -> Tensor:
        return share(params, batch) - dist.Normal(0.0, PRIOR_STD).log_prob(params["w"]).sum()

    return FunctionEnergy(total, share), Data(exact.x, exact.y), exact


def test_an_energy_by_hand() -> None:
    energy, data, exact = by_hand()
    params = {"w": torch.tensor([0.3, 1.0, -0.4])}
    whole = energy.total(params, data)
    torch.testing.assert_close(energy.total(params, data.with_batch_size(5)), whole)
    erased, retained = data.split([0, 9])
    torch.testing.assert_close(whole - energy.total(params, retained), share_of(energy, params, erased))
    torch.testing.assert_close(dense_hessian(lambda p: energy.total(p, data), params), exact.precision)
    batches = list(data.with_batch_size(8).batches())
    found = torch.stack([energy.estimate(params, batch, len(data)) for batch in batches])
    torch.testing.assert_close(found.mean(), whole)
    assert energy.with_noise(1) is energy and energy.with_fresh_noise(1, 2) is energy
    with pytest.raises(ValueError, match=r"no prior of its own: use `total`"):
        energy.prior(params)


def test_a_posterior_by_hand() -> None:
    energy, data, exact = by_hand()
    start = {"w": exact.mean}
    posterior = EnergyPosterior(start, energy, data)
    start["w"] += 1
    assert torch.equal(posterior.params["w"], exact.mean) and posterior.num_data == 24
    edited = posterior.edited({"w": torch.zeros(3)}, data.ids[:5])
    assert edited.parent == posterior.digest != edited.digest
    assert (edited.num_data, posterior.num_data) == (5, 24)
    with pytest.raises(ValueError, match="has no draws; read `params`"):
        posterior.draws(3)


# --- sums of gradients


def test_gradients_are_summed_batch_by_batch() -> None:
    posterior, data = guide_programs.adopted("AutoNormal"), guide_programs.data()
    value, gradient = gradient_over(posterior.energy.share, posterior.params, data.with_batch_size(5))
    expected, whole = value_and_gradient(lambda p: share_of(posterior.energy, p, data), posterior.params)
    assert value == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, whole)
    value, gradient = gradient_over(posterior.energy.share, posterior.params, data.split([])[0])
    assert value == 0 and not any(bool(part.any()) for part in gradient.values())


def test_a_gradient_of_what_does_not_matter_is_zero() -> None:
    params = {"used": torch.ones(2), "idle": torch.ones(3)}
    value, gradient = value_and_gradient(lambda p: p["used"].square().sum(), params)
    assert value == 2 and torch.equal(gradient["idle"], torch.zeros(3))
    value, gradient = value_and_gradient(lambda p: torch.tensor(3.0), params)
    assert value == 3 and torch.equal(gradient["used"], torch.zeros(2))
    assert not params["used"].requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_energy_that_is_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match=r"The energy is .*: a log density is not finite.*support"):
        value_and_gradient(lambda p: p["a"].sum() * bad, {"a": torch.ones(1)})
