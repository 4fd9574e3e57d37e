"""Linear regression."""

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_forget.models.prior import normal_prior


@dataclass(frozen=True)
class LinearRegression:
    """y ~ N(x·w, σ²) with w ~ N(0, prior_std²) and σ known, or σ ~ HalfNormal(noise_prior_std).

    Latents: `weight` (num_features,); `noise_std` () where it is learned. An intercept is a constant column of x.

    Attributes:
        num_features: columns of x.
        prior_std: of each weight.
        noise_std: σ in the unit of y, or None to learn it.
        noise_prior_std: the scale of σ's prior.

    Example:
        >>> import torch
        >>> LinearRegression(num_features=2)(torch.ones(5, 2)).shape
        torch.Size([5])
    """

    num_features: int
    prior_std: float = 1.0
    noise_std: float | None = 1.0
    noise_prior_std: float = 1.0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The mean of each row, shape (num_rows,)."""
        weight = pyro.sample("weight", normal_prior(x, self.prior_std, self.num_features))
        mean = x @ weight
        noise_std = self._noise_std(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, noise_std), obs=y)
        return mean

    def _noise_std(self, x: Tensor) -> Tensor:
        if self.noise_std is not None:
            return x.new_full((), self.noise_std)
        return pyro.sample("noise_std", dist.HalfNormal(x.new_full((), self.noise_prior_std)))
