"""What the study needs of a fit, whatever method it is by."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyro_forget.data import Data
from pyro_forget.outcome import Forgetter


@dataclass(frozen=True)
class Centres:
    """Where a posterior puts the centres.

    Attributes:
        loc: posterior means, shape (component, 2).
        std: posterior standard deviations, of the same shape.
    """

    loc: Tensor
    std: Tensor

    def order_like(self, other: "Centres") -> Tensor:
        """The order of these components that is closest to the other's: labels mean nothing in a mixture."""
        _, order = linear_sum_assignment(torch.cdist(other.loc, self.loc).cpu().numpy())
        return torch.as_tensor(order)


class Fit(Protocol):
    """A way to fit the mixture, to read what came of it, and to forget."""

    def fitted(self, data: Data, seed: int) -> Any:
        """The posterior, from initial values and noise of this seed."""
        ...

    def centres(self, posterior: Any) -> Centres:
        """Its centres."""
        ...

    def distance(self, first: Any, second: Any) -> float:
        """KL(first ‖ second) between Gaussians, components matched; nats."""
        ...

    def log_density(self, posterior: Any, points: Tensor) -> Tensor:
        """Log posterior predictive density, shape (point,), nats."""
        ...

    def forgetter(self, method: str, num_data: int, seed: int) -> Forgetter:
        """By the name of the setting `method`, for a fit to so many points."""
        ...
