"""Forgetting by going on: a fit or its draws move on under the retained data alone."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_forget.data import Data
from pyro_forget.forgetters.cloud import Cloud, spread_factor
from pyro_forget.forgetters.health import health_warnings, input_health
from pyro_forget.forgetters.training import trained
from pyro_forget.importance import systematic_resample
from pyro_forget.inference.fit import Training
from pyro_forget.inference.hmc import HMC, Moved
from pyro_forget.outcome import Edit, Evidence
from pyro_forget.posterior import Posterior, SampledPosterior

_DRIFT = 5.0  # standard errors between half of the moves and all of them
_LOW_ACCEPTANCE = 0.4


@dataclass(frozen=True)
class Finetune:
    """Go on with the retained data from where the posterior stands.

    Parameters of a guide, or of an energy written by hand, go on by Adam. Draws go on by a few moves of Hamiltonian
    Monte Carlo each, in the metric of their own covariance, all at once. Weighted draws are resampled first.

    It forgets as far as it gets: without the tilt that `Influence` has, the steps also chase what the fit had left
    undone, and mini-batch noise hides the little that a few rows out of many ask for.

    Attributes:
        num_steps: of Adam.
        learning_rate: of Adam, decaying to zero by a cosine.
        batch_size: rows a step; all of them by default.
        polish: "lbfgs" to go on to the minimum under pinned noise, which is a refit from here; None for Adam alone.
        num_moves: of each draw.
        num_leapfrog: gradients of a move.
        num_starts: how many draws go on, resampled from all; None for all.
        seed: of batches, noise and moves.
        progress: show a bar.
    """

    num_steps: int = 500
    learning_rate: float = 0.005
    batch_size: int | None = None
    polish: str | None = None
    num_moves: int = 8
    num_leapfrog: int = 5
    num_starts: int | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("num_moves", "num_leapfrog", "num_starts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self._training()

    def edit(self, posterior: Posterior, erased: Data, retained: Data) -> Edit:
        """The posterior after going on; refused where the energy stops being finite. Nothing erased: the input."""
        if not erased.num_data:
            return Edit(posterior, Evidence("fine-tuning: nothing to erase, the posterior is returned as it is"))
        if isinstance(posterior, SampledPosterior):
            return self._moved(posterior, retained)
        return trained(posterior, posterior.params, retained, self._training(), "fine-tuning")

    def _training(self) -> Training:
        return Training(
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            polish=self.polish,
            seed=self.seed,
            progress=self.progress,
        )

    def _moved(self, posterior: SampledPosterior, retained: Data) -> Edit:
        cloud = Cloud(posterior)
        starts, lead = self._starts(cloud)
        factor = spread_factor(cloud.matrix, cloud.log_weights)
        moves = HMC(self.num_moves, self.num_leapfrog, seed=self.seed, progress=self.progress)
        found = moves.run(lambda draws: cloud.log_joint_and_gradient(draws, retained), starts, factor)
        rhat, ess = input_health(posterior)
        evidence = Evidence(
            method=f"fine-tuning: {self.num_moves} Hamiltonian moves of {self.num_leapfrog} steps from each draw",
            warnings=(*health_warnings(rhat, ess), *_warnings(found, _drift(found))),
            num_draws=len(starts),
            rhat_input=rhat,
            ess_input=ess,
            extra={"acceptance": found.acceptance, "drift": _drift(found)},
        )
        if not bool(found.draws.isfinite().all()):
            return Edit(posterior, replace(evidence, refused="the log joint density is not finite at the draws"))
        params = cloud.params(found.draws, lead)
        norms = {name: float(value.norm()) for name, value in cloud.params(_rms(found.draws - starts)[None]).items()}
        return Edit(posterior.edited(params, retained.ids), replace(evidence, step_norm=norms))

    def _starts(self, cloud: Cloud) -> tuple[Tensor, tuple[int, int]]:
        """(rows, their leading shape): all draws in chain order where they have equal weights."""
        if cloud.posterior.log_weights is None and self.num_starts is None:
            return cloud.matrix, cloud.posterior.shape
        number = self.num_starts or len(cloud.matrix)
        return cloud.matrix[systematic_resample(cloud.log_weights, number, self.seed)], (1, number)


def _rms(steps: Tensor) -> Tensor:
    return steps.square().mean(0).sqrt()


def _drift(found: Moved) -> float | None:
    """Largest change of a coordinate's mean over the second half of the moves, in standard errors."""
    change = found.draws - found.halfway
    error = change.std(0) / len(change) ** 0.5 if len(change) > 1 else torch.zeros_like(change[0])
    figures = (change.mean(0).abs() / error)[error > 0]
    return float(figures.max()) if len(figures) else None


def _warnings(found: Moved, drift: float | None) -> tuple[str, ...]:
    said = []
    if found.acceptance < _LOW_ACCEPTANCE:
        said.append(f"Only {found.acceptance:.0%} of the moves were accepted: the draws hardly moved.")
    if drift is not None and drift > _DRIFT:
        said.append(
            f"The draws were still on their way: over the last half of the moves a mean changed by {drift:.1f} "
            "standard errors. Take more moves."
        )
    return tuple(said)
