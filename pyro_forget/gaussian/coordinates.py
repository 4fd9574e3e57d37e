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
    """

    loc: Params
    scale: Params | Tensor

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

    def log_det(self) -> Tensor:
        """Log |L|, scalar."""
        if isinstance(self.scale, Tensor):
            return self.scale.diagonal().log().sum()
        return torch.stack([value.log().sum() for value in self.scale.values()]).sum()

    def entropy(self) -> Tensor:
        """In nats, scalar."""
        size = sum(value.numel() for value in self.loc.values())
        return self.log_det() + 0.5 * size * (1 + math.log(2 * math.pi))

    def at(self, noise: Tensor) -> Params:
        """Loc + L·noise by site, for noise of shape (draws, d); each of shape (draws, *site)."""
        if isinstance(self.scale, Tensor):
            return _split_rows(flatten(self.loc) + noise @ self.scale.mT, self.loc)
        steps = _split_rows(noise, self.loc)
        return {name: torch.addcmul(self.loc[name], steps[name], self.scale[name]) for name in self.loc}

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
        return Gaussian(_detached(self.loc), scale)

    def flat(self) -> tuple[Tensor, Tensor]:
        """(loc of shape (d,), scale of shape (d,) or (d, d)), float64."""
        scale = self.scale if isinstance(self.scale, Tensor) else flatten(self.scale)
        return flatten(self.loc).double(), scale.double()


def _split_rows(rows: Tensor, like: Params) -> Params:
    pieces = rows.split([value.numel() for value in like.values()], dim=-1)
    return {
        name: piece.reshape(rows.shape[0], *value.shape)
        for (name, value), piece in zip(like.items(), pieces, strict=True)
    }


def _detached(params: Params) -> Params:
    return {name: value.detach() for name, value in params.items()}
