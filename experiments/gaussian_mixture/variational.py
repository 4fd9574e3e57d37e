"""Mean-field variational inference: centres N(loc, scale²), responsibilities at their best."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.gaussian_mixture.fit import Centres
from pyro_forget.data import Data
from pyro_forget.energy import estimate_and_gradient
from pyro_forget.evaluation import gaussian_kl
from pyro_forget.forgetters.influence import Influence
from pyro_forget.inference.lbfgs import LBFGS
from pyro_forget.inference.recursion import Recursion
from pyro_forget.models import GaussianMixture
from pyro_forget.outcome import Forgetter
from pyro_forget.params import Params, axpy
from pyro_forget.posterior import EnergyPosterior

START_LOG_SCALE = -3.0


@dataclass(frozen=True)
class Variational:
    """Stochastic gradient descent as published, then L-BFGS to the minimum.

    Attributes:
        model: the mixture.
        start: initial centres of a fit, by (points, seed).
        recursion: the published algorithm.
        num_steps: of descent.
        batch_size: of a step.
        learning_rate: times 1 / N, decaying as (t + 1)^−decay.
        decay: see there.
    """

    model: GaussianMixture
    start: Callable[[Tensor, int], Tensor]
    recursion: Recursion
    num_steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 2.0
    decay: float = 0.15

    def fitted(self, data: Data, seed: int) -> EnergyPosterior:
        """The minimum that the descent led to."""
        (points,) = next(data.batches()).args
        loc = self.start(points, seed)
        params: Params = {"loc": loc, "log_scale": torch.full_like(loc, START_LOG_SCALE)}
        energy, batches = self.model.bound(), data.minibatches(self.batch_size, torch.Generator().manual_seed(seed))
        for step in range(self.num_steps):
            _, gradient = estimate_and_gradient(energy, params, next(batches), data.num_data)
            params = axpy(-self.learning_rate / data.num_data * (step + 1) ** -self.decay, gradient, params)
        polished = LBFGS(500, 1e-8, progress=False).minimise(energy, params, data)
        return EnergyPosterior(polished.params, energy, data)

    def centres(self, posterior: EnergyPosterior) -> Centres:
        """Means and standard deviations of q."""
        return Centres(posterior.params["loc"], posterior.params["log_scale"].exp())

    def distance(self, first: EnergyPosterior, second: EnergyPosterior) -> float:
        """KL(first ‖ second), nats."""
        mine, theirs = self.centres(first), self.centres(second)
        order = mine.order_like(theirs)
        return float(gaussian_kl(mine.loc[order], mine.std[order], theirs.loc, theirs.std))

    def log_density(self, posterior: EnergyPosterior, points: Tensor) -> Tensor:
        """Exactly, shape (point,), nats."""
        found = self.centres(posterior)
        return self.model.log_density(found.loc, found.std, points)

    def forgetter(self, method: str, num_data: int, seed: int) -> Forgetter:
        """The library's default, or the published recursion."""
        return Influence() if method == "default" else Influence(recursion=self.recursion)
