"""Curvature operators against dense matrices, written out by hand under the same draws."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from torch import Tensor
from torch.func import hessian, jacfwd, vmap

from pyro_forget.curvature import LinearOperator, as_matrix, check_deterministic
from pyro_forget.curvature.gauss_newton import GaussNewton
from pyro_forget.curvature.hessian import Hessian
from pyro_forget.curvature.prior import PriorCurvature
from pyro_forget.data import Data
from pyro_forget.effects.noise import Noise
from pyro_forget.energy import GaussianEnergy
from pyro_forget.gaussian import Gaussian
from pyro_forget.guides import MeanField, local_reparametrization
from pyro_forget.models import LinearRegression, LogisticRegression, PoissonRegression, SoftmaxRegression
from pyro_forget.params import flatten
from pyro_forget.posterior import VariationalPosterior
from tests import fits
from tests.oracles import dense_hessian, normal_expectation

PAIRS = 6


def at(model: Any, guide: Any, data: Data, local: bool = False) -> tuple[GaussianEnergy, Gaussian]:
    """An energy under pinned noise, and a Gaussian away from every special place."""
    model = local_reparametrization(model) if local else model
    posterior = fits.started(model, guide(model), data)
    gaussian, energy = posterior.gaussian, posterior.energy.gaussian
    assert gaussian is not None and energy is not None
    places = {name: value + 0.3 * fits.normal(3, *value.shape) for name, value in gaussian.loc.items()}
    size = sum(value.numel() for value in places.values())
    if gaussian.is_diagonal:
        scale: Any = {name: 0.2 + 0.3 * fits.normal(4, *v.shape).abs() for name, v in places.items()}
    else:
        scale = 0.3 * torch.eye(size) + 0.1 * fits.normal(4, size, size).tril()
    return energy.with_noise(Noise(11, PAIRS)), Gaussian(places, scale)


def draws(energy: GaussianEnergy, gaussian: Gaussian) -> Tensor:
    """The weights that the energy sees, (draw, d)."""
    values = gaussian.at(energy.noise.normal(len(flatten(gaussian.loc)), flatten(gaussian.loc)))
    return torch.cat([value.reshape(2 * PAIRS, -1) for value in values.values()], 1)


def assert_operator(operator: LinearOperator, expected: Tensor, like: Any, rtol: float = 1e-9) -> None:
    check_deterministic(operator, like)
    torch.testing.assert_close(as_matrix(operator, like), expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def gauss_newton(outputs: Callable[[Tensor], Tensor], fisher: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Mean over the draws of JᵀΛJ; `outputs` and `fisher` give (output,) and (output, output) at one draw."""

    def of(value: Tensor) -> Tensor:
        jacobian = jacfwd(outputs)(value)
        return jacobian.T @ fisher(value) @ jacobian

    return vmap(of)(values).mean(0)


GUIDES: dict[str, Callable[[Any], Any]] = {"MeanField": MeanField, "full": autoguide.AutoMultivariateNormal}


# --- Gauss-Newton


def logistic() -> tuple[Any, Data, Tensor]:
    model, data = fits.logistic()
    return model, data, next(data.batches()).args[0]


@pytest.mark.parametrize("guide", GUIDES)
def test_logistic(guide: str) -> None:
    model, data, x = logistic()
    energy, gaussian = at(model, GUIDES[guide], data)

    def fisher(w: Tensor) -> Tensor:
        return torch.diag((x @ w).sigmoid() * (-x @ w).sigmoid())

    expected = gauss_newton(lambda w: x @ w, fisher, draws(energy, gaussian)) + torch.eye(4)
    assert_operator(GaussNewton(energy, gaussian, data), expected, gaussian.loc)


def test_logistic_under_local_reparametrisation() -> None:
    """Then Λ is an integral over each row's own logit, by a few nodes where its deviation is about 1 or less."""
    model, data, x = logistic()
    energy, wide = at(model, MeanField, data, local=True)
    gaussian = Gaussian(wide.loc, {"weight": 0.4 * wide.deviation("weight")})
    loc, sd = x @ gaussian.loc["weight"], (x.square() @ gaussian.deviation("weight").square()).sqrt()
    slopes = [normal_expectation(lambda u: u.sigmoid() * (-u).sigmoid(), *row) for row in zip(loc, sd, strict=True)]
    expected = (x.T * torch.stack(slopes)) @ x + torch.eye(4)
    assert_operator(GaussNewton(energy, gaussian, data), expected, gaussian.loc, rtol=1e-3)


