"""Guides of every kind that people fit, over one regression with a real vector and a positive scale."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.optim import Adam
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyro_forget.data import Data
from pyro_forget.guides import MeanField
from pyro_forget.posterior import VariationalPosterior
from tests.programs import regression

Guide = Callable[..., Any]
NAMES = ("weight", "noise")


def model(x: Tensor, y: Tensor | None = None) -> Tensor:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfCauchy(1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ weight, noise), obs=y)


def data() -> Data:
    return Data(*regression())


def first_run(guide: Guide) -> Guide:
    """What the first step of SVI does, and parameters that are nobody's defaults."""
    guide(*regression())
    moved = list(guide.parameters()) if isinstance(guide, torch.nn.Module) else pyro.get_param_store()._params.values()
    with torch.no_grad():
        for value in moved:
            value.add_(0.1 * torch.randn_like(value))
    return guide


def guide_list(first: Guide, second: Guide) -> Guide:
    guide = AutoGuideList(model)
    guide.append(first)
    guide.append(second)
    return guide


def normal_and_point() -> Guide:
    parts = [poutine.block(model, expose=[name]) for name in NAMES]
    return guide_list(AutoNormal(parts[0]), AutoDelta(parts[1]))


def normal_and_function() -> Guide:
    def noise(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("noise", dist.LogNormal(pyro.param("noise_loc", torch.tensor(-0.2)), 0.3))

    return guide_list(AutoNormal(poutine.block(model, expose=["weight"])), noise)


def laplace_converted() -> Guide:
    """At a fit: elsewhere the Hessian has no Cholesky factor."""
    guide = AutoLaplaceApproximation(model)
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(60):
        svi.step(*regression())
    return guide.laplace_approximation(*regression())


def function(scale_of: Callable[[str, Tensor], Tensor]) -> Guide:
    """A hand-written guide with scales made in one way or another from a parameter of this name and start."""

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        loc = pyro.param("weight_loc", torch.tensor([0.3, 0.8]))
        pyro.sample("weight", dist.Normal(loc, scale_of("weight_scale", torch.tensor([-1.0, -2.0]))).to_event(1))
        loc = pyro.param("noise_loc", torch.tensor(-0.2))
        pyro.sample("noise", dist.LogNormal(loc, scale_of("noise_scale", torch.tensor(-1.5))))

    return guide


def function_exp() -> Guide:
    return function(lambda name, start: pyro.param(name, start).exp())


def function_half_exp() -> Guide:
    return function(lambda name, start: (0.5 * pyro.param(name, start)).exp())


def function_softplus() -> Guide:
    return function(lambda name, start: softplus(pyro.param(name, start)))


def function_softplus_floor() -> Guide:
    return function(lambda name, start: softplus(pyro.param(name, start)) + 1e-3)


def function_positive() -> Guide:
    """Pyro's tutorial."""
    return function(lambda name, start: pyro.param(name, start.exp(), constraint=constraints.positive))


def function_tied() -> Guide:
    """One scale for all: no Gaussian that could be written back."""
    return function(lambda name, start: pyro.param("scale", torch.tensor(-1.0)).exp().expand(start.shape))


def function_gamma() -> Guide:
    """Randomness other than Normals."""

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("weight", dist.Normal(pyro.param("loc", torch.tensor([0.3, 0.8])), 0.2).to_event(1))
        shape = pyro.param("shape", torch.tensor(5.0), constraint=constraints.positive)
        pyro.sample("noise", dist.Gamma(shape, 4.0))

    return guide


class Mixed(PyroModule):
    """Parameters of a module, plain ones in submodules, and one in the store."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = PyroParam(torch.tensor([0.3, 0.1]), constraints.positive)
        self.head = torch.nn.Linear(1, 2)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("weight", dist.Normal(self.head(torch.ones(1)), self.scale).to_event(1))
        pyro.sample("noise", dist.LogNormal(pyro.param("noise_loc", torch.tensor(-0.2)), 0.3))


class Own(PyroModule):
    """Everything in the module, its scales by PyroParam, its locations plain."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_loc = torch.nn.Parameter(torch.tensor([0.3, 0.8]))
        self.weight_scale = PyroParam(torch.tensor([0.3, 0.1]), constraints.positive)
        self.noise_loc = torch.nn.Parameter(torch.tensor(-0.2))
        self.noise_scale = PyroParam(torch.tensor(0.2), constraints.positive)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("weight", dist.Normal(self.weight_loc, self.weight_scale).to_event(1))
        pyro.sample("noise", dist.LogNormal(self.noise_loc, self.noise_scale))


class Samples(PyroModule):
    """Latents as attributes: the names of parameters and latents both come from the module's."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = PyroParam(torch.tensor([0.3, 0.8]))
        self.weight = PyroSample(lambda self: dist.Normal(self.loc, 0.2).to_event(1))
        self.spread = PyroParam(torch.tensor(0.2), constraints.positive)
        self.noise = PyroSample(lambda self: dist.LogNormal(-0.2, self.spread))

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.weight, self.noise


GUIDES: dict[str, Callable[[], Guide]] = {
    "MeanField": lambda: MeanField(model),
    "AutoNormal": lambda: AutoNormal(model),
    "AutoDiagonalNormal": lambda: AutoDiagonalNormal(model),
    "AutoMultivariateNormal": lambda: AutoMultivariateNormal(model),
    "AutoLowRank": lambda: AutoLowRankMultivariateNormal(model, rank=1),
    "AutoDelta": lambda: AutoDelta(model),
    "AutoStructured": lambda: AutoStructured(model),
    "AutoGaussian": lambda: AutoGaussian(model),
    "AutoGuideList": normal_and_point,
    "AutoGuideList of a function": normal_and_function,
    "AutoIAFNormal": lambda: AutoIAFNormal(model),
    "AutoLaplace": lambda: AutoLaplaceApproximation(model),
    "AutoLaplace converted": laplace_converted,
    "exp": function_exp,
    "half exp": function_half_exp,
    "softplus": function_softplus,
    "softplus with a floor": function_softplus_floor,
    "positive": function_positive,
    "tied": function_tied,
    "gamma": function_gamma,
    "PyroModule": Own,
    "PyroModule with a store": Mixed,
    "PyroSample": Samples,
}
POINTS = {"AutoDelta", "AutoLaplace"}
# Pyro's module-local parameters know neither `pyro.param` in a module nor, in SVI, plain `nn.Parameter`s.
ELSEWHERE = {"AutoGuideList of a function", "PyroModule with a store", "AutoLaplace converted"}
LOCAL_PARAMS = [name for name in GUIDES if name[0].isupper() and name not in ELSEWHERE]


def fitted(name: str) -> Guide:
    return first_run(GUIDES[name]())


def adopted(name: str) -> VariationalPosterior:
    return VariationalPosterior(model, fitted(name), data())
