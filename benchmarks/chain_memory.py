"""Memory of sampling, and of forgetting from draws, against the number of draws that there are."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import typer
from torch import Tensor

from benchmarks.memory import ProcessMemory
from benchmarks.record import Table, number, write
from benchmarks.timing import machine
from pyro_forget.data import Data
from pyro_forget.forgetters import MoreSteps, PairedDescent, PublishedChain, Transport
from pyro_forget.forgetting import forget
from pyro_forget.inference.recursion import Recursion
from pyro_forget.inference.stochastic import SGLD, sample_posterior
from pyro_forget.models import MLP, LogisticRegression
from pyro_forget.outcome import Forgetter
from pyro_forget.posterior import SampledPosterior

NUM_ROWS, WIDTHS, NUM_ERASED = 10_000, (784, 128, 10), 100
NUM_ROWS_REGRESSION, NUM_COLUMNS = 2_000, 20
FIT_STEPS, SPREAD = 300, 0.01
RULE = SGLD(1e-7)

# What is measured; it returns the bytes of what it leaves in memory.
Work = Callable[[], int]


def sampling(num_draws: int) -> Work:
    """Draws of the network, to disk."""
    x, y = images()

    def work() -> int:
        with tempfile.TemporaryDirectory() as folder:
            options = {"num_chains": 1, "warmup": 20, "progress": False}
            sample_posterior(MLP(WIDTHS), RULE, Data(x, y), store=folder, num_samples=num_draws, **options)  # type: ignore[arg-type]
        return 0

    return work


@dataclass(frozen=True)
class Network:
    """A request of a hundred images to made-up draws around a fit of the network; `whole`: with what `forget` adds."""

    forgetter: Forgetter
    whole: bool = False

    def __call__(self, num_draws: int) -> Work:
        """The request to so many draws."""
        x, y = images()
        model, data = MLP(WIDTHS), Data(x, y)
        draws = {name: around(value, num_draws) for name, value in fitted(x, y).items()}
        return requested(SampledPosterior(model, draws, data), data, self.forgetter, self.whole)


def regression(num_draws: int) -> Work:
    """A request of a hundred rows to draws around the mode of a logistic regression."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_ROWS_REGRESSION, NUM_COLUMNS, generator=generator)
    y = (torch.rand(NUM_ROWS_REGRESSION, generator=generator) < (x.sum(1) / 4).sigmoid()).float()
    weight = torch.zeros(NUM_COLUMNS)
    for _ in range(20):
        mean = (x @ weight).sigmoid()
        hessian = (x.T * (mean * (1 - mean))) @ x + torch.eye(NUM_COLUMNS)
        weight = weight + torch.linalg.solve(hessian, x.T @ (y - mean) - weight)
    noise = torch.randn(num_draws, NUM_COLUMNS, generator=generator)
    draws = weight + noise @ torch.linalg.cholesky(torch.linalg.inv(hessian)).T
    data = Data(x, y)
    return requested(
        SampledPosterior(LogisticRegression(NUM_COLUMNS), {"weight": draws[None]}, data), data, Transport()
    )


CHAIN = PublishedChain(RULE, Recursion(0.005, num_steps=4), num_draws=20, progress=False)
CASES: dict[str, tuple[Callable[[int], Work], tuple[int, int]]] = {
    "sample_posterior, MLP": (sampling, (100, 1_000)),
    "PairedDescent, MLP": (Network(PairedDescent()), (20, 100)),
    "the same, with the report of forget": (Network(PairedDescent(), whole=True), (20, 100)),
    "PairedDescent, draw by draw, MLP": (Network(PairedDescent(num_steps=4, jointly=False)), (20, 100)),
    "MoreSteps, MLP": (Network(MoreSteps(RULE, 5, progress=False)), (20, 100)),
    "PublishedChain, MLP": (Network(CHAIN), (20, 100)),
    "Transport, logistic regression": (regression, (500, 5_000)),
}


def requested(posterior: SampledPosterior, data: Data, forgetter: Forgetter, whole: bool = False) -> Work:
    """One request of rows from all over the data."""
    erased, retained = data.split(torch.arange(0, len(data), len(data) // NUM_ERASED)[:NUM_ERASED])

    def work() -> int:
        if whole:
            found = forget(posterior, erased, retained, forgetter)[0]
        else:
            edit = forgetter.edit(posterior, erased, retained)
            if edit.evidence.refused:
                raise RuntimeError(f"Nothing to measure, the request was refused: {edit.evidence.refused}")
            found = edit.posterior
        kept = [*found.params.values(), getattr(found, "log_weights", None)]
        return sum(value.nbytes for value in kept if value is not None)

    return work


def images() -> tuple[Tensor, Tensor]:
    """Noise, with labels that a network can learn."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_ROWS, WIDTHS[0], generator=generator)
    return x, (x @ torch.randn(WIDTHS[0], WIDTHS[-1], generator=generator)).argmax(1)


def fitted(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The network's weights after a few steps of Adam; by site."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for place, (width, units) in enumerate(pairwise(WIDTHS)):
        found[f"layer{place}.weight"] = 0.05 * torch.randn(units, width, generator=generator)
        found[f"layer{place}.bias"] = torch.zeros(units)
    leaves = [value.requires_grad_() for value in found.values()]
    optimiser = torch.optim.Adam(leaves, 2e-3)
    for _ in range(FIT_STEPS):
        rows = torch.randint(len(x), (256,), generator=generator)
        hidden = (x[rows] @ leaves[0].T + leaves[1]).relu()
        loss = torch.nn.functional.cross_entropy(hidden @ leaves[2].T + leaves[3], y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {name: value.detach() for name, value in found.items()}


def around(value: Tensor, num_draws: int) -> Tensor:
    """(1, draw, *site)."""
    noise = torch.randn(1, num_draws, *value.shape, generator=torch.Generator().manual_seed(2))
    return noise.mul_(SPREAD).add_(value)


def measured(name: str, num_draws: int) -> dict[str, float]:
    """MiB at the peak, beyond what is there before and what is left: resident, and by torch's own record."""
    work = CASES[name][0](num_draws)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _resident("VmRSS")
    left = work()
    resident = _resident("VmHWM") - before
    watch = ProcessMemory()
    work()
    return {"torch": watch.peak() - left / 2**20, "resident": resident - left / 2**20, "left": left / 2**20}


def _resident(name: str) -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def fresh(name: str, num_draws: int) -> dict[str, float]:
    """`measured` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.chain_memory", name, str(num_draws)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run(out: Path) -> None:
    """Measure, and write the table."""
    found = {name: {str(count): fresh(name, count) for count in counts} for name, (_, counts) in CASES.items()}
    write(out, "chain_memory", found, _text(found))


def _text(found: dict[str, dict[str, dict[str, float]]]) -> str:
    head = ["MiB at the peak", "draws", "allocated", "ratio", "resident", "ratio", "MiB of the result"]
    rows = []
    for name, by_count in found.items():
        few, many = by_count.values()
        cells = [f"{int(few):,} → {int(many):,}" for few, many in [tuple(by_count)]]
        for kind in ("torch", "resident"):
            cells += [f"{number(few[kind], 3)} → {number(many[kind], 3)}", f"{many[kind] / few[kind]:.2f}"]
        rows.append([name, *cells, f"{number(few['left'], 2)} → {number(many['left'], 2)}"])
    return f"{Table(head, rows)}\n{machine()}\n"


def main(name: str, num_draws: int) -> None:
    """One measurement, for `fresh`."""
    torch.set_num_threads(1)
    print(json.dumps(measured(name, num_draws)))


if __name__ == "__main__":
    typer.run(main)
