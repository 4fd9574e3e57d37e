"""Posteriors with draws at hand: exact for linear regression, from many short chains for logistic regression."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus


@dataclass(frozen=True)
class Regression:
    """y ~ N(x w, 1), w ~ N(0, 4 I): every posterior is Gaussian."""

    x: Tensor
    y: Tensor

    @classmethod
    def drawn(cls, num_data: int, dim: int, seed: int) -> "Regression":
        """Data from the model; the last third has its signal turned round, so that erasing it matters."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num_data, dim, generator=generator)
        signal = x @ torch.linspace(1, 2, dim)
        signal[-num_data // 3 :] *= -0.5
        return cls(x, signal + torch.randn(num_data, generator=generator))

    def rows(self, chosen: slice | Tensor) -> "Regression":
        return Regression(self.x[chosen], self.y[chosen])

    def log_likelihood(self, draws: Tensor) -> Tensor:
        return -0.5 * (self.y - draws @ self.x.T).square().sum(-1)

    def log_joint(self, draws: Tensor) -> Tensor:
        return self.log_likelihood(draws) - draws.square().sum(-1) / 8

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Mean and Cholesky factor of the covariance."""
        precision = self.x.T @ self.x + torch.eye(self.x.shape[1]) / 4
        return torch.linalg.solve(precision, self.x.T @ self.y), torch.linalg.cholesky(torch.linalg.inv(precision))

    def sample(self, num_draws: int, seed: int) -> Tensor:
        mean, factor = self.posterior()
        noise = torch.randn(num_draws, len(mean), generator=torch.Generator().manual_seed(seed))
        return mean + noise @ factor.T


@dataclass(frozen=True)
class Logistic:
    """y ~ Bernoulli(sigmoid(x w)), w ~ N(0, I)."""

    x: Tensor
    y: Tensor

    @classmethod
    def drawn(cls, seed: int, num_data: int = 300, dim: int = 8) -> "Logistic":
        """Columns of N(0, 1) scaled by 1 to 2, weights and labels from the model, rows by ascending margin."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num_data, dim, generator=generator) * torch.linspace(1, 2, dim)
        logits = x @ torch.randn(dim, generator=generator)
        y = (torch.rand(num_data, generator=generator) < logits.sigmoid()).to(x)
        order = ((2 * y - 1) * logits).argsort()
        return cls(x[order], y[order])

    def rows(self, chosen: slice | Tensor) -> "Logistic":
        return Logistic(self.x[chosen], self.y[chosen])

    def log_likelihood(self, draws: Tensor) -> Tensor:
        logits = draws @ self.x.T
        return logits @ self.y - softplus(logits).sum(-1)

    def log_joint(self, draws: Tensor) -> Tensor:
        return self.log_likelihood(draws) - draws.square().sum(-1) / 2

    def gradient(self, draws: Tensor) -> Tensor:
        return (self.y - (draws @ self.x.T).sigmoid()) @ self.x - draws

    def precision(self, weights: Tensor) -> Tensor:
        """Minus the Hessian of the log joint at one draw."""
        p = (self.x @ weights).sigmoid()
        return (self.x.T * (p * (1 - p))) @ self.x + torch.eye(len(weights))

    def laplace(self) -> tuple[Tensor, Tensor]:
        """The mode, and a Cholesky factor of the inverse precision there."""
        mode = torch.zeros(self.x.shape[1])
        for _ in range(50):
            step = torch.linalg.solve(self.precision(mode), self.gradient(mode[None])[0])
            mode = mode + step / max(1.0, float(step.norm()))
        return mode, torch.linalg.cholesky(torch.linalg.inv(self.precision(mode)))

    def sample(self, num_draws: int, seed: int, num_steps: int = 60) -> Tensor:
        """The ends of as many independent chains of preconditioned MALA, started at the Laplace approximation."""
        generator = torch.Generator().manual_seed(seed)
        mode, factor = self.laplace()
        size = 1.2 * len(mode) ** (-1 / 6)

        def at(draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            drift = draws + 0.5 * size**2 * self.gradient(draws) @ factor @ factor.T
            return draws, drift, self.log_joint(draws)

        def log_proposal(draws: Tensor, drift: Tensor) -> Tensor:
            whitened = torch.linalg.solve_triangular(factor, (draws - drift).T, upper=False)
            return -0.5 * whitened.square().sum(0) / size**2

        here = at(mode + torch.randn(num_draws, len(mode), generator=generator) @ factor.T)
        for _ in range(num_steps):
            there = at(here[1] + size * torch.randn(num_draws, len(mode), generator=generator) @ factor.T)
            ratio = there[2] - here[2] + log_proposal(here[0], there[1]) - log_proposal(there[0], here[1])
            accept = torch.rand(num_draws, generator=generator).log() < ratio
            masks = (accept[:, None], accept[:, None], accept)
            here = tuple(torch.where(mask, b, a) for mask, a, b in zip(masks, here, there, strict=True))
        return here[0]
