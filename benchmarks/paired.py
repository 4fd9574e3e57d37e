"""Forgetting on networks against time: paired descent, the output layer alone, fine-tuning, the published recursion.

Mean-field networks 784-128-10 on Fashion-MNIST, fitted by hand-written Adam (2e-3, cosine decay, 40 epochs); the first
m images of class 0 are erased. How results are compared stands in `benchmarks.contest`.
"""

import os
from pathlib import Path

import torch

from benchmarks import plain_mlp
from benchmarks.contest import Contest, records, table, task
from benchmarks.plain_mlp import Rows
from benchmarks.record import write
from benchmarks.timing import machine, one_thread
from experiments.images import read_idx
from pyro_forget.models import MLP

WIDTHS, PRIOR_STD, RATE, EPOCHS = (784, 128, 10), 0.1, 2e-3, 40
TASKS = ((10_000, 200), (10_000, 500), (10_000, 942), (60_000, 500))
NUM_TEST, NUM_DRAWS = 2000, 50

CONTEST = Contest(
    folder="networks",
    model=MLP(WIDTHS, PRIOR_STD),
    sites=("layer0.weight", "layer0.bias", "layer1.weight", "layer1.bias"),
    fit=lambda rows, seed: plain_mlp.fit(rows, WIDTHS, PRIOR_STD, RATE, EPOCHS, seed),
    fine_tune=lambda params, rows, rate, budget, seed: plain_mlp.fine_tune(params, rows, PRIOR_STD, rate, budget, seed),
    predictive=lambda params, x: plain_mlp.predictive(params, x, NUM_DRAWS, 7),
    budgets=(0.1, 0.2, 0.4, 0.8, 1.5),
    rates=(5e-4, 1e-3, 2e-3),
    steps=(8, 16, 32, 48, 64, 96, 128, 256, 400),
)


def run(out: Path) -> None:
    """Measure, and write the table and the figure; nothing without the files of Fashion-MNIST at PYRO_FORGET_DATA."""
    found = fashion_images()
    if found is not None:
        everything, test = found
        compete(CONTEST, "paired", TASKS, everything, test[torch.arange(NUM_TEST)], out)


def compete(
    contest: Contest, name: str, tasks: tuple[tuple[int, int], ...], everything: Rows, test: Rows, out: Path
) -> None:
    """Measure all requests, (rows, erased) each, and write NAME's table and figure."""
    from benchmarks.figures import paired as figure

    with one_thread():
        found = []
        for num_data, num_erased in tasks:
            one = task(contest, everything[torch.arange(num_data)], test, num_erased, out)
            found += list(records(num_data, num_erased, one))
    write(out, name, found, f"{table(found)}\n{machine()}\n")
    figure.draw(found, name)


def fashion_images() -> tuple[Rows, Rows] | None:
    """Fashion-MNIST's (images to fit, images to test), flat, pixels in [0, 1]; None where there are no files."""
    folder = os.environ.get("PYRO_FORGET_DATA")
    if folder is None:
        print("PYRO_FORGET_DATA does not name a folder of data sets: nothing measured.")
        return None
    return _images(Path(folder), "train"), _images(Path(folder), "t10k")


def _images(folder: Path, kind: str) -> Rows:
    raw = folder / "FashionMNIST" / "raw"
    x, y = (read_idx(raw / f"{kind}-{part}.gz") for part in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    return Rows(x.flatten(1).float() / 255, y.long())
