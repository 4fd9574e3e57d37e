"""Linear regression with an effect per group."""

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_forget.models.prior import normal_prior


@dataclass(frozen=True)
class HierarchicalRegression:
    """y ~ N(x·θ_g, σ²) with θ_g ~ N(μ, τ²), μ ~ N(0, prior_std²), τ and σ ~ HalfNormal(scale_prior_std).

    Latents: `location` μ and `spread` τ, both (num_features,); `noise_std` σ (); and within the plate "groups" `effect`
    θ (num_groups, num_features) when centred, else `offset` = (θ − μ) / τ of the same shape. The number of groups is a
    setting, not read from the data: a group whose last row is erased keeps its effect, which returns to the prior.

    Attributes:
        num_features: columns of x; an intercept is a constant column.
        num_groups: groups 0, 1, …
        centred: whether effects are latents themselves (good where groups have many rows) or their offsets (few rows).
        prior_std: of μ.
        scale_prior_std: of τ, in the unit of y over x, and of σ, in the unit of y.

    Example:
        >>> import torch
        >>> HierarchicalRegression(num_features=2, num_groups=3)(torch.ones(5, 2), torch.tensor([0, 0, 1, 2, 2])).shape
        torch.Size([5])
    """

    num_features: int
    num_groups: int
    centred: bool = True
    prior_std: float = 1.0
    scale_prior_std: float = 1.0

    def __call__(self, x: Tensor, group: Tensor, y: Tensor | None = None) -> Tensor:
        """The mean of each row, shape (num_rows,); group holds int64 numbers of shape (num_rows,)."""
        location = pyro.sample("location", normal_prior(x, self.prior_std, self.num_features))
        scale_prior = dist.HalfNormal(x.new_full((), self.scale_prior_std))
        spread = pyro.sample("spread", scale_prior.expand((self.num_features,)).to_event(1))
        noise_std = pyro.sample("noise_std", scale_prior)
        with pyro.plate("groups", self.num_groups):
            effect = self._effect(x, location, spread)
        mean = (x * effect[group]).sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, noise_std), obs=y)
        return mean

    def _effect(self, x: Tensor, location: Tensor, spread: Tensor) -> Tensor:
        if self.centred:
            return pyro.sample("effect", dist.Normal(location, spread).to_event(1))
        offset = pyro.sample("offset", normal_prior(x, 1.0, self.num_features))
        return pyro.deterministic("effect", location + spread * offset, event_dim=1)
