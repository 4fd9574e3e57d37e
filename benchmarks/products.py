"""Curvature products of LeNet: twenty Hessian products with their set-up, one Gauss-Newton product in gradients."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from curvlinops import HessianLinearOperator
from torch import Tensor, nn

from benchmarks.record import Table, number, write
from benchmarks.timing import Race, devices, machine, one_thread, race
from pyro_forget.curvature.gauss_newton import GaussNewton
from pyro_forget.curvature.hessian import Hessian
from pyro_forget.data import Data
from pyro_forget.energy import estimate_and_gradient
from pyro_forget.guides import MeanField
from pyro_forget.models import LeNet
from pyro_forget.params import Params, map_params, norm, scale
from pyro_forget.posterior import VariationalPosterior

BATCH, NUM_PRODUCTS = 512, 20
ROUNDS = 5
PLAIN, CURVLINOPS = "plain LeNet, double backward", "plain LeNet, curvlinops 3.0.1"
OURS = "mean-field LeNet through Pyro, "
GRADIENT, GAUSS_NEWTON = OURS + "gradient", OURS + "Gauss-Newton product"


class Operator(Protocol):
    """What has products."""

    def mv(self, vector: Params) -> Params: ...


def images(device: str) -> tuple[Tensor, Tensor]:
    """Made-up images and labels of one batch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 1, 32, 32, generator=generator)
    return x.to(device), torch.randint(10, (BATCH,), generator=generator).to(device)


def plain_lenet() -> nn.Module:
    """The network of `models.LeNet` in `torch.nn`."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


class DoubleBackward:
    """Each product differentiates the gradient anew: Pearlmutter's trick as it is usually written."""

    def __init__(self, network: nn.Module, x: Tensor, y: Tensor) -> None:
        self.network, self.x, self.y = network, x, y

    def mv(self, vector: Params) -> Params:
        params = list(self.network.parameters())
        loss = F.cross_entropy(self.network(self.x), self.y, reduction="sum")
        gradient = torch.autograd.grad(loss, params, create_graph=True)
        return dict(zip(vector, torch.autograd.grad(gradient, params, list(vector.values())), strict=True))


class Curvlinops:
    """curvlinops' operator, without its check of determinism."""

    def __init__(self, network: nn.Module, x: Tensor, y: Tensor) -> None:
        loss, params = nn.CrossEntropyLoss(reduction="sum"), list(network.parameters())
        self.operator = HessianLinearOperator(network, loss, params, [(x, y)], check_deterministic=False)

    def mv(self, vector: Params) -> Params:
        return dict(zip(vector, self.operator @ list(vector.values()), strict=True))


class Ours:
    """Our energy of a mean-field LeNet, one draw of the weights."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        model, self.data = LeNet(), Data.of((x, y), batch_size=BATCH)
        posterior = VariationalPosterior.started(model, MeanField(model, init_scale=0.05), self.data)
        self.energy, self.params = posterior.energy.with_fresh_noise(0, 1), posterior.params
        self.batch = next(self.data.batches())

    def hessian(self, mode: str) -> Operator:
        return Hessian(self.energy, self.params, self.data, mode)

    def gradient(self) -> Any:
        return estimate_and_gradient(self.energy, self.params, self.batch, BATCH)

    def gauss_newton(self) -> Callable[[], object]:
        gaussian = self.energy.read(self.params).detach()
        operator, vector = GaussNewton(self.energy.gaussian, gaussian, self.data), _like(gaussian.loc)
        return lambda: operator.mv(vector)


def solve(make: Callable[[], Operator], like: Params) -> Callable[[], Params]:
    """Set up an operator and take powers: every product hangs on the one before, as in a solver."""

    def run() -> Params:
        operator, vector = make(), _like(like)
        for _ in range(NUM_PRODUCTS):
            vector = map_params(Tensor.detach, operator.mv(vector))
            vector = scale(vector, 1 / norm(vector))
        return vector

    return run


def _like(params: Params) -> Params:
    generator = torch.Generator().manual_seed(1)
    return map_params(lambda value: torch.randn(value.shape, generator=generator).to(value), params)


def measure(device: str) -> tuple[Race, Race]:
    """(solves of twenty Hessian products, single gradients and Gauss-Newton products)."""
    x, y = images(device)
    network, ours = plain_lenet().to(device), Ours(x, y)
    like = {name: value.detach() for name, value in network.named_parameters()}
    solves = {
        PLAIN: solve(lambda: DoubleBackward(network, x, y), like),
        CURVLINOPS: solve(lambda: Curvlinops(network, x, y), like),
        **{
            f"{OURS}{mode}": solve(lambda mode=mode: ours.hessian(mode), ours.params)
            for mode in ("tape", "graph", "stream")
        },
    }
    single = {
        "plain LeNet, gradient": lambda: torch.autograd.grad(
            F.cross_entropy(network(x), y, reduction="sum"), list(network.parameters())
        ),
        GRADIENT: ours.gradient,
        GAUSS_NEWTON: ours.gauss_newton(),
    }
    return race(solves, device, ROUNDS), race(single, device, 3 * ROUNDS)


def run(out: Path) -> None:
    """Measure, and write the tables."""
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of linear_operator, which curvlinops imports
        found = {device: measure(device) for device in devices()}
    values = {device: {**solves.seconds, **single.seconds} for device, (solves, single) in found.items()}
    write(out, "products", values, _text(found))


def _text(found: dict[str, tuple[Race, Race]]) -> str:
    solves = {device: race for device, (race, _) in found.items()}
    single = {device: race for device, (_, race) in found.items()}
    head = ["20 Hessian products and their set-up", *_columns(found, "s", "of double backward", "of curvlinops")]
    first = Table(head, _rows(solves, 1.0, (PLAIN, CURVLINOPS)))
    second = Table(["one", *_columns(found, "ms", "gradients")], _rows(single, 1e3, (GRADIENT,)))
    return f"{first}\n{second}\n{machine()}\n"


def _columns(found: dict[str, Any], *names: str) -> list[str]:
    return [f"{device}: {name}" for device in found for name in names]


def _rows(found: dict[str, Race], unit: float, rivals: tuple[str, ...]) -> list[list[str]]:
    names = next(iter(found.values())).seconds
    return [
        [name, *(cell for result in found.values() for cell in _cells(result, name, unit, rivals))] for name in names
    ]


def _cells(result: Race, name: str, unit: float, rivals: tuple[str, ...]) -> list[str]:
    return [number(unit * result.median(name), 3), *(f"{result.ratio(name, rival):.2f}" for rival in rivals)]
