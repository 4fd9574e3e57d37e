"""Fitting a guide through the same energy that forgetting edits, for those who have no SVI run yet."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_forget.data import Data
from pyro_forget.energy import Energy, estimate_and_gradient
from pyro_forget.inference.lbfgs import LBFGS
from pyro_forget.params import Params, clone
from pyro_forget.posterior import VariationalPosterior


@dataclass(frozen=True)
class Fit:
    """A fitted guide.

    Attributes:
        posterior: it.
        losses: the estimated energy of every step, then of every iteration of the polish, nats.
        gradient_norm: Euclidean norm of the energy's gradient after the polish, under its noise; None without one.
    """

    posterior: VariationalPosterior
    losses: Tensor
    gradient_norm: float | None


def fit_guide(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Data,
    *,
    plate: str = "data",
    num_steps: int = 2000,
    learning_rate: float = 0.01,
    batch_size: int | None = None,
    num_draws: int = 1,
    patience: int | None = None,
    polish: str | None = "lbfgs",
    polish_pairs: int | None = None,
    polish_gradient: float = 1e-4,
    polish_steps: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Fit:
    """Fit a guide by Adam, then polish it by L-BFGS on pinned noise with exact moments.

    Goes through the plate override, so a model with a hard-coded number of data can be fitted to fewer. The guide
    itself is not changed; one that was fitted before is where the fit starts.

    Args:
        model: the Pyro model.
        guide: any guide that `VariationalPosterior` takes, fitted or not.
        data: the rows to fit.
        plate: the data plate.
        num_steps: Adam steps; 0 for the polish alone.
        learning_rate: of Adam, decaying to zero by a cosine.
        batch_size: rows a step; all of them by default.
        num_draws: draws a step.
        patience: stop when the running loss has not fallen for so many steps.
        polish: "lbfgs", or None for Adam alone.
        polish_pairs: antithetic pairs of the pinned noise; None for enough to have exact moments.
        polish_gradient: gradient norm to reach.
        polish_steps: L-BFGS iterations at most.
        seed: of initial values, batches and noise.
        progress: show a bar.

    Raises:
        ValueError: model, guide or data cannot be taken over, or the energy stops being finite.
    """
    training = Training(
        num_steps=num_steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        num_draws=num_draws,
        patience=patience,
        polish=polish,
        polish_pairs=polish_pairs,
        polish_gradient=polish_gradient,
        polish_steps=polish_steps,
        seed=seed,
        progress=progress,
    )
    posterior = VariationalPosterior.started(model, guide, data, plate=plate, seed=seed)
    trained = training.run(posterior.energy, posterior.params, data)
    return Fit(posterior.with_params(trained.params), trained.losses, trained.gradient_norm)


@dataclass(frozen=True)
class Trained:
    """Where training ended; `losses` and `gradient_norm` as in `Fit`."""

    params: Params
    losses: Tensor
    gradient_norm: float | None


@dataclass(frozen=True)
class Training:
    """Adam on fresh batches and noise, then L-BFGS on pinned noise; the settings are those of `fit_guide`."""

    num_steps: int = 2000
    learning_rate: float = 0.01
    batch_size: int | None = None
    num_draws: int = 1
    patience: int | None = None
    polish: str | None = "lbfgs"
    polish_pairs: int | None = None
    polish_gradient: float = 1e-4
    polish_steps: int = 1000
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.polish not in ("lbfgs", None):
            raise ValueError(f"`polish` must be 'lbfgs' or None, got {self.polish!r}.")
        if self.num_steps < 0 or not self.learning_rate > 0:
            raise ValueError(
                f"`num_steps` must not be negative and `learning_rate` positive, got {self.num_steps} and "
                f"{self.learning_rate}."
            )

    def run(self, energy: Energy, params: Params, data: Data) -> Trained:
        """Lower F(·, data) from `params`.

        Raises:
            ValueError: the energy stops being finite.
        """
        params, losses = adam(
            energy,
            params,
            data,
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            num_draws=self.num_draws,
            patience=self.patience,
            seed=self.seed,
            progress=self.progress,
        )
        if self.polish is None:
            return Trained(params, losses, None)
        pinned = energy.with_noise(2**20 + self.seed, self.polish_pairs)
        minimum = LBFGS(self.polish_steps, self.polish_gradient, self.progress).minimise(pinned, params, data)
        return Trained(minimum.params, torch.cat([losses, minimum.losses]), minimum.gradient_norm)


def adam(
    energy: Energy,
    params: Params,
    data: Data,
    *,
    num_steps: int,
    learning_rate: float,
    batch_size: int | None = None,
    num_draws: int = 1,
    patience: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Params, Tensor]:
    """(params after Adam on fresh batches and noise, the loss of every step)."""
    leaves = {name: value.detach().clone().requires_grad_(True) for name, value in params.items()}
    optimiser = torch.optim.Adam(leaves.values(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(num_steps, 1))
    generator = torch.Generator().manual_seed(seed)
    batches = data.minibatches(batch_size or data.num_data, generator)
    losses: list[float] = []
    with tqdm(range(num_steps), desc="fit", disable=not progress or not num_steps) as bar:
        for step in bar:
            fresh = energy.with_fresh_noise(seed * 1_000_003 + step, num_draws)
            batch = next(batches)
            loss, gradient = estimate_and_gradient(fresh, leaves, batch, data.num_data)
            for name, leaf in leaves.items():
                leaf.grad = gradient[name]
            optimiser.step()
            schedule.step()
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            if patience is not None and _stalled(losses, patience):
                break
    return clone(leaves), torch.tensor(losses, dtype=torch.float64)


def _stalled(losses: list[float], patience: int) -> bool:
    """Whether the mean over the last `patience` steps is no lower than over those before."""
    if len(losses) < 2 * patience or len(losses) % patience:
        return False
    return sum(losses[-patience:]) >= sum(losses[-2 * patience : -patience])
