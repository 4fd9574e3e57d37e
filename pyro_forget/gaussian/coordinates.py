"""A Gaussian by site: the coordinates that forgetting works on."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_forget.params import Params, flatten, unflatten


@dataclass(frozen=True)
class Gaussian:
    """N(loc, LLᵀ) over the unconstrained latents.

    Attributes:
        loc: by site, of the site's unconstrained shape.
        scale: standard deviations by site, or the Cholesky factor L of shape (d, d) over the flattened sites.
        log_scale: logarithms of the standard deviations, where they are what `scale` was made of.
    """

    loc: Params
    scale: Params | Tensor
    log_scale: Params | None = None

    @property
    def is_diagonal(self) -> bool:
        """Whether the sites' entries are independent."""
        return not isinstance(self.scale, Tensor)

    @property
    def variance(self) -> Params:
        """Marginal variances by site."""
        if isinstance(self.scale, Tensor):
            return unflatten(self.scale.square().sum(-1), self.loc)
        return {name: value.square() for name, value in self.scale.items()}

    def deviation(self, site: str) -> Tensor:
        """Marginal standard deviations of one site."""
        return self.variance[site].sqrt() if isinstance(self.scale, Tensor) else self.scale[site]

    def root_of(self, site: str) -> Tensor:
        """L's rows of one site, whose squares sum to its variances; (*site) where L is diagonal."""
        if not isinstance(self.scale, Tensor):
            return self.scale[site]
        start = 0
        for name, value in self.loc.items():
            if name == site:
                return self.scale[start : start + value.numel()]
            start += value.numel()
        raise KeyError(site)

    def log_det(self) -> Tensor:
        """Log |L|, scalar."""
        if isinstance(self.scale, Tensor):
            return self.scale.diagonal().log().sum()
        logs = self.log_scale or {name: value.log() for name, value in self.scale.items()}
        return torch.stack([value.sum() for value in logs.values()]).sum()

    def entropy(self) -> Tensor:
        """In nats, scalar."""
        size = sum(value.numel() for value in self.loc.values())
        return self.log_det() + 0.5 * size * (1 + math.log(2 * math.pi))

    def at(self, noise: Tensor) -> Params:
        """Loc + L·noise by site, for noise of shape (draws, d); each of shape (draws, *site)."""
        if isinstance(self.scale, Tensor):
            return self.split(flatten(self.loc) + noise @ self.scale.mT)
        steps = self.split(noise)
        # Of equal dims: summing a broadcast gradient would cost a pass even where there is one draw.
        return {name: torch.addcmul(self.loc[name][None], steps[name], self.scale[name][None]) for name in self.loc}

    def split(self, rows: Tensor) -> Params:
        """Rows of shape (draws, d) by site, each of shape (draws, *site)."""
        pieces = rows.split([value.numel() for value in self.loc.values()], dim=-1)
        return {
            name: piece.reshape(rows.shape[0], *value.shape)
            for (name, value), piece in zip(self.loc.items(), pieces, strict=True)
        }

    def root(self, vector: Params) -> Params:
        """L·vector."""
        if isinstance(self.scale, Tensor):
            return unflatten(self.scale @ flatten(vector), self.loc)
        return {name: value * vector[name] for name, value in self.scale.items()}

    def root_transposed(self, vector: Params) -> Params:
        """Lᵀ·vector."""
        if isinstance(self.scale, Tensor):
            return unflatten(self.scale.mT @ flatten(vector), self.loc)
        return self.root(vector)

    def detach(self) -> "Gaussian":
        """The same numbers without their graph."""
        scale = self.scale.detach() if isinstance(self.scale, Tensor) else _detached(self.scale)
        return Gaussian(_detached(self.loc), scale, self.log_scale and _detached(self.log_scale))

    def flat(self) -> tuple[Tensor, Tensor]:
        """(loc of shape (d,), scale of shape (d,) or (d, d)), float64."""
        scale = self.scale if isinstance(self.scale, Tensor) else flatten(self.scale)
        return flatten(self.loc).double(), scale.double()


def _detached(params: Params) -> Params:
    return {name: value.detach() for name, value in params.items()}
