"""Part two: draws of a posterior, and the ten data that it explains worst."""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pyro.infer import MCMC, NUTS
from sklearn.datasets import load_breast_cancer
from torch import Tensor

from pyro_forget.cli.comparison import METHOD_UNITS, Fitted, Request, compare, export
from pyro_forget.cli.progress import Progress
from pyro_forget.cli.study import Study
from pyro_forget.data import Data
from pyro_forget.forgetters.finetune import Finetune
from pyro_forget.forgetters.transport import Transport
from pyro_forget.inference.recursion import Recursion
from pyro_forget.outcome import Forgetter
from pyro_forget.posterior import Posterior, SampledPosterior

_NUM_COLUMNS = 8
_TEST_EVERY = 5
_SCALINGS = (1.0, 3.0, 10.0)

_TITLE = "Breast cancer: the {num_erased} worst-explained data are withdrawn"
_DESCRIPTION = (
    "Bayesian logistic regression on scikit-learn's breast-cancer data ({num_data} data to fit, {num_test} to test, "
    "the first 8 columns standardised and an intercept, priors N(0, 1)), sampled by Pyro's NUTS: {num_chains} chains "
    "of {num_draws:,} draws. The {num_erased} data with the lowest predictive density are withdrawn. All chains, also "
    "those of both refits, start from different initial values. Distance: KL between Gaussians with the moments of the "
    "draws, from a posterior to the refit."
)


@dataclass(frozen=True)
class BreastCancer:
    """Logistic regression on scikit-learn's breast-cancer data, by NUTS.

    Attributes:
        num_erased: data withdrawn, those of the lowest predictive density.
        num_chains, num_draws: of each fit; draws of each chain.
        num_warmup: steps of each chain before them.
    """

    num_erased: int = 10
    num_chains: int = 2
    num_draws: int = 1000
    num_warmup: int = 300

    def run(self, seed: int, device: str) -> Study:
        """Fit, forget, refit twice, compare."""
        from pyro_forget.models import LogisticRegression

        everything, test = load(device)
        model = LogisticRegression(_NUM_COLUMNS + 1)
        units = 3 * self.num_chains * (self.num_warmup + self.num_draws) + 3 * METHOD_UNITS
        progress = Progress("breast cancer", units)
        before, seconds = self._fit(model, everything, 3 * seed, "fit to all data", progress)
        erased, retained = everything.split(self._worst(before, everything))
        refit = self._fit(model, retained, 3 * seed + 1, "refit", progress)
        again = self._fit(model, retained, 3 * seed + 2, "another refit", progress)
        fits = Fitted(before, seconds), Fitted(*refit), Fitted(*again)
        request = Request(*fits, erased, retained, test, _log_probabilities)
        rows = compare(request, _forgetters(seed), progress)
        progress.close()
        words = asdict(self) | {"num_data": len(everything), "num_test": len(test)}
        title, description = _TITLE.format(**words), _DESCRIPTION.format(**words)
        tree = export(request, rows, _labels(), self.num_draws, seed)
        return Study("breast_cancer", title, description, list(rows.values()), tree, weighted=True)

    def _fit(
        self, model: Callable[..., Any], data: Data, seed: int, name: str, progress: Progress
    ) -> tuple[SampledPosterior, float]:
        """(posterior, seconds) of chains drawn one after another, each from a seed of its own."""
        progress.say(name)
        start = time.perf_counter()
        call = next(data.batches()).args
        seeds = range(self.num_chains * seed, self.num_chains * (seed + 1))
        chains = [self._chain(model, call, chain_seed, progress) for chain_seed in seeds]
        draws = {name: torch.stack([chain[name] for chain in chains]) for name in chains[0]}
        return SampledPosterior(model, draws, data), time.perf_counter() - start

    def _chain(
        self, model: Callable[..., Any], call: tuple[Any, ...], seed: int, progress: Progress
    ) -> dict[str, Tensor]:
        """Not `num_chains=2`, which draws other chains where there are more cores."""
        kernel = NUTS(model, full_mass=True, jit_compile=True, ignore_jit_warnings=True)
        chain = MCMC(
            kernel,
            num_samples=self.num_draws,
            warmup_steps=self.num_warmup,
            hook_fn=lambda *_: progress.advance(),
            disable_progbar=True,
        )
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            # Pyro compiles by torch.jit, which torch wants replaced; without it NUTS takes almost twice as long.
            warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            chain.run(*call)
        return chain.get_samples()

    def _worst(self, posterior: SampledPosterior, data: Data) -> Tensor:
        """Ids of the data of the lowest log predictive density."""
        rows = posterior.log_likelihood(data).flatten(0, 1).logsumexp(0)
        return data.ids[rows.argsort()[: self.num_erased].cpu()]


def load(device: str) -> tuple[Data, Data]:
    """(rows to fit, rows to test): 8 columns, standardised by the rows to fit, and a constant; y is 1 if benign."""
    columns, y = (torch.as_tensor(array) for array in load_breast_cancer(return_X_y=True))
    test = torch.arange(len(y)) % _TEST_EVERY == 0
    columns = columns[:, :_NUM_COLUMNS]
    columns = (columns - columns[~test].mean(0)) / columns[~test].std(0)
    x = torch.cat([columns, torch.ones(len(y), 1, dtype=torch.float64)], 1).to(device)
    y, test = y.to(device), test.to(device)
    return Data(x[~test], y[~test]), Data(x[test], y[test])


def _forgetters(seed: int) -> dict[str, dict[str, Forgetter | None]]:
    return {
        "default": {"default (transport)": None},
        "published": {
            f"published, scaling {value:g}": Transport.published(Recursion(scaling=value, seed=seed))
            for value in _SCALINGS
        },
        "finetune": {"fine-tuning, 8 HMC moves": Finetune(seed=seed, progress=False)},
    }


def _log_probabilities(posterior: Posterior, x: Tensor) -> Tensor:
    if not isinstance(posterior, SampledPosterior):
        raise TypeError(f"Draws are needed, got {type(posterior).__name__}.")
    logits = posterior.draws()["weight"] @ x.T
    return torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], -1).logsumexp(0) - math.log(len(logits))


def _labels() -> dict[str, list[str]]:
    """Names along the dim of the weights."""
    return {"weight_dim_0": [*map(str, load_breast_cancer().feature_names[:_NUM_COLUMNS]), "intercept"]}