@pytest.mark.parametrize("local", [False, True])
def test_softmax(local: bool) -> None:
    x, y = fits.normal(0, 20, 3), torch.arange(20) % 4
    energy, gaussian = at(SoftmaxRegression(3, 4, prior_std=0.5), MeanField, data := Data(x, y), local)

    def fisher(logits: Tensor) -> Tensor:
        p = logits.reshape(20, 4).softmax(-1)
        return torch.block_diag(*(torch.diag(row) - row[:, None] * row for row in p))

    def outputs(w: Tensor) -> Tensor:
        return (x @ w.reshape(3, 4)).flatten()

    if local:  # J is the same for every draw, and the noise of a row is a frame of its own: enough to compare means
        energy = energy.with_noise(Noise(11, 400))
        sd = (x.square() @ gaussian.deviation("weight").square()).sqrt()
        logits = x @ gaussian.loc["weight"] + sd * fits.normal(5, 20000, 20, 4)
        p = logits.softmax(-1)
        mean = torch.diag_embed(p.mean(0)) - torch.einsum("sni,snj->nij", p, p) / len(p)
        jacobian = jacfwd(outputs)(torch.zeros(12))
        expected = jacobian.T @ torch.block_diag(*mean) @ jacobian
    else:
        stacked = [gauss_newton(outputs, lambda w: fisher(outputs(w)), w[None]) for w in draws(energy, gaussian)]
        expected = torch.stack(stacked).mean(0)
    expected = expected + 4 * torch.eye(12)
    assert_operator(GaussNewton(energy, gaussian, data), expected, gaussian.loc, rtol=0.01 if local else 1e-9)


@pytest.mark.parametrize("guide", GUIDES)
def test_poisson(guide: str) -> None:
    model, data = fits.poisson()
    x = next(data.batches()).args[0]
    assert isinstance(model, PoissonRegression)
    energy, gaussian = at(model, GUIDES[guide], data)
    expected = gauss_newton(lambda w: x @ w, lambda w: torch.diag((x @ w).exp()), draws(energy, gaussian))
    assert_operator(GaussNewton(energy, gaussian, data), expected + torch.eye(4), gaussian.loc)


def half_normal_curvature(u: Tensor) -> Tensor:
    """Second derivative of −log HalfNormal(eᵘ; 1) − u."""
    return 2 * (2 * u).exp()


@pytest.mark.parametrize("guide", GUIDES)
def test_a_normal_with_learned_noise(guide: str) -> None:
    """Outputs are the mean and the logarithm of the scale; Λ is 1/s² and 2."""
    x, y = fits.normal(0, 15, 3), fits.normal(1, 15)
    energy, gaussian = at(LinearRegression(3, noise_std=None), GUIDES[guide], data := Data(x, y))

    def outputs(u: Tensor) -> Tensor:
        return torch.cat([x @ u[:3], u[3:].expand(15)])

    def fisher(u: Tensor) -> Tensor:
        return torch.diag(torch.cat([(-2 * u[3:]).exp().expand(15), torch.full((15,), 2.0)]))

    values = draws(energy, gaussian)
    prior = torch.diag(torch.cat([torch.ones(3), half_normal_curvature(values[:, 3]).mean()[None]]))
    expected = gauss_newton(outputs, fisher, values) + prior
    assert_operator(GaussNewton(energy, gaussian, data), expected, gaussian.loc)


