"""Pinned noise with exact moments.

An energy with fresh noise in every evaluation has no Hessian, and noise keyed by a row's place in its batch breaks
the law that energies add. So noise is drawn once from a seed, and noise that belongs to a row follows the row's id.

With P antithetic pairs ±√P·Q, Q of orthonormal columns, the first and the full second moments of k ≤ P standard
normal coordinates are exact; then linear-Gaussian models are solved exactly.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_forget.data import MADE_UP, Index

BLOCK = 1024
GAUSS_HERMITE_NODES = 7
_MAX_POOL = 128
_MAX_KEPT_ELEMENTS = 1_000_000
_RECENT, _MAX_RECENT_ELEMENTS = 3, 4_000_000  # erased, retained and a probe of a request


@dataclass(frozen=True)
class Noise:
    """Which noise an energy uses.

    Attributes:
        seed: of everything below.
        pairs: antithetic pairs; 2 · pairs draws in all.
        antithetic: False for `pairs` independent draws without moments, the noise of plain stochastic training.
        keyed: False for noise that goes by a row's place in its batch: cheaper, and enough where every batch gets a
            seed of its own.
        framed: False for antithetic pairs that are independent of each other, whose second moments are not exact.
    """

    seed: int = 0
    pairs: int = 1
    antithetic: bool = True
    keyed: bool = True
    framed: bool = True

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
        if self.has_frames(size):
            draws = math.sqrt(self.pairs) * orthonormal_frames(1, self.pairs, size, generator, like).squeeze(0)
        else:
            draws = torch.randn(self.pairs, size, generator=generator, dtype=like.dtype, device=like.device)
        return torch.cat([draws, -draws])

    def has_frames(self, size: int) -> bool:
        """Whether `size` coordinates come as a random orthonormal frame and its mirror image, with exact moments.

        Where size > pairs no frame exists and the moments are antithetic only.
        """
        return self.antithetic and self.framed and size <= self.pairs


def orthonormal_frames(count: int, length: int, size: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Matrices of `size` orthonormal columns, uniform and independent, shape (count, length, size)."""
    q, r = torch.linalg.qr(torch.randn(count, length, size, generator=generator, dtype=like.dtype, device=like.device))
    # Householder's Q alone is not uniform: its signs follow a convention.
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]


def seeded(device: torch.device, *seed: int) -> torch.Generator:
    """A generator of its own on `device`, from a seed of any number of integers."""
    mixed = np.random.SeedSequence([part % 2**32 for part in seed]).generate_state(2, np.uint32)
    return torch.Generator(device=device).manual_seed(int(mixed[0]) << 31 | int(mixed[1]) >> 1)


class RowNoise:
    """Noise of one auxiliary site for any rows, keyed by their ids.

    Positions among the posterior's ids fall into blocks of 1,024, each drawn from (seed, site, block): torch has no
    generator a row, and a block a time needs no memory that grows with the data. A row's frame is one of a small pool
    of random orthogonal matrices times a random frame of the row's group, one row of each group for each of the pool.
    Frames made so are uniform and independent in pairs, which is all that the variance of a sum over rows depends on,
    and cost a matrix product in place of a factorisation each.
    """

    def __init__(self, noise: Noise, ids: Tensor, site: int, shape: torch.Size) -> None:
        self.noise, self.ids, self.site, self.shape = noise, ids, site, shape
        self._blocks: OrderedDict[tuple[int, str, torch.dtype], Tensor] = OrderedDict()
        self._pools: dict[tuple[str, torch.dtype], Tensor] = {}
        self._index: Index | None = None
        self._recent: list[tuple[Tensor, Tensor]] = []

    def __call__(self, ids: Tensor, like: Tensor) -> Tensor:
        """Shape (num_draws, rows, *shape)."""
        if int(ids[0]) == MADE_UP:
            return torch.zeros(self.noise.num_draws, len(ids), *self.shape, dtype=like.dtype, device=like.device)
        if not self.noise.keyed:
            generator = seeded(like.device, self.noise.seed, self.site + 1)
            shape = (self.noise.num_draws, len(ids), *self.shape)
            return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
        # The same tensor of ids, not only the same ids: data that are one batch hand it out every time.
        for known, kept in self._recent:
            if known is ids and kept.dtype == like.dtype and kept.device == like.device:
                return kept
        drawn = self._keyed(ids, like)
        if drawn.numel() <= _MAX_RECENT_ELEMENTS:
            self._recent = [(ids, drawn), *self._recent[: _RECENT - 1]]
        return drawn

    def _keyed(self, ids: Tensor, like: Tensor) -> Tensor:
        self._index = self._index or Index(self.ids, "the posterior")
        places = self._index.positions(ids)
        in_order, order = places.sort()
        blocks, counts = (in_order // BLOCK).unique_consecutive(return_counts=True)
        # A block at a time: a few rows from all over the data must not bring all blocks into memory.
        pieces = [
            _rows(self._block(int(block), like), own % BLOCK)
            for block, own in zip(blocks, in_order.split(counts.tolist()), strict=True)
        ]
        drawn = torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]
        return drawn if bool((places == in_order).all()) else drawn.index_select(1, order.argsort().to(drawn.device))

    def _rows_of(self, block: int) -> int:
        return min(BLOCK, len(self.ids) - block * BLOCK)

    def _block(self, block: int, like: Tensor) -> Tensor:
        """Shape (num_draws, rows of the block, *shape); those used last are kept."""
        key = (block, str(like.device), like.dtype)
        if key not in self._blocks:
            self._blocks[key] = self._draw(block, like)
        self._blocks.move_to_end(key)
        # Two whatever their size: a batch that straddles blocks leaves the second one for the next batch.
        while len(self._blocks) > 2 and sum(kept.numel() for kept in self._blocks.values()) > _MAX_KEPT_ELEMENTS:
            self._blocks.popitem(last=False)
        return self._blocks[key]

    def _draw(self, block: int, like: Tensor) -> Tensor:
        rows, size, pairs = self._rows_of(block), math.prod(self.shape), self.noise.pairs
        generator = seeded(like.device, self.noise.seed, self.site + 1, block)
        if self.noise.has_frames(size):
            pool = self._pool(like)
            turns = orthonormal_frames(-(-rows // len(pool)), pairs, size, generator, like)
            drawn = (math.sqrt(pairs) * (pool.flatten(0, 1) @ turns)).reshape(-1, pairs, size)[:rows].transpose(0, 1)
        else:
            drawn = torch.randn(pairs, rows, size, generator=generator, dtype=like.dtype, device=like.device)
        drawn = torch.cat([drawn, -drawn]) if self.noise.antithetic else drawn
        return drawn.reshape(-1, rows, *self.shape)

    def _pool(self, like: Tensor) -> Tensor:
        """Random orthogonal matrices, shape (frame, pairs, pairs)."""
        key = (str(like.device), like.dtype)
        if key not in self._pools:
            pairs = self.noise.pairs
            size = max(1, min(_MAX_POOL, _MAX_KEPT_ELEMENTS // pairs**2))
            generator = seeded(like.device, self.noise.seed, self.site + 1)
            self._pools[key] = orthonormal_frames(size, pairs, pairs, generator, like)
        return self._pools[key]


def _rows(block: Tensor, rows: Tensor) -> Tensor:
    """Some rows of a block, ascending; a view where they are a run of half of it, for a view keeps all of it alive."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows) and 2 * len(rows) >= block.shape[1]:
        return block.narrow(1, first, len(rows))
    return block.index_select(1, rows.to(block.device))


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
