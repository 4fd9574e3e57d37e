"""A guide seen as a Gaussian over the unconstrained latents, and written back."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transforms
from torch.nn.functional import softplus

from pyro_forget.data import Data
from pyro_forget.gaussian import Gaussian
from pyro_forget.params import flatten
from pyro_forget.posterior import VariationalPosterior
from tests import guide_programs
from tests.guide_programs import GUIDES
from tests.programs import ADOPTED, regression

DIAGONAL = ["MeanField", "AutoNormal", "AutoDiagonalNormal", "exp", "half exp", "softplus", "softplus with a floor"]
DIAGONAL += ["positive", "PyroModule"]
FULL = ["AutoMultivariateNormal", "AutoLaplace converted"]


def other(gaussian: Gaussian) -> Gaussian:
    """Another Gaussian of the same shapes."""
    loc = {name: value + 0.3 for name, value in gaussian.loc.items()}
    if isinstance(gaussian.scale, Tensor):
        size = len(gaussian.scale)
        return Gaussian(loc, torch.linalg.cholesky(torch.eye(size) + 0.3 * torch.ones(size, size)) / 3)
    return Gaussian(loc, {name: 0.4 * value + 0.05 for name, value in gaussian.scale.items()})


def law_of(posterior: VariationalPosterior, params: Any) -> tuple[Tensor, Tensor]:
    """(mean, covariance) of the unconstrained latents, from what the guide does with noise: it is affine in it."""
    guide = posterior.energy.whole.guide
    supports = posterior.energy.whole.view.transforms

    def draw(noise: Tensor) -> Tensor:
        latents = guide.run(params, noise).latents
        return flatten({name: transform.inv(latents[name]) for name, transform in supports.items()})

    loc = draw(torch.zeros(guide.num_normals))
    columns = torch.stack([draw(unit) - loc for unit in torch.eye(guide.num_normals)], -1)
    return loc, columns @ columns.T


def covariance(scale: Tensor) -> Tensor:
    return torch.diag(scale.square()) if scale.ndim == 1 else scale @ scale.T


def assert_law(posterior: VariationalPosterior, params: Any, gaussian: Gaussian, rtol: float = 1e-9) -> None:
    loc, scale = gaussian.flat()
    mean, second = law_of(posterior, params)
    torch.testing.assert_close(loc, mean.double(), rtol=rtol, atol=rtol)
    torch.testing.assert_close(covariance(scale), second.double(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", GUIDES)
def test_which_guides_are_gaussians(name: str) -> None:
    gaussian = guide_programs.adopted(name).gaussian
    assert (gaussian is not None) == (name in DIAGONAL + FULL)
    if gaussian is not None:
        assert gaussian.is_diagonal == (name in DIAGONAL)
        assert {site: tuple(value.shape) for site, value in gaussian.loc.items()} == {"weight": (2,), "noise": ()}


@pytest.mark.parametrize("name", DIAGONAL + FULL)
def test_the_gaussian_is_what_the_guide_draws_from(name: str) -> None:
    posterior = guide_programs.adopted(name)
    assert_law(posterior, posterior.params, posterior.gaussian)


@pytest.mark.parametrize("name", DIAGONAL + FULL)
def test_writing_and_reading(name: str) -> None:
    posterior = guide_programs.adopted(name)
    view, asked = posterior.energy.whole.view, other(posterior.gaussian)
    written = view.write(posterior.params, asked)
    assert list(written) == list(posterior.params)
    assert all(written[key].shape == value.shape for key, value in posterior.params.items())
    assert_law(posterior, written, asked)
    again = view.read(written)
    for mine, theirs in zip(again.flat(), asked.flat(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    # And back to where it was.
    back = view.read(view.write(written, posterior.gaussian))
    for mine, theirs in zip(back.flat(), posterior.gaussian.flat(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", DIAGONAL)
def test_a_diagonal_guide_comes_back_to_its_parameters(name: str) -> None:
    posterior = guide_programs.adopted(name)
    written = posterior.energy.whole.view.write(posterior.params, posterior.gaussian)
    for key, value in posterior.params.items():
        torch.testing.assert_close(written[key], value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["MeanField", "AutoNormal", "AutoMultivariateNormal", "softplus with a floor"])
def test_single_precision(float32: None, name: str) -> None:
    posterior = guide_programs.adopted(name)
    asked = other(posterior.gaussian)
    written = posterior.energy.whole.view.write(posterior.params, asked)
    assert {value.dtype for value in written.values()} == {torch.float32}
    assert_law(posterior, written, asked, rtol=1e-5)


@pytest.mark.parametrize("name", DIAGONAL + FULL)
def test_reading_has_a_gradient(name: str) -> None:
    posterior = guide_programs.adopted(name)
    own = {key: value.clone().requires_grad_(True) for key, value in posterior.params.items()}
    gaussian = posterior.energy.whole.view.read(own)
    total = gaussian.entropy() + flatten(gaussian.loc).sum()
    found = torch.autograd.grad(total, list(own.values()))
    # Entropy moves with scales and not with locations, whose sum has gradient one.
    assert all(bool(value.any()) for value, key in zip(found, own, strict=True) if key != "scale_tril_unconstrained")
    assert not posterior.gaussian.entropy().requires_grad


def test_a_scale_that_the_guide_cannot_have() -> None:
    posterior = guide_programs.adopted("softplus with a floor")
    tiny = Gaussian(
        posterior.gaussian.loc, {name: value * 0 + 1e-5 for name, value in posterior.gaussian.scale.items()}
    )
    with pytest.raises(ValueError, match="cannot have standard deviations down to 1e-05"):
        posterior.energy.whole.view.write(posterior.params, tiny)


def test_a_matrix_is_no_diagonal() -> None:
    posterior = guide_programs.adopted("AutoNormal")
    with pytest.raises(TypeError, match="standard deviations by site, got a matrix"):
        posterior.energy.whole.view.write(posterior.params, Gaussian(posterior.gaussian.loc, torch.eye(3)))


def test_sites_in_plates() -> None:
    program = ADOPTED["groups"]()
    posterior = program.variational()
    shapes = {name: tuple(value.shape) for name, value in posterior.gaussian.loc.items()}
    assert shapes == {"centre": (), "spread": (), "level": (5,)}
    assert_law(posterior, posterior.params, posterior.gaussian)


def test_supports_of_other_shapes_than_their_coordinates() -> None:
    """A simplex of three entries has two coordinates, a correlation matrix of three rows three."""
    program = ADOPTED["every_support"]()
    posterior = program.variational()
    shapes = {name: tuple(value.shape) for name, value in posterior.gaussian.loc.items()}
    assert shapes == {"mix": (2,), "scale": (), "low": (), "factor": (3,)}
    assert_law(posterior, posterior.params, posterior.gaussian)
    values = {name: value + 0.1 for name, value in posterior.gaussian.loc.items()}
    latents, log_det = posterior.energy.whole.view.constrain(values)
    expected = torch.zeros(())
    for name, support in {"mix": constraints.simplex, "factor": constraints.corr_cholesky}.items():
        torch.testing.assert_close(latents[name], biject_to(support)(values[name]))
    for name, transform in posterior.energy.whole.view.transforms.items():
        expected = expected + transform.log_abs_det_jacobian(values[name], latents[name]).sum()
    torch.testing.assert_close(log_det, expected)


# --- guides by hand


def loc() -> Tensor:
    return pyro.param("loc", torch.tensor(-0.2))


def scale() -> Tensor:
    return pyro.param("scale", torch.tensor(-1.0)).exp()


def positive_site(fn: Callable[[], Any]) -> Gaussian | None:
    """How a guide of one positive site is seen."""

    def model(y: Tensor) -> None:
        spread = pyro.sample("spread", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, spread), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("spread", fn())

    y = regression()[1]
    guide(y)
    return VariationalPosterior(model, guide, Data(y)).gaussian


def transformed(*parts: Any) -> Callable[[], Any]:
    return lambda: dist.TransformedDistribution(dist.Normal(loc(), scale()), list(parts))


def test_a_log_normal_is_gaussian_in_its_logarithm() -> None:
    for fn in (lambda: dist.LogNormal(loc(), scale()), transformed(transforms.ExpTransform())):
        pyro.clear_param_store()
        found = positive_site(fn)
        torch.testing.assert_close(found.loc["spread"], torch.tensor(-0.2))
        torch.testing.assert_close(found.scale["spread"], torch.tensor(-1.0).exp())


@pytest.mark.parametrize(
    "fn",
    [
        transformed(transforms.SoftplusTransform()),
        transformed(transforms.ExpTransform(), transforms.AffineTransform(0.0, 2.0)),
        lambda: dist.Weibull(scale(), softplus(loc())),
        lambda: dist.LogNormal(loc(), 0.3),
        lambda: dist.LogNormal(0.0, scale()),
        lambda: dist.LogNormal(2 * loc(), scale()),
        lambda: dist.LogNormal(loc(), loc().exp() * scale()),
    ],
    ids=["softplus", "scaled", "Weibull", "fixed scale", "fixed loc", "a function of loc", "scale of loc"],
)
def test_other_distributions_of_a_positive_site_are_not(fn: Callable[[], Any]) -> None:
    """Through a bijection other than the support's, no Gaussian there; without parameters of its own, none to write."""
    assert positive_site(fn) is None


