"""Curvature of an energy as a linear operator on params."""

from pyro_forget.curvature.determinism import check_deterministic
from pyro_forget.curvature.operator import (
    BlockOperator,
    Congruence,
    FunctionOperator,
    LinearOperator,
    MatrixOperator,
    Scaled,
    Shifted,
    as_matrix,
    matmat,
)

__all__ = [
    "BlockOperator",
    "Congruence",
    "FunctionOperator",
    "LinearOperator",
    "MatrixOperator",
    "Scaled",
    "Shifted",
    "as_matrix",
    "check_deterministic",
    "matmat",
]
