"""Solvers of A x = b for a symmetric operator A on params. Each returns a `Solution`; none raises when it fails."""

from pyro_forget.solvers.cholesky import Cholesky
from pyro_forget.solvers.conjugate_gradient import ConjugateGradient
from pyro_forget.solvers.lanczos import KrylovSpace, Lanczos
from pyro_forget.solvers.neumann import Neumann
from pyro_forget.solvers.result import Result, Solution, Solver, SolverError

__all__ = [
    "Cholesky",
    "ConjugateGradient",
    "KrylovSpace",
    "Lanczos",
    "Neumann",
    "Result",
    "Solution",
    "Solver",
    "SolverError",
]