def two_sites(guide: Callable[..., None]) -> VariationalPosterior:
    def model(x: Tensor, y: Tensor) -> None:
        first = pyro.sample("first", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        second = pyro.sample("second", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ (first * 2 + second), 1.0), obs=y)

    guide(*regression())
    return VariationalPosterior(model, guide, Data(*regression()))


def normal(name: str, loc: str, scale: str, shift: float | Tensor = 0.0) -> Tensor:
    mean = pyro.param(loc, torch.tensor([0.1, 0.2])) + shift
    return pyro.sample(name, dist.Normal(mean, pyro.param(scale, torch.tensor([-1.0, -1.5])).exp()).to_event(1))


def test_two_sites_of_one_parameter_are_not_a_gaussian_of_their_own() -> None:
    assert two_sites(lambda x, y: (normal("first", "a", "s"), normal("second", "b", "t"))).gaussian is not None
    pyro.clear_param_store()
    assert two_sites(lambda x, y: (normal("first", "a", "s"), normal("second", "b", "s"))).gaussian is None
    pyro.clear_param_store()
    assert two_sites(lambda x, y: (normal("first", "a", "s"), normal("second", "a", "t"))).gaussian is None


def test_a_site_that_follows_another_is_no_gaussian_with_parameters() -> None:
    def guide(x: Tensor, y: Tensor) -> None:
        normal("second", "b", "t", shift=normal("first", "a", "s"))

    assert two_sites(guide).gaussian is None


