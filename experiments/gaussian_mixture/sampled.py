"""Stochastic-gradient MCMC: one chain, its steps decaying as published."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.gaussian_mixture.fit import Centres
from pyro_forget.data import Data
from pyro_forget.evaluation import moment_kl
from pyro_forget.forgetters.published_chain import PublishedChain
from pyro_forget.forgetters.transport import Transport
from pyro_forget.inference.recursion import Recursion
from pyro_forget.inference.stochastic import SGHMC, SGLD, Rule
from pyro_forget.inference.stochastic.chains import Chains
from pyro_forget.inference.stochastic.potential import potential_of
from pyro_forget.inference.stochastic.schedule import RobbinsMonro
from pyro_forget.models import GaussianMixture
from pyro_forget.outcome import Forgetter
from pyro_forget.posterior import SampledPosterior

SITE = "centres"


@dataclass(frozen=True)
class Sampled:
    """A chain of SGLD or SGHMC and its last draws.

    Attributes:
        model: the mixture.
        start: initial centres of a chain, by (points, seed).
        kernel: "sgld" or "sghmc".
        recursion: the published algorithm.
        num_steps: before the first draw.
        num_draws: kept.
        thin: steps a draw.
        batch_size: of a step.
        learning_rate: times 1 / N, decaying as (t + 1)^−decay; twice that for SGLD.
        decay: see there.
        friction: of SGHMC.
    """

    model: GaussianMixture
    start: Callable[[Tensor, int], Tensor]
    kernel: str
    recursion: Recursion
    num_steps: int = 2000
    num_draws: int = 500
    thin: int = 4
    batch_size: int = 64
    learning_rate: float = 2.0
    decay: float = 0.15
    friction: float = 0.4

    def fitted(self, data: Data, seed: int) -> SampledPosterior:
        """The posterior of a chain's last draws."""
        (points,) = next(data.batches()).args
        start = {SITE: self.start(points, seed)}
        chains = Chains(potential_of(self.model, data), self._rule(data.num_data), data, seed=seed, start=start)
        draws = []
        for number in range(self.num_steps + self.num_draws * self.thin):
            chains.step()
            if number >= self.num_steps and (number + 1 - self.num_steps) % self.thin == 0:
                draws.append(chains.latents()[SITE])
        return SampledPosterior(self.model, {SITE: torch.stack(draws, 1)}, data)

    def centres(self, posterior: SampledPosterior) -> Centres:
        """Weighted means and standard deviations over the draws."""
        draws, weights = self._draws(posterior)
        loc = torch.einsum("s,skd->kd", weights, draws)
        return Centres(loc, torch.einsum("s,skd->kd", weights, (draws - loc).square()).sqrt())

    def distance(self, first: SampledPosterior, second: SampledPosterior) -> float:
        """KL between Gaussians with the moments of the draws, nats."""
        (mine, my_weights), (theirs, their_weights) = self._draws(first), self._draws(second)
        order = self.centres(first).order_like(self.centres(second))
        clouds = mine[:, order].flatten(1), theirs.flatten(1)
        return float(moment_kl(*clouds, my_weights.log(), their_weights.log()))

    def log_density(self, posterior: SampledPosterior, points: Tensor) -> Tensor:
        """Of the mixture averaged over the draws, shape (point,), nats."""
        draws, weights = self._draws(posterior)
        return torch.cat([self._log_density(draws, weights, some) for some in points.split(256)])

    def forgetter(self, method: str, num_data: int, seed: int) -> Forgetter:
        """The library's default, or the published algorithm, its chain going on at the fit's last step size."""
        if method == "default":
            return Transport()
        last = self._rule(num_data).schedule.step_size(self.num_steps + self.num_draws * self.thin - 1)
        return PublishedChain(self._sampler(last), self.recursion, self.num_draws, self.thin, seed=seed, progress=False)

    def _rule(self, num_data: int) -> Rule:
        size = self.learning_rate / num_data * (2 if self.kernel == "sgld" else 1)
        return self._sampler(RobbinsMonro(size, self.decay))

    def _sampler(self, size: float | RobbinsMonro) -> Rule:
        if self.kernel == "sgld":
            return SGLD(size, batch_size=self.batch_size)
        return SGHMC(size, friction=self.friction, batch_size=self.batch_size)

    def _draws(self, posterior: SampledPosterior) -> tuple[Tensor, Tensor]:
        """(draws (draw, component, 2), their weights)."""
        draws = posterior.latents[SITE].flatten(0, 1)
        if posterior.log_weights is None:
            return draws, draws.new_full((len(draws),), 1 / len(draws))
        return draws, posterior.log_weights.flatten().exp()

    def _log_density(self, draws: Tensor, weights: Tensor, points: Tensor) -> Tensor:
        zero = draws.new_zeros(2)
        by_draw = torch.stack([self.model.log_density(centres, zero, points) for centres in draws])
        return (by_draw + weights.log()[:, None]).logsumexp(0)
