"""Hamiltonian Monte Carlo moves of many draws at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

# Draws (draw, d) to their log density (draw,) and its gradient (draw, d).
Density = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Moved:
    """Draws after their moves.

    Attributes:
        draws: (draw, d), in the order they came.
        halfway: the same after half of the moves.
        acceptance: mean acceptance probability.
    """

    draws: Tensor
    halfway: Tensor
    acceptance: float


@dataclass(frozen=True)
class HMC:
    """A few moves of each draw on its own, in the metric of the draws' own covariance, without adaptation.

    The step is `step_size`·d^(−¼)·U(½, 1), a new one for each draw and move.

    Attributes:
        num_moves: trajectories.
        num_leapfrog: gradients of one.
        step_size: in standard deviations; 1.1 accepts about nine moves of ten on a Gaussian.
        seed: of momenta, steps and acceptances.
        progress: show a bar.

    References:
        R. M. Neal (2011), MCMC using Hamiltonian dynamics, Handbook of Markov Chain Monte Carlo, section 5.4.
    """

    num_moves: int = 8
    num_leapfrog: int = 5
    step_size: float = 1.1
    seed: int = 0
    progress: bool = False

    def run(self, density: Density, draws: Tensor, factor: Tensor) -> Moved:
        """Move draws (draw, d); `factor` is the Cholesky factor of their covariance, or standard deviations (d,)."""
        generator = torch.Generator(device=draws.device).manual_seed(self.seed)
        here, halfway, accepted = _State(draws, *density(draws)), draws, 0.0
        for move in tqdm(range(self.num_moves), desc="moves", disable=not self.progress):
            halfway = here.draws if move == self.num_moves // 2 else halfway
            here, rate = self._move(density, here, factor, generator)
            accepted += rate / self.num_moves
        return Moved(here.draws, halfway, accepted)

    def _move(
        self, density: Density, here: "_State", factor: Tensor, generator: torch.Generator
    ) -> tuple["_State", float]:
        """One trajectory of each draw, and the mean acceptance probability."""
        momentum = torch.empty_like(here.draws).normal_(generator=generator)
        uniform = here.draws.new_empty(len(here.draws), 2).uniform_(generator=generator)
        size = self.step_size * here.draws.shape[1] ** -0.25
        step = size * (0.5 + 0.5 * uniform[:, :1])
        there, end = self._trajectory(density, here, momentum, factor, step)
        change = there.value - here.value + 0.5 * (momentum.square() - end.square()).sum(1)
        # A trajectory that leaves the support has no density, and is not taken.
        rate = torch.where(change.isfinite(), change, -torch.inf).clamp(max=0).exp()
        return there.where(uniform[:, -1] < rate, here), float(rate.mean())

    def _trajectory(
        self, density: Density, here: "_State", momentum: Tensor, factor: Tensor, step: Tensor
    ) -> tuple["_State", Tensor]:
        """Leapfrog steps in the coordinates in which the draws are white: (state, momentum) at the end."""
        momentum = momentum + 0.5 * step * _whitened(factor, here.gradient)
        for number in range(self.num_leapfrog):
            draws = here.draws + step * _coloured(factor, momentum)
            here = _State(draws, *density(draws))
            kick = 0.5 if number + 1 == self.num_leapfrog else 1.0
            momentum = momentum + kick * step * _whitened(factor, here.gradient)
        return here, momentum


class _State(NamedTuple):
    """Draws with their log densities and gradients."""

    draws: Tensor
    value: Tensor
    gradient: Tensor

    def where(self, chosen: Tensor, other: "_State") -> "_State":
        """These of the chosen draws, the other's of the rest."""
        rows = chosen[:, None]
        return _State(
            torch.where(rows, self.draws, other.draws),
            torch.where(chosen, self.value, other.value),
            torch.where(rows, self.gradient, other.gradient),
        )


def _coloured(factor: Tensor, rows: Tensor) -> Tensor:
    """L·row of each row."""
    return rows * factor if factor.ndim == 1 else rows @ factor.mT


def _whitened(factor: Tensor, rows: Tensor) -> Tensor:
    """Lᵀ·row of each row."""
    return rows * factor if factor.ndim == 1 else rows @ factor
