"""One step of stochastic-gradient MCMC through Pyro, beside plain PyTorch and the package posteriors.

A network 784-400-400-10 with priors N(0, 0.1²), batches of 128 of 10,000 rows. Every contender gathers its own random
batches, adds the prior's gradient, and draws fresh noise for every weight.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import Table, number, write
from benchmarks.timing import Race, devices, machine, one_thread, race
from pyro_forget.data import Data
from pyro_forget.inference.stochastic import PSGLD, SGHMC, SGLD, SGNHT, Rule, ScaleAdaptedSGHMC
from pyro_forget.inference.stochastic.chains import Chains
from pyro_forget.inference.stochastic.potential import potential_of
from pyro_forget.models import MLP

WIDTHS = (784, 400, 400, 10)
PRIOR_STD = 0.1
NUM_DATA, BATCH = 10_000, 128
STEP, FRICTION = 1e-6, 0.1
NUM_STEPS, NUM_CHAINS, ROUNDS = 5, 8, 15
PLAIN = "plain PyTorch"
Step = Callable[[], object]


def images(device: str) -> tuple[Tensor, Tensor]:
    """Made-up images and labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_DATA, WIDTHS[0], generator=generator)
    return x.to(device), torch.randint(WIDTHS[-1], (NUM_DATA,), generator=generator).to(device)


