"""Logistic regression."""

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_forget.models.prior import normal_prior


@dataclass(frozen=True)
class LogisticRegression:
    """y ~ Bernoulli(sigmoid(x·w)) with w ~ N(0, prior_std²).

    Latent: `weight` (num_features,). An intercept is a constant column of x.

    Attributes:
        num_features: columns of x.
        prior_std: of each weight.

    Example:
        >>> import torch
        >>> LogisticRegression(num_features=2)(torch.ones(5, 2)).shape
        torch.Size([5])
    """

    num_features: int
    prior_std: float = 1.0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The logit of each row, shape (num_rows,); y holds 0 and 1 of any type."""
        weight = pyro.sample("weight", normal_prior(x, self.prior_std, self.num_features))
        logits = x @ weight
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=None if y is None else y.to(x.dtype))
        return logits
