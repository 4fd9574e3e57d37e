"""Forgetting on LeNet-5 against time: the same contest as `benchmarks.paired`, whose steps cost more here.

Mean-field LeNet-5 on Fashion-MNIST framed to 32 x 32, fitted by hand-written Adam (2e-3, cosine decay, 10 epochs); the
first m images of class 0 are erased. The published recursion is run for the smaller request alone: its products are
those of a convolution under five draws.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import plain_lenet
from benchmarks.contest import Contest
from benchmarks.paired import compete, fashion_images
from benchmarks.plain_mlp import Rows
from pyro_forget.models import LeNet

PRIOR_STD, RATE, EPOCHS = 0.15, 2e-3, 10
TASKS = ((10_000, 500), (10_000, 942))
NUM_TEST, NUM_DRAWS = 1000, 10
LAYERS = ("conv1", "conv2", "linear1", "linear2", "linear3")

CONTEST = Contest(
    folder="networks-lenet",
    model=LeNet(prior_std=PRIOR_STD),
    sites=tuple(f"{layer}.{part}" for layer in LAYERS for part in ("weight", "bias")),
    fit=lambda rows, seed: plain_lenet.fit(rows, PRIOR_STD, RATE, EPOCHS, seed),
    fine_tune=lambda params, rows, rate, budget, seed: plain_lenet.fine_tune(
        params, rows, PRIOR_STD, rate, budget, seed
    ),
    predictive=lambda params, x: plain_lenet.predictive(params, x, NUM_DRAWS, 7),
    budgets=(0.5, 1, 2, 4, 8),
    rates=(5e-4, 1e-3, 2e-3),
    steps=(8, 16, 32, 64, 128),
    num_seeds=2,
    most_for_published=500,
)


def run(out: Path) -> None:
    """Measure, and write the table and the figure; nothing without the files of Fashion-MNIST at PYRO_FORGET_DATA."""
    found = fashion_images()
    if found is not None:
        most = max(num_data for num_data, _ in TASKS)
        everything, test = _framed(found[0][torch.arange(most)]), _framed(found[1][torch.arange(NUM_TEST)])
        compete(CONTEST, "paired_lenet", TASKS, everything, test, out)


def _framed(rows: Rows) -> Rows:
    """Images of 32 x 32, pixels in [-1/2, 1/2]."""
    return Rows(F.pad(rows.x.view(-1, 1, 28, 28), (2, 2, 2, 2)) - 0.5, rows.y)
