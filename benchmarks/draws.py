"""Draws of a logistic regression forget its worst rows, beside chains run again without them.

300 rows of 8 columns N(0, 1) scaled by 1 to 2, weights and labels drawn from the model, prior N(0, 1); the rows with
the worst margins go. Draws come from independent chains, so that a distance has no autocorrelation in it. Distance:
KL between Gaussians with the moments of the two clouds; its floor is that of a second set of chains.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import timed
from benchmarks.figures.draws import draw
from benchmarks.record import Table, number, write
from benchmarks.timing import machine, one_thread
from pyro_forget.data import Data
from pyro_forget.evaluation import moment_kl
from pyro_forget.forgetters.reweight import Reweight
from pyro_forget.forgetters.transport import Transport
from pyro_forget.importance import khat_threshold
from pyro_forget.models import LogisticRegression
from pyro_forget.outcome import Forgetter
from pyro_forget.posterior import SampledPosterior

SEEDS = range(5)
ERASED = (2, 10, 30, 100)
NUM_ROWS, NUM_COLUMNS = 300, 8
NUM_STEPS = 100
NUM_DRAWS = (2_000, 400)
CLOSE = 60.0  # nats · draws beyond the floor, which falls as 1 / draws: 0.03 of 2,000
METHODS: dict[str, Forgetter] = {
    "transport": Transport(),
    "common shift": Transport(shift_only=True),
    "weights alone (PSIS)": Reweight(),
}


@dataclass(frozen=True)
class Regression:
    """Logistic regression with prior N(0, 1), written by hand.

    Attributes:
        x: shape (row, column).
        sign: of each label, −1 or 1.
    """

    x: Tensor
    sign: Tensor

    @staticmethod
    def made(seed: int) -> "Regression":
        """Weights and labels drawn from the model."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(NUM_ROWS, NUM_COLUMNS, generator=generator) * torch.linspace(1, 2, NUM_COLUMNS)
        weights = torch.randn(NUM_COLUMNS, generator=generator)
        positive = torch.rand(NUM_ROWS, generator=generator) < (x @ weights).sigmoid()
        return Regression(x, torch.where(positive, 1.0, -1.0))

    def __getitem__(self, rows: Tensor) -> "Regression":
        return Regression(self.x[rows], self.sign[rows])

    def log_joint(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(log p, its gradient) of weights (chain, column)."""
        margins = (weights @ self.x.T) * self.sign
        value = torch.nn.functional.logsigmoid(margins).sum(-1) - 0.5 * weights.square().sum(-1)
        return value, ((-margins).sigmoid() * self.sign) @ self.x - weights

    def mode(self) -> tuple[Tensor, Tensor]:
        """(mode, Cholesky factor of the inverse Hessian there), by Newton's method."""
        weights = self.x.new_zeros(1, NUM_COLUMNS)
        for _ in range(30):
            spread = (self.x @ weights[0]).sigmoid()
            hessian = (self.x.T * (spread * (1 - spread))) @ self.x + torch.eye(NUM_COLUMNS)
            weights = weights + torch.linalg.solve(hessian, self.log_joint(weights)[1][0])
        return weights, torch.linalg.cholesky(torch.linalg.inv(hessian))

    def sampled(self, num_chains: int, seed: int) -> Tensor:
        """The last states of independent MALA chains, preconditioned by the Hessian at the mode; (chain, column)."""
        generator = torch.Generator().manual_seed(seed)
        mode, factor = self.mode()
        step = 1.36  # 1.65² d^(−1/3): accepts about 0.6

        def noise() -> Tensor:
            return torch.randn(num_chains, NUM_COLUMNS, generator=generator)

        def drift(gradient: Tensor) -> Tensor:
            return 0.5 * step * gradient @ factor @ factor.T

        state = mode + noise() @ factor.T
        value, gradient = self.log_joint(state)
        for _ in range(NUM_STEPS):
            moved = state + drift(gradient) + step**0.5 * noise() @ factor.T
            new_value, new_gradient = self.log_joint(moved)
            there = _squared(moved - state - drift(gradient), factor)
            back = _squared(state - moved - drift(new_gradient), factor)
            ratio = new_value - value + (there - back) / (2 * step)
            accept = torch.rand(num_chains, generator=generator).log() < ratio
            state = torch.where(accept[:, None], moved, state)
            value = torch.where(accept, new_value, value)
            gradient = torch.where(accept[:, None], new_gradient, gradient)
        return state


def _squared(moves: Tensor, factor: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, moves.T, upper=False).square().sum(0)


def records(seed: int, num_draws: int, erased: tuple[int, ...] = ERASED) -> Iterator[dict[str, Any]]:
    """One record a method and number of erased rows."""
    regression = Regression.made(seed)
    before, refit_seconds = timed(lambda: regression.sampled(num_draws, seed))
    data = Data(regression.x, (regression.sign > 0).double())
    posterior = SampledPosterior(LogisticRegression(NUM_COLUMNS), {"weight": before.reshape(4, -1, 8)}, data)
    order = ((regression.x @ before.mean(0)) * regression.sign).argsort()
    for count in erased:
        retained = regression[order[count:]]
        refits = [retained.sampled(num_draws, 100 * (seed + 1) + place) for place in range(2)]
        known = {
            "erased": count,
            "draws": num_draws,
            "seed": seed,
            "before": float(moment_kl(before, refits[0])),
            "floor": float(moment_kl(refits[1], refits[0])),
            "refit_seconds": refit_seconds,
        }
        for name, method in METHODS.items():
            yield known | {"method": name} | _forgotten(method, posterior, data, order[:count], refits[0])


def _forgotten(
    method: Forgetter, posterior: SampledPosterior, data: Data, erased: Tensor, refit: Tensor
) -> dict[str, Any]:
    edit, seconds = timed(lambda: method.edit(posterior, *data.split(erased)))
    after = edit.posterior
    weights = None if after.log_weights is None else after.log_weights.flatten()
    distance = moment_kl(after.params["weight"].flatten(0, 1), refit, weights)
    found = edit.evidence
    return {
        "after": float(distance),
        "khat": found.khat,
        "ess": found.ess,
        "passes": found.num_passes,
        "seconds": seconds,
        "refused": found.refused,
        "warnings": list(found.warnings),
    }


def says_no(record: dict[str, Any]) -> bool:
    """Whether k̂ or the effective sample size tells a reader not to rely on the weighted draws."""
    heavy = record["khat"] is None or record["khat"] > khat_threshold(record["draws"])
    return heavy or record["ess"] is None or record["ess"] < 0.5 * record["draws"]


def run(out: Path) -> None:
    """Measure, write the tables and draw the figure."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with one_thread():
            found = [record for size in NUM_DRAWS for seed in SEEDS for record in records(seed, size)]
    finally:
        torch.set_default_dtype(dtype)
    draw(found)
    tables = (_table([record for record in found if record["draws"] == size]) for size in NUM_DRAWS)
    write(out, "draws", found, "\n".join(map(str, tables)) + f"\n{machine(dtype='float64')}\n")


def _table(records: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for count in ERASED:
        for method in METHODS:
            own = [r for r in records if r["erased"] == count and r["method"] == method]
            beyond = max(r["after"] - r["floor"] for r in own)
            silent = sum(r["after"] - r["floor"] > CLOSE / r["draws"] and not says_no(r) for r in own)
            khats, sizes = [r["khat"] for r in own if r["khat"] is not None], [r["ess"] for r in own if r["ess"]]
            cells = [median(r["before"] for r in own), median(r["floor"] for r in own), median(r["after"] for r in own)]
            rows.append(
                [
                    f"{count}, {method}",
                    *(number(value, 2) for value in (*cells, beyond)),
                    number(max(khats, default=None), 2),
                    number(min(sizes, default=None), 4),
                    f"{sum(map(says_no, own))} of {len(own)}",
                    str(silent),
                    number(median(r["seconds"] for r in own), 2),
                ]
            )
    head = ["erased", "KL before", "floor", "after", "worst beyond the floor", "largest k̂", "least ESS"]
    return Table([f"{records[0]['draws']:,} draws: {head[0]}", *head[1:], "says no", "far and silent", "s"], rows)
