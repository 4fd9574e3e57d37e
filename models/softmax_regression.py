"""Softmax regression."""

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch.nn.functional as F
from torch import Tensor

from pyro_forget.models.prior import normal_prior


@dataclass(frozen=True)
class SoftmaxRegression:
    """y ~ Categorical(softmax(x W + b)) with every weight ~ N(0, prior_std²).

    Latents: `weight` (num_features, num_classes); `bias` (num_classes,) on request, the same as a constant column of x.

    Attributes:
        num_features: columns of x.
        num_classes: classes 0, 1, …
        prior_std: of each weight.
        bias: whether there is a bias.

    Example:
        >>> import torch
        >>> SoftmaxRegression(num_features=2, num_classes=3)(torch.ones(5, 2)).shape
        torch.Size([5, 3])
    """

    num_features: int
    num_classes: int
    prior_std: float = 1.0
    bias: bool = False

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The logits of each row, shape (num_rows, num_classes)."""
        weight = pyro.sample("weight", normal_prior(x, self.prior_std, self.num_features, self.num_classes))
        bias = pyro.sample("bias", normal_prior(x, self.prior_std, self.num_classes)) if self.bias else None
        # One map of weight and bias, not a product and a sum: local reparametrisation then draws one noise.
        logits = F.linear(x, weight.T, bias)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits
