"""The price of Pyro: a stochastic gradient of a mean-field network, beside plain PyTorch and Pyro's own ELBOs."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

from benchmarks.record import Table, number, write
from benchmarks.timing import Race, devices, machine, one_thread, race
from pyro_forget.data import Data
from pyro_forget.energy import estimate_and_gradient
from pyro_forget.guides import MeanField, local_reparametrization
from pyro_forget.models import MLP
from pyro_forget.posterior import VariationalPosterior

WIDTHS = (784, 400, 400, 10)
PRIOR_STD = 0.1
BATCH, NUM_DATA = 128, 60_000
ROUNDS = 15
NOISES = ("per weight", "per datum")
PLAIN = "plain PyTorch, the same KL"
OURS = "pyro-forget"
Step = Callable[[], object]


def images(device: str) -> tuple[Tensor, Tensor]:
    """Made-up images and labels of one batch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, WIDTHS[0], generator=generator)
    return x.to(device), torch.randint(WIDTHS[-1], (BATCH,), generator=generator).to(device)


def plain(x: Tensor, y: Tensor, local: bool) -> Step:
    """The energy as one would write it for speed: weights by `addcmul`, the KL by dot products."""
    shapes = [shape for i, o in pairwise(WIDTHS) for shape in ((o, i), (o,))]
    locs = [(0.03 * torch.randn(shape, device=x.device)).requires_grad_() for shape in shapes]
    log_scales = [torch.full(shape, -3.0, device=x.device).requires_grad_() for shape in shapes]

    def step() -> tuple[Tensor, ...]:
        scales = [value.exp() for value in log_scales]
        energy = _divergence(locs, scales, log_scales) + NUM_DATA / BATCH * (_local if local else _drawn)(
            x, y, locs, scales
        )
        return torch.autograd.grad(energy, locs + log_scales)

    return step


def _divergence(locs: list[Tensor], scales: list[Tensor], log_scales: list[Tensor]) -> Tensor:
    terms = [
        0.5 / PRIOR_STD**2 * (torch.dot(loc.flatten(), loc.flatten()) + torch.dot(scale.flatten(), scale.flatten()))
        - log_scale.sum()
        for loc, scale, log_scale in zip(locs, scales, log_scales, strict=True)
    ]
    return torch.stack(terms).sum()


def _drawn(x: Tensor, y: Tensor, locs: list[Tensor], scales: list[Tensor]) -> Tensor:
    weights = [torch.addcmul(loc, scale, torch.randn_like(loc)) for loc, scale in zip(locs, scales, strict=True)]
    for place in range(0, len(weights), 2):
        x = F.linear(torch.relu(x) if place else x, weights[place], weights[place + 1])
    return F.cross_entropy(x, y, reduction="sum")


def _local(x: Tensor, y: Tensor, locs: list[Tensor], scales: list[Tensor]) -> Tensor:
    for place in range(0, len(locs), 2):
        x = torch.relu(x) if place else x
        mean = F.linear(x, locs[place], locs[place + 1])
        variance = F.linear(x * x, scales[place] * scales[place], scales[place + 1] * scales[place + 1])
        x = torch.addcmul(mean, (variance + 1e-12).sqrt(), torch.randn_like(mean))
    return F.cross_entropy(x, y, reduction="sum")


def ours(x: Tensor, y: Tensor, local: bool) -> Step:
    """The same through a Pyro model and guide."""
    model, data = _model(local), Data(x, y)
    posterior = VariationalPosterior.started(model, MeanField(model, init_scale=0.05), data)
    batch, seeds = next(data.batches()), iter(range(10**9))

    def step() -> Any:
        energy = posterior.energy.with_fresh_noise(next(seeds), 1)
        return estimate_and_gradient(energy, posterior.params, batch, NUM_DATA)

    return step


def elbo(x: Tensor, y: Tensor, local: bool, loss: Trace_ELBO) -> Step:
    """The gradient that Pyro's own estimator takes, without its validation."""
    model = _model(local)
    guide = MeanField(model, init_scale=0.05)
    guide(x, y)
    params = list(guide.parameters())

    def step() -> tuple[Tensor, ...]:
        with pyro.validation_enabled(False):
            return torch.autograd.grad(loss.differentiable_loss(model, guide, x, y), params)

    return step


def _model(local: bool) -> Callable[..., Any]:
    model = MLP(WIDTHS, PRIOR_STD)
    return local_reparametrization(model) if local else model


def measure(device: str, local: bool) -> Race:
    """All contenders on one batch, one draw of the weights each."""
    x, y = images(device)
    contenders = {
        PLAIN: plain(x, y, local),
        OURS: ours(x, y, local),
        "Pyro, TraceMeanField_ELBO": elbo(x, y, local, TraceMeanField_ELBO()),
        "Pyro, Trace_ELBO": elbo(x, y, local, Trace_ELBO()),
    }
    return race(contenders, device, ROUNDS)


def run(out: Path) -> None:
    """Measure, and write the table."""
    with one_thread():
        found = {
            f"{device}, {noise}": measure(device, noise == "per datum") for device in devices() for noise in NOISES
        }
    write(out, "overhead", {name: dict(result.seconds) for name, result in found.items()}, _text(found))


def _text(found: dict[str, Race]) -> str:
    head = ["", *(part for name in found for part in (f"{name}: ms", "ratio"))]
    names = next(iter(found.values())).seconds
    rows = [[name, *(cell for result in found.values() for cell in _cells(result, name))] for name in names]
    return f"{Table(head, rows)}\n{machine()}\n"


def _cells(result: Race, name: str) -> tuple[str, str]:
    return number(1e3 * result.median(name), 3), f"{result.ratio(name, PLAIN):.2f}"
