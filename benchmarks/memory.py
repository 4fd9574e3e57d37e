"""Memory of one request against the number of data: a peak that does not grow, and splits that copy nothing."""

import json
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks.record import Table, number, write
from benchmarks.timing import machine
from pyro_forget.data import Data
from pyro_forget.forgetters.influence import Influence
from pyro_forget.forgetting import forget
from pyro_forget.guides import MeanField, local_reparametrization
from pyro_forget.models import MLP, SoftmaxRegression
from pyro_forget.posterior import VariationalPosterior

SIZES = (10_000, 60_000)
BATCH, NUM_ERASED, NUM_PRODUCTS = 512, 100, 3
MODELS = {"softmax regression, 784-10": (784, 10), "MLP, 784-32-10": (784, 32, 10)}


def request(widths: tuple[int, ...], num_data: int, device: str) -> float:
    """MiB that one request takes at its peak, beyond what is there before it: model, posterior and data."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(num_data, widths[0], generator=generator), torch.randint(10, (num_data,), generator=generator)
    model = local_reparametrization(MLP(widths) if len(widths) > 2 else SoftmaxRegression(*widths))
    data = Data.of((x.to(device), y.to(device)), batch_size=BATCH)
    posterior = VariationalPosterior.started(model, MeanField(model, init_scale=0.1), data)
    erased, retained = data.split(torch.arange(0, num_data, num_data // NUM_ERASED)[:NUM_ERASED])
    watch = _Device() if device == "cuda" else ProcessMemory()
    forget(posterior, erased, retained, Influence(max_sweeps=1, num_products=NUM_PRODUCTS), throw=False)
    return watch.peak()


class ProcessMemory:
    """Memory that torch takes on the CPU, from its own record of every allocation.

    The resident memory of the process would not do: what an earlier request gave back is often kept by the allocator,
    and hides the next one's peak.
    """

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()

    def peak(self) -> float:
        """MiB since the start."""
        self._profile.__exit__(None, None, None)
        events = self._profile.profiler.kineto_results.events()
        moves = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        return max(accumulate(size for _, size in moves)) / 2**20


class _Device:
    """Memory that torch holds on the GPU."""

    def __init__(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def peak(self) -> float:
        """MiB since the start."""
        return (torch.cuda.max_memory_allocated() - self._before) / 2**20


def fresh(model: str, num_data: int, device: str) -> float:
    """`request` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", model, str(num_data), "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def run(out: Path) -> None:
    """Measure, and write the table."""
    found = {
        f"{model}, {device}": {size: fresh(model, size, device) for size in SIZES}
        for model in MODELS
        for device in (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
    }
    write(out, "memory", {name: {str(n): peak for n, peak in row.items()} for name, row in found.items()}, _text(found))


def _text(found: dict[str, dict[int, float]]) -> str:
    head = ["MiB at the peak, beyond the data", *(f"N = {size:,}" for size in SIZES), "ratio"]
    rows = [
        [name, *(number(p, 3) for p in row.values()), f"{row[SIZES[-1]] / row[SIZES[0]]:.2f}"]
        for name, row in found.items()
    ]
    return f"{Table(head, rows)}\n{machine()}\n"


def main(model: str, num_data: int, device: Annotated[str, typer.Option()] = "cpu") -> None:
    """One request, for `fresh`."""
    torch.set_num_threads(1)
    print(json.dumps(request(MODELS[model], num_data, device)))


if __name__ == "__main__":
    typer.run(main)