def test_a_multivariate_normal_by_hand() -> None:
    def guide(x: Tensor, y: Tensor) -> None:
        tril = pyro.param("tril", torch.tensor([[0.3, 0.0], [0.2, 0.5]]), constraint=constraints.lower_cholesky)
        pyro.sample("w", dist.MultivariateNormal(pyro.param("loc", torch.ones(2)), scale_tril=tril))

    program = ADOPTED["positional"]()
    guide(*regression())
    posterior = VariationalPosterior(program.model, guide, program.data)
    torch.testing.assert_close(posterior.gaussian.scale, torch.tensor([[0.3, 0.0], [0.2, 0.5]]))
    asked = other(posterior.gaussian)
    assert_law(posterior, posterior.energy.whole.view.write(posterior.params, asked), asked)


# --- the class


def gaussian_of(kind: str) -> Gaussian:
    loc = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(-1.0)}
    if kind == "diagonal":
        return Gaussian(loc, {"a": torch.tensor([0.5, 2.0]), "b": torch.tensor(0.3)})
    return Gaussian(loc, torch.tensor([[0.5, 0.0, 0.0], [0.2, 0.7, 0.0], [-0.1, 0.3, 1.1]]))


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_a_gaussians_numbers(kind: str) -> None:
    gaussian = gaussian_of(kind)
    loc, scale = gaussian.flat()
    dense = torch.distributions.MultivariateNormal(loc, covariance(scale))
    factor = torch.diag(scale) if scale.ndim == 1 else scale
    torch.testing.assert_close(gaussian.entropy(), dense.entropy())
    torch.testing.assert_close(flatten(gaussian.variance), dense.variance)
    torch.testing.assert_close(gaussian.deviation("b"), dense.stddev[2])
    torch.testing.assert_close(gaussian.log_det(), factor.logdet())
    vector = {"a": torch.tensor([0.3, -1.0]), "b": torch.tensor(2.0)}
    flat = flatten(vector)
    torch.testing.assert_close(flatten(gaussian.root(vector)), factor @ flat)
    torch.testing.assert_close(flatten(gaussian.root_transposed(vector)), factor.T @ flat, rtol=1e-6, atol=1e-6)
    noise = torch.randn(4, 3)
    values = gaussian.at(noise)
    assert (values["a"].shape, values["b"].shape) == ((4, 2), (4,))
    rows = torch.cat([values["a"], values["b"][:, None]], -1)
    torch.testing.assert_close(rows, loc + noise @ factor.T)