def products(x: Tensor, y: Tensor | None = None) -> None:
    """Outputs that are not linear in the latents: J differs from draw to draw."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((a * (x @ b)).tanh(), 0.5), obs=y)


@pytest.mark.parametrize("guide", GUIDES)
def test_outputs_that_are_not_linear(guide: str) -> None:
    x, y = fits.normal(0, 12, 2), fits.normal(1, 12)
    energy, gaussian = at(products, GUIDES[guide], data := Data(x, y))

    def outputs(u: Tensor) -> Tensor:
        return (u[0] * (x @ u[1:])).tanh()

    expected = gauss_newton(outputs, lambda _: 4 * torch.eye(12), draws(energy, gaussian))
    expected = expected + torch.diag(torch.tensor([1.0, 0.25, 0.25]))
    assert_operator(GaussNewton(energy, gaussian, data), expected, gaussian.loc)


def weighted(x: Tensor, y: Tensor, weight: Tensor, known: Tensor) -> None:
    """Rows of different weight, some of them masked."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)), pyro.poutine.scale(scale=weight), pyro.poutine.mask(mask=known):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def test_masks_and_weights_count() -> None:
    x, y = fits.normal(0, 12, 2), (fits.normal(1, 12) > 0).double()
    weight, known = fits.normal(2, 12).abs(), torch.arange(12) % 3 > 0
    energy, gaussian = at(weighted, MeanField, data := Data(x, y, weight, known))

    def fisher(w: Tensor) -> Tensor:
        return torch.diag(weight * known * (x @ w).sigmoid() * (-x @ w).sigmoid())

    expected = gauss_newton(lambda w: x @ w, fisher, draws(energy, gaussian)) + torch.eye(2)
    assert_operator(GaussNewton(energy, gaussian, data), expected, gaussian.loc)


def student(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.StudentT(5.0, x @ w, 0.5), obs=y)


def test_a_likelihood_without_a_closed_form_is_sampled() -> None:
    """Student's t with ν degrees of freedom has Λ = (ν + 1) / ((ν + 3) s²)."""
    x = fits.normal(0, 200, 2)
    energy, gaussian = at(student, MeanField, data := Data(x, fits.normal(1, 200)))
    operator = GaussNewton(energy, gaussian, data)
    check_deterministic(operator, gaussian.loc)
    expected = 6 / 8 / 0.25 * x.T @ x + torch.eye(2)
    gap = as_matrix(operator, gaussian.loc) - expected
    assert float(torch.linalg.matrix_norm(gap)) < 0.1 * float(torch.linalg.matrix_norm(expected))


