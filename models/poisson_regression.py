"""Poisson regression."""

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_forget.models.prior import normal_prior


@dataclass(frozen=True)
class PoissonRegression:
    """y ~ Poisson(exp(x·w)) with w ~ N(0, prior_std²).

    Latent: `weight` (num_features,). An intercept is a constant column of x.

    Attributes:
        num_features: columns of x.
        prior_std: of each weight.

    Example:
        >>> import torch
        >>> PoissonRegression(num_features=2)(torch.ones(5, 2)).shape
        torch.Size([5])
    """

    num_features: int
    prior_std: float = 1.0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The log rate of each row, shape (num_rows,); y holds counts of any type."""
        weight = pyro.sample("weight", normal_prior(x, self.prior_std, self.num_features))
        log_rate = x @ weight
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Poisson(log_rate.exp()), obs=None if y is None else y.to(x.dtype))
        return log_rate
