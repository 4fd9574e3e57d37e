"""Affine maps of draws."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_forget.importance import normalise


@dataclass(frozen=True)
class Affine:
    """The map θ ↦ Aθ + b of draws of shape (draw, d), with `matrix` A of shape (d, d) and `offset` b of shape (d,)."""

    matrix: Tensor
    offset: Tensor

    @classmethod
    def identity(cls, like: Tensor) -> "Affine":
        """The map that moves nothing, for draws like these."""
        dim = like.shape[-1]
        return cls(torch.eye(dim, dtype=like.dtype, device=like.device), like.new_zeros(dim))

    @property
    def log_det(self) -> Tensor:
        """log|det A|; −inf for a singular matrix."""
        return torch.linalg.slogdet(self.matrix).logabsdet

    def __call__(self, draws: Tensor) -> Tensor:
        """Aθ + b of each row."""
        return draws @ self.matrix.T + self.offset

    def after(self, first: "Affine") -> "Affine":
        """The composition self ∘ first."""
        return Affine(self.matrix @ first.matrix, self.matrix @ first.offset + self.offset)


def affine_fit(draws: Tensor, moved: Tensor) -> Affine:
    """The affine map from `draws` to `moved`, both of shape (draw, d), by least squares.

    Raises:
        ValueError: the draws do not span the space: fewer than d + 2 of them, or a constant or collinear column.
    """
    draws, moved = draws.double(), moved.double()
    mean, factor = cloud_moments(draws, torch.zeros_like(draws[:, 0]), diagonal=False)
    if factor is None:
        raise ValueError(
            f"an affine fit in {draws.shape[1]} dimensions needs more than the {len(draws)} draws given, "
            "or draws without constant and collinear columns."
        )
    centred = draws - mean
    cross = centred.T @ (moved - moved.mean(0)) / len(draws)
    matrix = torch.cholesky_solve(cross, factor).T
    return Affine(matrix, moved.mean(0) - matrix @ mean)


def cloud_moments(draws: Tensor, log_weights: Tensor, diagonal: bool) -> tuple[Tensor, Tensor | None]:
    """Weighted mean and Cholesky factor of the weighted covariance, None where that is singular."""
    weights = normalise(log_weights).exp()
    mean = weights @ draws
    centred = draws - mean
    covariance = (weights * centred.T) @ centred
    if diagonal:
        covariance = covariance.diagonal().diag()
    factor, info = torch.linalg.cholesky_ex(covariance)
    usable = not bool(info) and bool(factor.isfinite().all())
    return mean, factor if usable else None