def batches(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Epochs of random batches."""
    while True:
        for rows in torch.randperm(len(x), device=x.device)[: len(x) // BATCH * BATCH].split(BATCH):
            yield x[rows], y[rows]


def logits(x: Tensor, weights: list[Tensor]) -> Tensor:
    """Of the network."""
    for place in range(0, len(weights), 2):
        x = F.linear(torch.relu(x) if place else x, weights[place], weights[place + 1])
    return x


def weights(device: str) -> list[Tensor]:
    """A draw from the prior."""
    shapes = [shape for i, o in pairwise(WIDTHS) for shape in ((o, i), (o,))]
    return [(PRIOR_STD * torch.randn(shape)).to(device) for shape in shapes]


def plain(x: Tensor, y: Tensor, momentum: bool) -> Step:
    """The loop as one writes it: `torch.optim.SGD`, the prior as weight decay, and noise on every weight."""
    params = [value.requires_grad_() for value in weights(str(x.device))]
    optimiser = torch.optim.SGD(params, STEP, momentum=1 - FRICTION if momentum else 0, weight_decay=PRIOR_STD**-2)
    source = batches(x, y)

    def step() -> None:
        inputs, labels = next(source)
        loss = NUM_DATA / BATCH * F.cross_entropy(logits(inputs, params), labels, reduction="sum")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for value in params:
                value.add_(torch.randn_like(value), alpha=sqrt(2 * STEP))

    return step


def rival(x: Tensor, y: Tensor, name: str) -> Step | None:
    """The package posteriors; None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import posteriors
    except ImportError:
        return None
    params = {str(place): value for place, value in enumerate(weights(str(x.device)))}

    def log_posterior(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        values = list(params.values())
        found = logits(batch[0], values)
        prior = sum(-0.5 * PRIOR_STD**-2 * torch.dot(value.flatten(), value.flatten()) for value in values)
        return prior - NUM_DATA / BATCH * F.cross_entropy(found, batch[1], reduction="sum"), found

    module = getattr(posteriors.sgmcmc, name)
    sampler = module.build(log_posterior, lr=STEP if name == "sgld" else sqrt(STEP))
    source, state = batches(x, y), [sampler.init(params)]

    def step() -> None:
        state[0], _ = sampler.update(state[0], next(source), inplace=True)

    return step


def ours(x: Tensor, y: Tensor, rule: Rule, num_chains: int = 1) -> Chains:
    """Chains of a Pyro model."""
    data = Data(x, y)
    return Chains(potential_of(MLP(WIDTHS, PRIOR_STD), data, num_chains=num_chains), rule, data)


def several(step: Step) -> Step:
    """So many steps in a row."""

    def run() -> None:
        for _ in range(NUM_STEPS):
            step()

    return run


def one_chain(device: str) -> Race:
    """SGLD and SGHMC beside their rivals, and what the other kernels cost."""
    x, y = images(device)
    rules: dict[str, Rule] = {
        "SGLD": SGLD(STEP, batch_size=BATCH),
        "SGHMC": SGHMC(STEP, FRICTION, batch_size=BATCH),
        "SGNHT": SGNHT(STEP, FRICTION, batch_size=BATCH),
        "pSGLD": PSGLD(STEP, batch_size=BATCH),
        "pSGLD, corrected": PSGLD(STEP, correction=True, batch_size=BATCH),
        "scale-adapted SGHMC": ScaleAdaptedSGHMC(1e-4, batch_size=BATCH),
    }
    steps: dict[str, Step | None] = {
        f"SGLD, {PLAIN}": plain(x, y, momentum=False),
        f"SGHMC, {PLAIN}": plain(x, y, momentum=True),
        "SGLD, posteriors": rival(x, y, "sgld"),
        "SGHMC, posteriors": rival(x, y, "sghmc"),
        **{name: ours(x, y, rule).step for name, rule in rules.items()},
    }
    return race({name: several(step) for name, step in steps.items() if step is not None}, device, ROUNDS)


def many_chains(device: str) -> Race:
    """Eight chains side by side, and one after another."""
    x, y = images(device)
    contenders: dict[str, Step] = {}
    for name, rule in {"SGLD": SGLD(STEP, batch_size=BATCH), "SGHMC": SGHMC(STEP, FRICTION, batch_size=BATCH)}.items():
        alone = [ours(x, y, rule) for _ in range(NUM_CHAINS)]
        contenders[f"{name}, one after another"] = several(lambda alone=alone: [chains.step() for chains in alone])
        contenders[f"{name}, side by side"] = several(ours(x, y, rule, NUM_CHAINS).step)
    return race(contenders, device, ROUNDS)


def run(out: Path) -> None:
    """Measure, and write the table."""
    with one_thread():
        found = {device: {"one": one_chain(device), "many": many_chains(device)} for device in devices()}
    values = {device: {key: dict(result.seconds) for key, result in races.items()} for device, races in found.items()}
    write(out, "stochastic", values, _text(found))


def _text(found: Mapping[str, Mapping[str, Race]]) -> str:
    parts = [f"{_one(device, races['one'])}\n{_many(device, races['many'])}" for device, races in found.items()]
    missing = "" if any("posteriors" in name for name in next(iter(found.values()))["one"].seconds) else _MISSING
    return "\n".join([*parts, f"{missing}{machine()}\n"])


_MISSING = "The package posteriors is not installed, so it is not among the rivals. "


def _one(device: str, result: Race) -> Table:
    rows = [[name, *_cells(result, name)] for name in result.seconds]
    return Table([f"{device}, one chain", "ms a step", "of plain SGLD", "of plain SGHMC"], rows)


def _cells(result: Race, name: str) -> tuple[str, str, str]:
    ratios = (f"{result.ratio(name, f'{rule}, {PLAIN}'):.2f}" for rule in ("SGLD", "SGHMC"))
    return (number(1e3 * result.median(name) / NUM_STEPS, 3), *ratios)  # type: ignore[return-value]


def _many(device: str, result: Race) -> Table:
    def cells(name: str) -> list[Any]:
        rival = f"{name.split(',')[0]}, one after another"
        return [name, number(1e3 * result.median(name) / NUM_STEPS, 3), f"{result.ratio(name, rival):.2f}"]

    head = [f"{device}, {NUM_CHAINS} chains", "ms a step of all", "of one after another"]
    return Table(head, [cells(name) for name in result.seconds])
