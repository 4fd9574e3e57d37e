"""Exact answers to compare with: conjugate posteriors, closed forms, dense derivatives."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_forget.params import Params, axpy, flatten, unflatten


@dataclass(frozen=True)
class LinearGaussian:
    """y ~ N(x·w, noise²), w ~ N(0, prior_std²): its posterior is Gaussian, and so are its best Gaussian guides."""

    x: Tensor
    y: Tensor
    prior_std: float
    noise: float

    def without(self, rows: list[int]) -> "LinearGaussian":
        """The same without these rows."""
        kept = [row for row in range(len(self.y)) if row not in rows]
        return LinearGaussian(self.x[kept], self.y[kept], self.prior_std, self.noise)

    @property
    def precision(self) -> Tensor:
        return self.x.T @ self.x / self.noise**2 + torch.eye(self.x.shape[1]) / self.prior_std**2

    @property
    def covariance(self) -> Tensor:
        return torch.linalg.inv(self.precision)

    @property
    def mean(self) -> Tensor:
        return self.covariance @ self.x.T @ self.y / self.noise**2

    @property
    def mean_field(self) -> Tensor:
        """Standard deviations of the best independent Gaussians, the minimisers of KL(q ‖ p); their mean is exact."""
        return self.precision.diagonal().rsqrt()

    def kl_to_prior(self, loc: Tensor, covariance: Tensor) -> Tensor:
        return gaussian_kl(loc, covariance, torch.zeros_like(loc), self.prior_std**2 * torch.eye(len(loc)))

    def expected_loss(self, loc: Tensor, covariance: Tensor) -> Tensor:
        """E_q[−log likelihood] by row."""
        spread = torch.einsum("ni,ij,nj->n", self.x, covariance, self.x)
        squares = (self.y - self.x @ loc).square() + spread
        return 0.5 * squares / self.noise**2 + math.log(self.noise) + 0.5 * math.log(2 * math.pi)

    def energy(self, loc: Tensor, covariance: Tensor) -> Tensor:
        """−ELBO of q = N(loc, covariance)."""
        return self.kl_to_prior(loc, covariance) + self.expected_loss(loc, covariance).sum()

    def log_evidence(self) -> Tensor:
        """log p(y)."""
        marginal = self.prior_std**2 * self.x @ self.x.T + self.noise**2 * torch.eye(len(self.y))
        normal = torch.distributions.MultivariateNormal(torch.zeros_like(self.y), marginal)
        return normal.log_prob(self.y)


def gaussian_kl(loc: Tensor, covariance: Tensor, other_loc: Tensor, other_covariance: Tensor) -> Tensor:
    """KL(N(loc, covariance) ‖ N(other_loc, other_covariance)) as torch has it."""
    normal = torch.distributions.MultivariateNormal
    return torch.distributions.kl_divergence(normal(loc, covariance), normal(other_loc, other_covariance))


def normal_expectation(function: Callable[[Tensor], Tensor], loc: Tensor, scale: Tensor, nodes: int = 80) -> Tensor:
    """E[f(u)], u ~ N(loc, scale²) of one dimension, by Gauss-Hermite quadrature."""
    points, weights = (torch.as_tensor(part) for part in np.polynomial.hermite_e.hermegauss(nodes))
    return (weights / weights.sum()) @ function(loc + scale * points)


def dense_gradient(function: Callable[[Params], Tensor], params: Params) -> Tensor:
    """∇f as one vector."""
    leaf = flatten(params).detach().requires_grad_(True)
    (found,) = torch.autograd.grad(function(unflatten(leaf, params)), leaf)
    return found


def dense_hessian(function: Callable[[Params], Tensor], params: Params) -> Tensor:
    """∇²f as one matrix, by double backward."""
    leaf = flatten(params).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(function(unflatten(leaf, params)), leaf, create_graph=True)
    rows = [torch.autograd.grad(entry, leaf, retain_graph=True)[0] for entry in gradient]
    return torch.stack(rows)


def finite_difference(function: Callable[[Params], Tensor], params: Params, direction: Params) -> Tensor:
    """⟨∇f, direction⟩ by a central difference."""
    ends = [axpy(sign * 1e-5, direction, params) for sign in (1, -1)]
    return (function(ends[0]) - function(ends[1])).detach() / 2e-5
