"""Where each site's entries stand in the one array that all chains are."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from pyro_forget.params import Params

_LONG = 1024


@dataclass(frozen=True)
class Layout:
    """Chains as one flat array: site after site, within a site chain after chain.

    Updates then are a few passes over one array, whatever the sites, and the entries of a site in all chains lie
    together, as batched matrix products want them.

    Attributes:
        shapes: unconstrained shape of each site.
        num_chains: side by side.
        turned: sites whose last two dims are kept the other way round, because their gradients come so.
    """

    shapes: Mapping[str, torch.Size]
    num_chains: int = 1
    turned: frozenset[str] = frozenset()

    @cached_property
    def sizes(self) -> list[int]:
        """Entries of each site in one chain."""
        return [prod(shape) for shape in self.shapes.values()]

    @cached_property
    def size(self) -> int:
        """Entries of one chain."""
        return sum(self.sizes)

    def pieces(self, flat: Tensor) -> list[Tensor]:
        """Each site's entries, (chain, entry), contiguous."""
        parts = flat.split([size * self.num_chains for size in self.sizes])
        return [part.view(self.num_chains, -1) for part in parts]

    def views(self, flat: Tensor) -> Params:
        """Views of shape (chain, *site)."""
        return self._views(flat, (self.num_chains,))

    def leaves(self, flat: Tensor) -> Params:
        """Views to differentiate with respect to, (chain, *site), or (*site) of one chain."""
        found = self._views(flat.detach(), () if self.num_chains == 1 else (self.num_chains,))
        return {name: view.requires_grad_() for name, view in found.items()}

    def _views(self, flat: Tensor, lead: tuple[int, ...]) -> Params:
        parts = flat.split([size * self.num_chains for size in self.sizes])
        return {
            name: part.view((*lead, *_turned(shape))).mT if name in self.turned else part.view((*lead, *shape))
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def join(self, values: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
        """(chain, *site) by site to the flat array."""
        return torch.cat(self._parts(values), out=out)

    def join_added(self, values: Mapping[str, Tensor], flat: Tensor, factor: float, out: Tensor) -> Tensor:
        """`join(values)` + factor·`flat`, in one pass."""
        sizes = [size * self.num_chains for size in self.sizes]
        for part, addend, target in zip(self._parts(values), flat.split(sizes), out.split(sizes), strict=True):
            torch.add(part, addend, alpha=factor, out=target)
        return out

    def spread(self, numbers: Tensor) -> Tensor:
        """(chain, site), a number for all entries of a site, to the flat array."""
        columns = zip(numbers.unbind(1), self.sizes, strict=True)
        return torch.cat([column.repeat_interleave(size) for column, size in columns])

    def sums(self, flat: Tensor) -> Tensor:
        """Sum over each site's entries, (chain, site)."""
        return torch.stack([piece.sum(1) for piece in self.pieces(flat)], dim=1)

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        """Inner product of each chain, (chain,), float64 over sites."""
        if self.num_chains == 1:
            return torch.dot(left, right).double().reshape(1)
        pairs = zip(self.pieces(left), self.pieces(right), strict=True)
        return torch.stack([_row_products(one, other) for one, other in pairs]).double().sum(0)

    def shorten(self, flat: Tensor, most: float) -> Tensor:
        """Cut each chain's part of `flat`, in place, to a Euclidean length of `most`; which were cut, (chain,)."""
        lengths = self.dot(flat, flat).sqrt()
        longer = lengths > most
        if bool(longer.any()):
            factors = torch.where(longer, most / lengths, 1.0).to(flat)
            for piece in self.pieces(flat):
                piece.mul_(factors[:, None])
        return longer

    def _parts(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Each site's entries in the order in which they are kept, flat."""
        parts = [values[name].mT if name in self.turned else values[name] for name in self.shapes]
        return [part.reshape(-1) for part in parts]


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows; those of long ones without an array of products."""
    if left.shape[1] < _LONG:
        return (left * right).sum(1)
    return torch.stack([torch.dot(one, other) for one, other in zip(left, right, strict=True)])


def _turned(shape: torch.Size) -> tuple[int, ...]:
    return *shape[:-2], shape[-1], shape[-2]