CASES: dict[str, Callable[[], tuple[Any, Data, bool]]] = {
    "logistic": lambda: (*logistic()[:2], False),
    "logistic, local": lambda: (*logistic()[:2], True),
    "learned noise": lambda: (
        LinearRegression(3, noise_std=None), Data(fits.normal(0, 40, 3), fits.normal(1, 40)), False
    ),
    "not linear": lambda: (products, Data(fits.normal(0, 40, 2), fits.normal(1, 40)), False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_batches_do_not_matter(name: str) -> None:
    model, data, local = CASES[name]()
    energy, gaussian = at(model, MeanField, data, local)
    whole = as_matrix(GaussNewton(energy, gaussian, data), gaussian.loc)
    for batch_size in (7, 20):
        parts = GaussNewton(energy, gaussian, data.with_batch_size(batch_size))
        torch.testing.assert_close(as_matrix(parts, gaussian.loc), whole)
        assert parts.num_products == len(whole)


def test_curvature_adds_up_over_rows() -> None:
    """C(S) − C(S∖S′) is the curvature of S′ alone: the prior is in each once."""
    model, data, _ = CASES["logistic"]()
    energy, gaussian = at(model, MeanField, data)
    parts = [as_matrix(GaussNewton(energy, gaussian, rows), gaussian.loc) for rows in (data, *data.split(range(9)))]
    torch.testing.assert_close(parts[0], parts[1] + parts[2] - torch.eye(4))


# --- the prior


def only_prior(prior: Callable[[], None]) -> Callable[[Tensor], None]:
    def model(y: Tensor) -> None:
        prior()
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    return model


def prior_of(prior: Callable[[], None], guide: str) -> tuple[PriorCurvature, Tensor, Gaussian]:
    """(the operator, the draws, where)."""
    model = only_prior(prior)
    posterior = VariationalPosterior.started(model, GUIDES[guide](model), Data(torch.zeros(4)))
    assert posterior.gaussian is not None and posterior.energy.gaussian is not None
    loc = {name: value + 0.3 * fits.normal(3, *value.shape) for name, value in posterior.gaussian.loc.items()}
    energy, gaussian = posterior.energy.gaussian.with_noise(Noise(11, PAIRS)), Gaussian(loc, posterior.gaussian.scale)
    return PriorCurvature(energy, gaussian), draws(energy, gaussian), gaussian


@pytest.mark.parametrize("guide", GUIDES)
def test_the_curvature_of_a_fixed_normal_prior(guide: str) -> None:
    def prior() -> None:
        pyro.sample("a", dist.Normal(torch.tensor([0.0, 3.0]), torch.tensor([0.5, 2.0])).to_event(1))
        pyro.sample("b", dist.Normal(1.0, 0.1))

    operator, _, gaussian = prior_of(prior, guide)
    assert_operator(operator, torch.diag(torch.tensor([4.0, 0.25, 100.0])), gaussian.loc)


@pytest.mark.parametrize("guide", GUIDES)
def test_the_curvature_of_a_hierarchy_is_conditional_fisher(guide: str) -> None:
    """(dv − dμ)²/τ² + 2 (d log τ)² for each v ~ N(μ, τ²): no residual enters, so it is never negative."""

    def prior() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        pyro.sample("effect", dist.Normal(mean, spread).expand([3]).to_event(1))

    operator, values, gaussian = prior_of(prior, guide)
    assert list(gaussian.loc) == ["mean", "spread", "effect"]

    def residuals(u: Tensor) -> Tensor:
        return torch.cat([u[2:] - u[0], u[1:2].expand(3)])

    def fisher(u: Tensor) -> Tensor:
        return torch.diag(torch.cat([(-2 * u[1:2]).exp().expand(3), torch.full((3,), 2.0)]))

    own = torch.zeros(5)
    own[0], own[1] = 0.25, half_normal_curvature(values[:, 1]).mean()
    expected = gauss_newton(residuals, fisher, values) + torch.diag(own)
    assert_operator(operator, expected, gaussian.loc)
    assert float(torch.linalg.eigvalsh(expected)[0]) > 0


@pytest.mark.parametrize("guide", GUIDES)
def test_the_curvature_of_other_priors_is_their_hessian(guide: str) -> None:
    def prior() -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(0.5))
        pyro.sample("rate", dist.Gamma(2.0, 1.0 / scale))

    def minus_log_prior(u: Tensor) -> Tensor:
        scale, rate = u.exp()
        return -dist.HalfCauchy(0.5).log_prob(scale) - dist.Gamma(2.0, 1 / scale).log_prob(rate) - u.sum()

    operator, values, gaussian = prior_of(prior, guide)
    assert_operator(operator, vmap(hessian(minus_log_prior))(values).mean(0), gaussian.loc)


# --- the Hessian


@pytest.mark.parametrize("batch_size", [100, 7])
@pytest.mark.parametrize("mode", ["graph", "tape", "stream"])
@pytest.mark.parametrize("name", CASES)
def test_the_hessian(name: str, mode: str, batch_size: int) -> None:
    model, data, local = CASES[name]()
    model = local_reparametrization(model) if local else model
    posterior = fits.started(model, MeanField(model), data)
    energy, params = posterior.energy.with_noise(5, PAIRS), posterior.params
    expected = dense_hessian(lambda leaves: energy.total(leaves, data), params)
    assert_operator(Hessian(energy, params, data.with_batch_size(batch_size), mode), expected, params, rtol=1e-8)


def test_the_hessian_of_the_share_is_left_out_with_its_rows() -> None:
    model, data, x = logistic()
    assert isinstance(model, LogisticRegression)
    posterior = fits.started(model, autoguide.AutoDelta(model), data)
    rest = data.split(range(10))[1]
    w = next(iter(posterior.params.values()))
    p = (x[10:] @ w).sigmoid()
    expected = (x[10:].T * (p * (1 - p))) @ x[10:] + torch.eye(4)
    assert_operator(Hessian(posterior.energy, posterior.params, rest), expected, posterior.params)
