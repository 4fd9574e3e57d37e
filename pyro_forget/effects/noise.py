"""Pinned noise with exact moments.

An energy with fresh noise in every evaluation has no Hessian, and noise keyed by a row's place in its batch breaks
the law that energies add. So noise is drawn once from a seed, and noise that belongs to a row follows the row's id.

With P antithetic pairs ±√P·Q, Q of orthonormal columns, the first and the full second moments of k ≤ P standard
normal coordinates are exact; then linear-Gaussian models are solved exactly.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_forget.data import MADE_UP, positions_of

BLOCK = 1024
GAUSS_HERMITE_NODES = 7
_MAX_CACHED_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class Noise:
    """Which noise an energy uses.

    Attributes:
        seed: of everything below.
        pairs: antithetic pairs; 2 · pairs draws in all.
        antithetic: False for `pairs` independent draws without moments, the noise of plain stochastic training.
        keyed: False for noise that goes by a row's place in its batch: cheaper, and enough where every batch gets a
            seed of its own.
    """

    seed: int = 0
    pairs: int = 1
    antithetic: bool = True
    keyed: bool = True

    @staticmethod
    def fresh(seed: int, num_draws: int) -> "Noise":
        """Independent draws for one batch of stochastic training."""
        return Noise(seed, num_draws, antithetic=False, keyed=False)

    @property
    def num_draws(self) -> int:
        """How many draws an expectation is the mean of."""
        return 2 * self.pairs if self.antithetic else self.pairs

    def weights(self, like: Tensor) -> Tensor:
        """Shape (num_draws,): the weight of each draw."""
        return torch.full((self.num_draws,), 1.0 / self.num_draws, dtype=like.dtype, device=like.device)

    def normal(self, size: int, like: Tensor) -> Tensor:
        """Standard normal noise shared by all rows, shape (num_draws, size), of the type and device of `like`."""
        generator = seeded(like.device, self.seed)
        if not self.antithetic:
            return torch.randn(self.pairs, size, generator=generator, dtype=like.dtype, device=like.device)
        return antithetic_frames(1, self.pairs, size, generator, like).squeeze(0)


def antithetic_frames(rows: int, pairs: int, size: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Noise of shape (rows, 2 · pairs, size), each row its own random orthonormal frame and its mirror image.

    Where size > pairs no frame exists and the moments are antithetic only.
    """
    draws = torch.randn(rows, pairs, size, generator=generator, dtype=like.dtype, device=like.device)
    if size <= pairs:
        draws = math.sqrt(pairs) * torch.linalg.qr(draws).Q
    return torch.cat([draws, -draws], dim=1)


def seeded(device: torch.device, *seed: int) -> torch.Generator:
    """A generator of its own on `device`, from a seed of any number of integers."""
    mixed = np.random.SeedSequence([part % 2**32 for part in seed]).generate_state(2, np.uint32)
    return torch.Generator(device=device).manual_seed(int(mixed[0]) << 31 | int(mixed[1]) >> 1)


class RowNoise:
    """Noise of one auxiliary site for any rows, keyed by their ids.

    Positions among the posterior's ids fall into blocks of 1,024, each drawn from (seed, site, block): torch has no
    generator a row, and a block a time needs no memory that grows with the data.
    """

    def __init__(self, noise: Noise, ids: Tensor, site: int, shape: torch.Size) -> None:
        self.noise, self.ids, self.site, self.shape = noise, ids, site, shape
        self._cached: dict[tuple[int, str, torch.dtype], Tensor] = {}

    def __call__(self, ids: Tensor, like: Tensor) -> Tensor:
        """Shape (num_draws, rows, *shape)."""
        if int(ids[0]) == MADE_UP:
            return torch.zeros(self.noise.num_draws, len(ids), *self.shape, dtype=like.dtype, device=like.device)
        if not self.noise.keyed:
            generator = seeded(like.device, self.noise.seed, self.site + 1)
            shape = (self.noise.num_draws, len(ids), *self.shape)
            return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
        places = positions_of(ids, self.ids, "the posterior")
        blocks, inverse = (places // BLOCK).unique(return_inverse=True)
        drawn = torch.cat([self._block(int(block), like) for block in blocks], dim=1)
        if len(ids) == drawn.shape[1] and bool((places.diff() == 1).all()):
            return drawn
        starts = torch.tensor([0, *(self._rows_of(int(block)) for block in blocks)]).cumsum(0)[:-1]
        return drawn.index_select(1, (starts[inverse] + places % BLOCK).to(drawn.device))

    def _rows_of(self, block: int) -> int:
        return min(BLOCK, len(self.ids) - block * BLOCK)

    def _block(self, block: int, like: Tensor) -> Tensor:
        """Shape (num_draws, rows of the block, *shape), kept where it is small."""
        key = (block, str(like.device), like.dtype)
        if key in self._cached:
            return self._cached[key]
        rows, size = self._rows_of(block), math.prod(self.shape)
        generator = seeded(like.device, self.noise.seed, self.site + 1, block)
        if self.noise.antithetic:
            drawn = antithetic_frames(rows, self.noise.pairs, size, generator, like).transpose(0, 1)
        else:
            drawn = torch.randn(self.noise.pairs, rows, size, generator=generator, dtype=like.dtype, device=like.device)
        drawn = drawn.reshape(-1, rows, *self.shape).contiguous()
        if sum(kept.numel() for kept in self._cached.values()) + drawn.numel() <= _MAX_CACHED_ELEMENTS:
            self._cached[key] = drawn
        return drawn


@dataclass(frozen=True)
class Quadrature:
    """Gauss-Hermite nodes for noise of a single output, where antithetic frames would be ±1 whatever the seed."""

    nodes: int = GAUSS_HERMITE_NODES

    @property
    def num_draws(self) -> int:
        """How many nodes."""
        return self.nodes

    def points_and_weights(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes and weights of ∫ f(x) N(x; 0, 1) dx, each of shape (nodes,)."""
        points, weights = np.polynomial.hermite_e.hermegauss(self.nodes)
        weights = weights / weights.sum()
        return (
            torch.as_tensor(points, dtype=like.dtype, device=like.device),
            torch.as_tensor(weights, dtype=like.dtype, device=like.device),
        )
