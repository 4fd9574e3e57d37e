"""Parameters by name, and their arithmetic.

A `Params` is what every energy is a function of: unconstrained tensors by name. The functions here are the vector
space that solvers and forgetters work in; none of them changes its arguments.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Params = dict[str, Tensor]

_LONG = 1 << 20  # entries that are turned into float64 at once


def map_params(function: Callable[..., Tensor], *params: Params) -> Params:
    """Apply `function` entry by entry to params of the same names."""
    first, *others = params
    return {name: function(value, *(other[name] for other in others)) for name, value in first.items()}


def add(left: Params, right: Params) -> Params:
    """Left + right."""
    return map_params(torch.add, left, right)


def subtract(left: Params, right: Params) -> Params:
    """Left − right."""
    return map_params(torch.sub, left, right)


def scale(params: Params, factor: float | Tensor) -> Params:
    """Factor · params."""
    return map_params(lambda value: value * factor, params)


def axpy(factor: float | Tensor, step: Params, params: Params) -> Params:
    """Params + factor · step."""
    return map_params(lambda value, direction: value + factor * direction, params, step)


def dot(left: Params, right: Params) -> Tensor:
    """⟨left, right⟩, summed in float64: energies of large data differ in digits that float32 has lost."""
    return torch.stack([_product(left[name], right[name]) for name in left]).sum()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Of long tensors part by part: three float64 copies of all draws of a network are six times the draws."""
    if left.numel() <= _LONG:
        return (left.double() * right.double()).sum()
    parts = zip(left.reshape(-1).split(_LONG), right.reshape(-1).split(_LONG), strict=True)
    return torch.stack([(mine.double() * theirs.double()).sum() for mine, theirs in parts]).sum()


def gaps(left: Params, right: Params) -> dict[str, float]:
    """The Euclidean length of left − right by name, in float64; of long tensors part by part."""

    def of(mine: Tensor, theirs: Tensor) -> float:
        parts = zip(mine.reshape(-1).split(_LONG), theirs.reshape(-1).split(_LONG), strict=True)
        return math.sqrt(sum(float((one.double() - other.double()).square().sum()) for one, other in parts))

    return {name: of(value, right[name]) for name, value in left.items()}


def norm(params: Params) -> float:
    """The Euclidean norm over all entries, in float64."""
    return math.sqrt(float(dot(params, params)))


def zeros_like(params: Params) -> Params:
    """Zeros of the same names, shapes, types and devices."""
    return map_params(torch.zeros_like, params)


def clone(params: Params) -> Params:
    """A detached copy."""
    return map_params(lambda value: value.detach().clone(), params)


def size(params: Params) -> int:
    """The number of entries, over all names."""
    return sum(value.numel() for value in params.values())


def flatten(params: Params) -> Tensor:
    """One vector of shape (size,), in the order of the names."""
    return torch.cat([value.reshape(-1) for value in params.values()])


def unflatten(vector: Tensor, like: Params) -> Params:
    """The inverse of `flatten`: views of `vector` with the names and shapes of `like`."""
    pieces = vector.split([value.numel() for value in like.values()])
    return {name: piece.view_as(value) for (name, value), piece in zip(like.items(), pieces, strict=True)}


def all_finite(params: Params) -> bool:
    """Whether no entry is NaN or infinite."""
    return all(bool(torch.isfinite(value).all()) for value in params.values())
