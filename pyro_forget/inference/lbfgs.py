"""L-BFGS on an energy under pinned noise."""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_forget.data import Data
from pyro_forget.energy import Energy
from pyro_forget.params import Params, clone, norm
from pyro_forget.tilt import total_and_gradient

STRIDE = 20


@dataclass(frozen=True)
class Minimum:
    """Where a minimisation ended."""

    params: Params
    losses: Tensor
    gradient_norm: float


@dataclass(frozen=True)
class LBFGS:
    """torch's L-BFGS with strong Wolfe line search, batch by batch.

    Attributes:
        max_steps: iterations.
        gradient_norm: Euclidean norm to reach.
        progress: show a bar.
    """

    max_steps: int = 1000
    gradient_norm: float = 1e-4
    progress: bool = True

    def minimise(self, energy: Energy, params: Params, data: Data) -> Minimum:
        """The minimum of F(·, data) from `params`: to the gradient norm, to rounding, or to the last iteration."""
        leaves = {name: value.detach().clone().requires_grad_(True) for name, value in params.items()}
        losses: list[float] = []
        norms: list[float] = []

        def closure() -> float:
            value, gradient = total_and_gradient(energy, leaves, data)
            for name, leaf in leaves.items():
                leaf.grad = gradient[name]
            losses.append(value)
            norms.append(norm(gradient))
            return value

        with tqdm(total=self.max_steps, desc="polish", disable=not self.progress) as bar:
            optimiser = self._optimiser(leaves)
            # A few iterations at a time, so that the bar moves and the gradient is looked at.
            for done in range(0, self.max_steps, STRIDE):
                optimiser.param_groups[0]["max_iter"] = min(STRIDE, self.max_steps - done)
                start = len(losses)
                optimiser.step(closure)
                closure()
                bar.update(optimiser.param_groups[0]["max_iter"])
                bar.set_postfix(energy=f"{losses[-1]:.6g}", gradient=f"{norms[-1]:.1e}", refresh=False)
                # What neither lowers the energy nor halves its gradient any more has met the rounding of sums.
                stalled = losses[-1] >= losses[start] and norms[-1] > 0.5 * norms[start]
                if norms[-1] <= self.gradient_norm or stalled:
                    break
        return Minimum(clone(leaves), torch.tensor(losses, dtype=torch.float64), norms[-1])

    def _optimiser(self, leaves: Params) -> torch.optim.LBFGS:
        return torch.optim.LBFGS(
            list(leaves.values()),
            max_iter=STRIDE,
            history_size=50,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
