"""A mixture of round Gaussians with unknown centres."""

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_forget.data import Batch
from pyro_forget.energy import FunctionEnergy
from pyro_forget.models.prior import normal_prior
from pyro_forget.params import Params


@dataclass(frozen=True)
class GaussianMixture:
    """x ~ 1/K Σ_k N(μ_k, std²·I) with μ_k ~ N(0, prior_std²·I), assignments summed out.

    Latent: `centres` μ, shape (num_components, num_dims).

    Attributes:
        num_components: K.
        num_dims: columns of x.
        std: of each component, in the unit of x.
        prior_std: of the centres, likewise.

    Example:
        >>> GaussianMixture(num_components=4)(torch.zeros(5, 2)).shape
        torch.Size([4, 2])
    """

    num_components: int
    num_dims: int = 2
    std: float = 1.0
    prior_std: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """The centres; x of shape (num_rows, num_dims) is observed."""
        centres = pyro.sample("centres", normal_prior(x, self.prior_std, self.num_components, self.num_dims))
        components = dist.Independent(dist.Normal(centres, torch.full_like(centres, self.std)), 1)
        shares = dist.Categorical(logits=centres.new_zeros(self.num_components))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MixtureSameFamily(shares, components), obs=x)
        return centres

    def bound(self) -> FunctionEnergy:
        """−ELBO of q(μ) = N(loc, exp(log_scale)²) with each row's responsibilities at their best.

        Params: `loc` and `log_scale`, both (num_components, num_dims). A row's share is
        h = −log 1/K Σ_k exp E_q[log N(x; μ_k, std²·I)], which is the bound at the optimal responsibilities.

        References:
            S. Fu, F. He and D. Tao (2021), Bayesian inference forgetting, arXiv:2101.06417, section 5.1.
        """
        return FunctionEnergy(lambda params, batch: self._divergence(params) + self._share(params, batch), self._share)

    def log_density(self, loc: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        """Log posterior predictive density of rows under q(μ) = N(loc, scale²), exactly; shape (num_rows,), nats."""
        wide = (scale.square() + self.std**2).sqrt()
        by_component = dist.Normal(loc, wide).log_prob(x[:, None]).sum(-1)
        return by_component.logsumexp(-1) - math.log(self.num_components)

    def _share(self, params: Params, batch: Batch) -> Tensor:
        (x,) = batch.args
        squares = (x[:, None] - params["loc"]).square() + (2 * params["log_scale"]).exp()
        constant = 0.5 * self.num_dims * math.log(2 * math.pi * self.std**2)
        expected = -0.5 * squares.sum(-1) / self.std**2 - constant
        return -(expected.logsumexp(-1) - math.log(self.num_components)).sum()

    def _divergence(self, params: Params) -> Tensor:
        """KL(q ‖ prior), nats."""
        ratio = ((2 * params["log_scale"]).exp() + params["loc"].square()) / self.prior_std**2
        return 0.5 * (ratio - 1).sum() - params["log_scale"].sum() + params["loc"].numel() * math.log(self.prior_std)
