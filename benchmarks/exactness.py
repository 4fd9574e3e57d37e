"""Linear-Gaussian models, whose answers are known: forgetting in one sweep against the conjugate posterior."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import autoguide
from torch import Tensor

from benchmarks.record import Table, number, write
from pyro_forget.data import Data
from pyro_forget.forgetters.influence import Influence
from pyro_forget.forgetters.transport import Transport
from pyro_forget.gaussian import Gaussian
from pyro_forget.guides import MeanField
from pyro_forget.models import LinearRegression
from pyro_forget.posterior import SampledPosterior, VariationalPosterior

NUM_ROWS, NUM_COLUMNS, NOISE_STD = 60, 5, 0.7
ERASED = (1, 7, 40)
GUIDES = {"MeanField": MeanField, "AutoMultivariateNormal": autoguide.AutoMultivariateNormal}
SEEDS = range(5)
NUM_DRAWS = 4000
LOCATION, COVARIANCE = 1e-8, 1e-10


@dataclass(frozen=True)
class Conjugate:
    """y ~ N(x·w, noise_std²) with w ~ N(0, 1), and its posterior.

    Attributes:
        x: shape (row, column).
        y: shape (row,).
    """

    x: Tensor
    y: Tensor

    @staticmethod
    def made(seed: int) -> "Conjugate":
        """Columns of standard deviations ½ to 2; the first seven rows are outliers, so erasing them matters."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(NUM_ROWS, NUM_COLUMNS, generator=generator) * torch.linspace(0.5, 2, NUM_COLUMNS)
        y = x @ torch.randn(NUM_COLUMNS, generator=generator) + NOISE_STD * torch.randn(NUM_ROWS, generator=generator)
        y[:7] += 5
        return Conjugate(x, y)

    def without(self, erased: Tensor) -> "Conjugate":
        """The other rows."""
        kept = torch.ones(len(self.y), dtype=torch.bool)
        kept[erased] = False
        return Conjugate(self.x[kept], self.y[kept])

    @property
    def precision(self) -> Tensor:
        """Of the posterior, (column, column)."""
        return torch.eye(NUM_COLUMNS) + self.x.T @ self.x / NOISE_STD**2

    @property
    def mean(self) -> Tensor:
        """Of the posterior, (column,)."""
        return torch.linalg.solve(self.precision, self.x.T @ self.y / NOISE_STD**2)

    def best(self, full: bool) -> Gaussian:
        """The best Gaussian of a family: with full covariance exact, with independent weights 1/√diag(precision)."""
        scale = torch.linalg.cholesky(torch.linalg.inv(self.precision))
        return Gaussian({"weight": self.mean}, scale if full else {"weight": self.precision.diagonal().rsqrt()})


def guides(seed: int) -> Iterator[dict[str, Any]]:
    """One record a guide and number of erased rows: the largest errors of location and covariance after one sweep."""
    problem = Conjugate.made(seed)
    data = Data(problem.x, problem.y)
    for name, make in GUIDES.items():
        fit = _exact_fit(make, problem, data)
        for count in ERASED:
            erased = torch.arange(count)
            after = _forget(fit, data, erased)
            location, covariance = _errors(after, problem.without(erased))
            first, second = erased[: count // 2], erased[count // 2 :]
            orders = [_forget(_forget(fit, data, a), data, b) for a, b in ((first, second), (second, first)) if len(a)]
            gaps = [max(_gap(after, other)) for other in orders]
            yield {
                "guide": name,
                "erased": count,
                "seed": seed,
                "location": location,
                "covariance": covariance,
                "order": max(gaps, default=None),
            }


def _exact_fit(make: Any, problem: Conjugate, data: Data) -> VariationalPosterior:
    pyro.clear_param_store()
    model = LinearRegression(NUM_COLUMNS, noise_std=NOISE_STD)
    started = VariationalPosterior.started(model, make(model), data)
    best = problem.best(full=not started.gaussian.is_diagonal)
    return started.with_params(started.energy.whole.view.write(started.params, best))


def _forget(posterior: VariationalPosterior, data: Data, erased: Tensor) -> VariationalPosterior:
    """In one sweep."""
    left, _ = data.split(posterior.ids)
    return Influence(max_sweeps=1).edit(posterior, *left.split(erased)).posterior


def _errors(posterior: VariationalPosterior, exact: Conjugate) -> tuple[float, float]:
    """Largest errors of location and covariance."""
    found, best = posterior.gaussian, exact.best(full=not posterior.gaussian.is_diagonal)
    location = (found.loc["weight"] - best.loc["weight"]).abs().max()
    return float(location), float((_covariance(found) - _covariance(best)).abs().max())


def _gap(first: VariationalPosterior, second: VariationalPosterior) -> tuple[float, float]:
    mine, theirs = first.gaussian, second.gaussian
    location = (mine.loc["weight"] - theirs.loc["weight"]).abs().max()
    return float(location), float((_covariance(mine) - _covariance(theirs)).abs().max())


def _covariance(gaussian: Gaussian) -> Tensor:
    scale = gaussian.flat()[1]
    return torch.diag(scale.square()) if scale.ndim == 1 else scale @ scale.T


def draws(seed: int) -> Iterator[dict[str, Any]]:
    """Draws of the conjugate posterior: the error of the mean beside its Monte Carlo error, in standard deviations."""
    problem = Conjugate.made(seed)
    noise = torch.randn(NUM_DRAWS, NUM_COLUMNS, generator=torch.Generator().manual_seed(seed))
    factor = problem.best(full=True).scale
    cloud = (problem.mean + noise @ factor.T).reshape(4, -1, NUM_COLUMNS)
    data = Data(problem.x, problem.y)
    posterior = SampledPosterior(LinearRegression(NUM_COLUMNS, noise_std=NOISE_STD), {"weight": cloud}, data)
    for count in ERASED:
        erased = torch.arange(count)
        after = Transport().edit(posterior, *data.split(erased)).posterior
        exact = problem.without(erased)
        weights = torch.full((NUM_DRAWS,), 1.0 / NUM_DRAWS) if after.log_weights is None else after.log_weights.exp()
        mean = weights.flatten() @ after.params["weight"].flatten(0, 1)
        whitened = torch.linalg.solve_triangular(exact.best(full=True).scale, (mean - exact.mean)[:, None], upper=False)
        # √(‖z‖²/d): 1 where the error is that of as many independent draws.
        error = float(whitened.square().mean().sqrt()) * NUM_DRAWS**0.5
        yield {"erased": count, "seed": seed, "error": error}


def run(out: Path) -> None:
    """Measure in float64, and write the tables."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = {"guides": [r for s in SEEDS for r in guides(s)], "draws": [r for s in SEEDS for r in draws(s)]}
    finally:
        torch.set_default_dtype(before)
    write(out, "exactness", found, _text(found))


def _text(found: dict[str, list[dict[str, Any]]]) -> str:
    def worst(name: str, **wanted: Any) -> str:
        rows = [r for kind in found.values() for r in kind if all(r.get(k) == v for k, v in wanted.items())]
        return number(max((r[name] for r in rows if r.get(name) is not None), default=None))

    head = ["guide", "erased of 60", "location", "covariance", "A then B, B then A, A ∪ B"]
    rows = [
        [guide, str(count), *(worst(name, guide=guide, erased=count) for name in ("location", "covariance", "order"))]
        for guide in GUIDES
        for count in ERASED
    ]
    errors = Table(
        ["draws, erased of 60", "error of the mean / Monte Carlo error"],
        [[str(count), worst("error", erased=count)] for count in ERASED],
    )
    return f"{Table(head, rows)}\n{errors}"
