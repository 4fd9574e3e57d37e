"""Linear operators on params, and their small algebra.

A curvature is a matrix too large to write down: all that a solver needs is its product with a vector. The classes
here compose such products, A + λD and LᵀAL, and wrap one another instead of inheriting.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_forget.params import Params, axpy, flatten, map_params, scale, size, unflatten


@runtime_checkable
class LinearOperator(Protocol):
    """A symmetric matrix A on params, known by its products."""

    def mv(self, vector: Params) -> Params:
        """A · vector, with the names, shapes and types of `vector`."""
        ...


@runtime_checkable
class BlockOperator(LinearOperator, Protocol):
    """An operator that multiplies many vectors faster than one after another."""

    def matmat(self, block: Params) -> Params:
        """A · each row of `block`, whose tensors have one more leading dimension."""
        ...


def matmat(operator: LinearOperator, block: Params) -> Params:
    """A · each row of `block` (tensors with one more leading dimension); a loop unless the operator knows better."""
    if isinstance(operator, BlockOperator):
        return operator.matmat(block)
    return map_rows(operator.mv, block)


def map_rows(function: Callable[[Params], Params], block: Params) -> Params:
    """Stack `function` of each row of `block`; every tensor has the same leading dimension, at least 1."""
    num_rows = len(next(iter(block.values())))
    images = [function({name: value[row] for name, value in block.items()}) for row in range(num_rows)]
    return {name: torch.stack([image[name] for image in images]) for name in images[0]}


@dataclass(frozen=True)
class FunctionOperator:
    """The operator whose product is `function`."""

    function: Callable[[Params], Params]

    def mv(self, vector: Params) -> Params:
        """function(vector)."""
        return self.function(vector)


@dataclass(frozen=True)
class MatrixOperator:
    """A dense matrix, for tests and for small problems.

    Attributes:
        matrix: shape (size, size), rows and columns in the order of the names of `like`.
        like: names, shapes and types of the vectors.
    """

    matrix: Tensor
    like: Params

    def __post_init__(self) -> None:
        expected = (size(self.like), size(self.like))
        if tuple(self.matrix.shape) != expected:
            raise ValueError(
                f"`matrix` has shape {tuple(self.matrix.shape)}, but `like` has {expected[0]} entries: "
                f"pass a matrix of shape {expected}."
            )

    def mv(self, vector: Params) -> Params:
        """The matrix times `vector`."""
        return from_vector(self.matrix @ to_vector(vector, self.like).to(self.matrix.dtype), self.like)

    def matmat(self, block: Params) -> Params:
        """The matrix times each row."""
        rows = to_rows(block, self.like).to(self.matrix.dtype)
        return from_rows(rows @ self.matrix.T, self.like)


@dataclass(frozen=True)
class Scaled:
    """factor · A."""

    operator: LinearOperator
    factor: float

    def mv(self, vector: Params) -> Params:
        """The product with A, scaled."""
        return scale(self.operator.mv(vector), self.factor)

    def matmat(self, block: Params) -> Params:
        """The products with A, scaled."""
        return scale(matmat(self.operator, block), self.factor)


@dataclass(frozen=True)
class Shifted:
    """A + λD: damping by the identity, or by a diagonal metric D (Levenberg 1944; Marquardt 1963).

    Attributes:
        operator: A.
        damping: λ ≥ 0.
        metric: the diagonal of D; None for the identity. A guide's own precisions damp each parameter on its own scale.
    """

    operator: LinearOperator
    damping: float
    metric: Params | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"`damping` is {self.damping}: pass a finite number that is not negative.")

    def mv(self, vector: Params) -> Params:
        """A v + λ D v."""
        return axpy(self.damping, self._weighted(vector), self.operator.mv(vector))

    def matmat(self, block: Params) -> Params:
        """(A + λD) · each row."""
        return axpy(self.damping, self._weighted(block), matmat(self.operator, block))

    def _weighted(self, vector: Params) -> Params:
        return vector if self.metric is None else map_params(torch.mul, vector, self.metric)


@dataclass(frozen=True)
class Congruence:
    """LᵀAL: A seen in the coordinates u of x = L u. Its solution u for the right-hand side Lᵀb gives x = L u.

    Attributes:
        operator: A.
        root: the diagonal of L, or the pair of functions v ↦ L v and v ↦ Lᵀ v.
    """

    operator: LinearOperator
    root: Params | tuple[Callable[[Params], Params], Callable[[Params], Params]]

    def mv(self, vector: Params) -> Params:
        """LᵀA L v."""
        return self.transposed(self.operator.mv(self.forward(vector)))

    def forward(self, vector: Params) -> Params:
        """L v."""
        return self.root[0](vector) if isinstance(self.root, tuple) else map_params(torch.mul, vector, self.root)

    def transposed(self, vector: Params) -> Params:
        """Lᵀ v."""
        return self.root[1](vector) if isinstance(self.root, tuple) else map_params(torch.mul, vector, self.root)

    def matmat(self, block: Params) -> Params:
        """LᵀAL · each row."""
        return map_rows(self.transposed, matmat(self.operator, map_rows(self.forward, block)))


@dataclass(frozen=True)
class FlatOperator:
    """An operator on plain vectors: the boundary between params and linear algebra.

    Vectors of any floating type come in and go out; the product itself runs in the types of `like`.
    """

    operator: LinearOperator
    like: Params

    def mv(self, vector: Tensor) -> Tensor:
        """A · vector, shape (size,)."""
        image = self.operator.mv(from_vector(vector, self.like))
        return to_vector(image, self.like).to(vector.dtype).detach()

    def matmat(self, rows: Tensor) -> Tensor:
        """A · each of the rows, shape (row, size)."""
        if len(rows) == 1:  # a block of one costs more than it saves
            return self.mv(rows[0])[None]
        image = matmat(self.operator, from_rows(rows, self.like))
        return to_rows(image, self.like).to(rows.dtype).detach()


def as_matrix(operator: LinearOperator, like: Params) -> Tensor:
    """The dense matrix, shape (size, size) in the order of the names of `like`, at the price of `size` products."""
    vector = flatten(like)
    identity = torch.eye(len(vector), dtype=vector.dtype, device=vector.device)
    return FlatOperator(operator, like).matmat(identity).T


def to_vector(params: Params, like: Params) -> Tensor:
    """One vector of shape (size,), in the order of the names of `like`, whatever their order in `params`."""
    _require_like(params, like, num_leading=0)
    return torch.cat([params[name].reshape(-1) for name in like])


def from_vector(vector: Tensor, like: Params) -> Params:
    """The inverse of `to_vector`, in the types of `like`."""
    return map_params(lambda piece, value: piece.to(value.dtype), unflatten(vector, like), like)


def to_rows(block: Params, like: Params) -> Tensor:
    """Params with one more leading dimension as a matrix, shape (row, size), columns in the order of `like`."""
    _require_like(block, like, num_leading=1)
    return torch.cat([block[name].reshape(len(block[name]), value.numel()) for name, value in like.items()], dim=1)


def from_rows(rows: Tensor, like: Params) -> Params:
    """The inverse of `to_rows`, in the types of `like`."""
    pieces = rows.split([value.numel() for value in like.values()], dim=1)
    return {
        name: piece.reshape(len(rows), *value.shape).to(value.dtype)
        for (name, value), piece in zip(like.items(), pieces, strict=True)
    }


def _require_like(params: Params, like: Params, *, num_leading: int) -> None:
    came = {name: tuple(value.shape[num_leading:]) for name, value in params.items()}
    expected = {name: tuple(value.shape) for name, value in like.items()}
    if came != expected:
        raise ValueError(
            f"A vector has entries {came}, but {expected} belong here: "
            "an operator returns every name of its argument, in the same shape."
        )
