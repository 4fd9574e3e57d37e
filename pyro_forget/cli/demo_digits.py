"""Part one: a variational posterior, and a contributor who withdraws 50 images."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.optim import PyroOptim
from sklearn.datasets import load_digits
from torch import Tensor

from pyro_forget.cli.comparison import METHOD_UNITS, Fitted, Request, compare, export
from pyro_forget.cli.progress import Progress
from pyro_forget.cli.study import Study
from pyro_forget.data import Data
from pyro_forget.forgetters.finetune import Finetune
from pyro_forget.forgetters.influence import Influence
from pyro_forget.inference.fit import fit_guide
from pyro_forget.outcome import Forgetter
from pyro_forget.posterior import Posterior

_NUM_TEST = 297
_NUM_CLASSES = 10
_WITHDRAWN = 0  # the class of the images that go
_SCALINGS = (1.0, 2.0, 4.0)
_INIT_SCALE = 0.3
_POLISH_UNITS = 200  # of the progress bar, beside one for a step of SVI

_TITLE = "Digits: a contributor withdraws {num_erased} images"
_DESCRIPTION = (
    "Bayesian softmax regression on scikit-learn's digits ({num_data:,} images to fit, {num_test} to test, "
    "{num_weights} weights with priors N(0, 1)), approximated by independent Gaussians: {num_steps} steps of Pyro's "
    "SVI, then L-BFGS under noise of {polish_pairs} frame pairs. The first {num_erased} images of class 0 are "
    "withdrawn. The fit and both refits start from different initial values and have different noise. Distance: KL "
    "between the Gaussians, from a posterior to the refit."
)


@dataclass(frozen=True)
class Digits:
    """Mean-field Bayesian softmax regression on scikit-learn's digits.

    Attributes:
        num_erased: images withdrawn, the first of class 0.
        num_steps: of SVI, on all rows.
        learning_rate: of SVI.
        polish_pairs: frame pairs of the polish's noise: the more, the lower the floor.
        polish_gradient: gradient norm at which the polish ends.
        finetune_steps: of Adam.
        num_draws: of predictions and of the exported posteriors.
    """

    num_erased: int = 50
    num_steps: int = 300
    learning_rate: float = 0.02
    polish_pairs: int = 64
    polish_gradient: float = 1e-3
    finetune_steps: int = 500
    num_draws: int = 400

    def run(self, seed: int, device: str) -> Study:
        """Fit, forget, refit twice, compare."""
        from pyro_forget.guides import local_reparametrization
        from pyro_forget.models import SoftmaxRegression

        everything, test = load(device)
        images, digits = next(everything.batches()).args
        erased, retained = everything.split(torch.nonzero(digits.cpu() == _WITHDRAWN)[: self.num_erased, 0])
        model = local_reparametrization(SoftmaxRegression(images.shape[1], _NUM_CLASSES))
        progress = Progress("digits", 3 * (self.num_steps + _POLISH_UNITS) + 3 * METHOD_UNITS)
        torch.optim.Adam([torch.zeros(1)])  # the first optimiser loads a compiler for seconds, which no fit should bear
        named = {"fit to all images": everything, "refit": retained, "another refit": retained}
        before, refit, again = (
            self._fit(model, data, 3 * seed + place, name, progress) for place, (name, data) in enumerate(named.items())
        )
        request = Request(before, refit, again, erased, retained, test, self._log_probabilities)
        rows = compare(request, self._forgetters(seed), progress)
        progress.close()
        numbers = {"num_data": len(everything), "num_test": len(test), "num_weights": images.shape[1] * _NUM_CLASSES}
        words = asdict(self) | numbers
        tree = export(request, rows, _labels(), self.num_draws, seed)
        return Study("digits", _TITLE.format(**words), _DESCRIPTION.format(**words), list(rows.values()), tree)

    def _fit(self, model: Callable[..., Any], data: Data, seed: int, name: str, progress: Progress) -> Fitted:
        """Pyro's SVI, then the polish; the parameter store stays as it is."""
        from pyro_forget.guides import MeanField

        progress.say(name)
        start = time.perf_counter()
        call = next(data.batches()).args
        with pyro.settings.context(module_local_params=True):
            torch.manual_seed(seed)
            guide = MeanField(model, init_loc_fn=init_to_sample, init_scale=_INIT_SCALE)
            svi = SVI(model, guide, PyroOptim(torch.optim.Adam, {"lr": self.learning_rate}), TraceMeanField_ELBO())
            for _ in range(self.num_steps):
                svi.step(*call)
                progress.advance()
            fit = fit_guide(
                model,
                guide,
                data,
                num_steps=0,
                polish_pairs=self.polish_pairs,
                polish_gradient=self.polish_gradient,
                seed=seed,
                progress=False,
            )
        progress.advance(_POLISH_UNITS)
        return Fitted(fit.posterior, time.perf_counter() - start, fit.gradient_norm)

    def _forgetters(self, seed: int) -> dict[str, dict[str, Forgetter | None]]:
        return {
            "default": {"default (influence)": None},
            "published": {
                f"published, scaling {value:g}": Influence.published(scaling=value, seed=seed) for value in _SCALINGS
            },
            "finetune": {
                f"fine-tuning, {self.finetune_steps} Adam steps": Finetune(
                    num_steps=self.finetune_steps, seed=seed, progress=False
                )
            },
        }

    def _log_probabilities(self, posterior: Posterior, images: Tensor) -> Tensor:
        weight = posterior.draws(self.num_draws)["weight"]
        return (images @ weight).log_softmax(-1).logsumexp(0) - math.log(len(weight))


def load(device: str) -> tuple[Data, Data]:
    """(rows to fit, rows to test): pixels in [0, 1] and a constant, int64 digits; in one shuffled order."""
    pixels, digits = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images = torch.cat([pixels / 16, torch.ones(len(digits), 1, dtype=torch.float64)], 1)[order].to(device)
    digits = digits[order].to(device)
    return Data(images[:-_NUM_TEST], digits[:-_NUM_TEST]), Data(images[-_NUM_TEST:], digits[-_NUM_TEST:])


def _labels() -> dict[str, list[str]]:
    """Names along the dims of the weights."""
    pixels = [f"pixel {row},{column}" for row in range(8) for column in range(8)]
    return {
        "weight_dim_0": [*pixels, "constant"],
        "weight_dim_1": [f"digit {digit}" for digit in range(_NUM_CLASSES)],
    }
