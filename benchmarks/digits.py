"""The digits task: a mean-field softmax regression that forgets some images, beside a refit without them.

scikit-learn's 1,797 digits, pixels / 16 and a constant column, rows shuffled; 65 × 10 weights with priors N(0, 1),
local reparametrisation. The fit and the refit share one pinned noise, which forgetting never sees. *Remaining* is
KL(q_forgot ‖ q_refit) / KL(q_fit ‖ q_refit).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks import softmax
from benchmarks.softmax import Params, Rows
from pyro_forget.data import Data
from pyro_forget.evaluation import gaussian_kl
from pyro_forget.gaussian import Gaussian
from pyro_forget.guides import MeanField, local_reparametrization
from pyro_forget.models import SoftmaxRegression
from pyro_forget.posterior import VariationalPosterior

BLOCK = 64


@dataclass(frozen=True)
class Digits:
    """One shuffle of the images, with the noise of fit and refit.

    Attributes:
        rows: all images and that noise.
        template: the posterior before any fit.
    """

    rows: Rows
    template: VariationalPosterior

    @staticmethod
    def shuffled(seed: int) -> "Digits":
        """The images in an order of their own, still without noise."""
        pixels, digits = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
        x = torch.cat([pixels[order].double() / 16, torch.ones(len(order), 1, dtype=torch.float64)], 1)
        model = local_reparametrization(SoftmaxRegression(65, 10))
        template = VariationalPosterior.started(model, MeanField(model), Data(x, digits[order]))
        return Digits(Rows(x, digits[order], x.new_zeros(0, len(x), 10)), template)

    def under(self, noise: Tensor) -> "Digits":
        """The same with this noise of fit and refit, shape (draw, row, class)."""
        return Digits(Rows(self.rows.x, self.rows.y, noise), self.template)

    @property
    def data(self) -> Data:
        """The model's call."""
        return Data(self.rows.x, self.rows.y)

    def without(self, erased: Tensor) -> Rows:
        """The other rows, with their noise."""
        kept = torch.ones(len(self.rows), dtype=torch.bool)
        kept[erased] = False
        return self.rows[kept.nonzero()[:, 0]]

    def posterior(self, params: Params) -> VariationalPosterior:
        """A fit as the library sees it."""
        gaussian = Gaussian({"weight": params[0]}, {"weight": params[1].exp()})
        return with_gaussian(self.template, gaussian)


def with_gaussian(posterior: VariationalPosterior, gaussian: Gaussian) -> VariationalPosterior:
    """The same guide, standing elsewhere."""
    return posterior.with_params(posterior.energy.whole.view.write(posterior.params, gaussian))


def fitted(rows: Rows, start: Params | None = None, gradient_norm: float = 1e-4) -> Params:
    """The minimum of the energy under the rows' noise."""
    begin = softmax.start(rows.x, 10) if start is None else start
    return softmax.minimise(lambda params: softmax.blockwise(params, rows, BLOCK), begin, gradient_norm)[-1].params


def params_of(posterior: VariationalPosterior) -> Params:
    """The inverse of `Digits.posterior`."""
    gaussian = posterior.gaussian
    return gaussian.loc["weight"], gaussian.scale["weight"].log()


def distance(first: Params, second: Params) -> float:
    """KL(first ‖ second), nats; infinite where a method diverged."""
    scale = first[1].exp()
    if not bool((first[0].isfinite() & scale.isfinite() & (scale > 0)).all()):
        return float("inf")
    return float(gaussian_kl(first[0], scale, second[0], second[1].exp()))


def requests(task: Digits, fit: Params) -> dict[str, Callable[[], Tensor]]:
    """What is erased, by name."""
    y = task.rows.y

    def worst(count: int) -> Tensor:
        own = (task.rows.x @ fit[0]).log_softmax(-1).gather(1, y[:, None])[:, 0]
        return own.argsort()[:count]

    def at_random() -> Tensor:
        return torch.randperm(len(y), generator=torch.Generator().manual_seed(1))[: len(y) // 10]

    return {
        "50 of class 0": lambda: torch.nonzero(y == 0)[:50, 0],
        "all of class 3": lambda: torch.nonzero(y == 3)[:, 0],
        "10 % at random": at_random,
        "the 50 worst fitted": lambda: worst(50),
        "the worst fitted": lambda: worst(1),
    }
