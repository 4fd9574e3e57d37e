"""The Neumann recursion, one batch of curvature a step."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyro_forget.curvature.determinism import random_like, resolution
from pyro_forget.curvature.operator import FlatOperator, LinearOperator, from_vector
from pyro_forget.params import Params, flatten
from pyro_forget.solvers.result import Result, Solution

Operators = LinearOperator | Callable[[int], LinearOperator] | Iterable[LinearOperator]


@dataclass(frozen=True)
class Neumann:
    """v₀ = b, vₜ₊₁ = b + vₜ − s·Hₜvₜ, solution s·v_T: a Neumann series with a fresh batch of curvature at each step.

    It needs no operator that agrees with itself: Hₜ may be an unbiased estimate from a batch, scaled to all data. It
    contracts where 0 < s·H < 2. A residual below one tells that the recursion contracts, not that it has arrived:
    directions of small curvature need about 1/(s·curvature) steps.

    Attributes:
        num_steps: T.
        scaling: s; or "power" for 0.9 over the largest eigenvalue, found by power iteration. That estimate is too
            small if anything, and up to a factor of two too small the recursion still contracts.
        rtol: stop once ‖b − s·Hₜvₜ‖ ≤ rtol ‖b‖.
        power_steps: products that the power iteration takes; with a sequence of batches, its first ones.
        seed: of the power iteration's first vector; the global generator is not touched.

    References:
        Agarwal, Bullins and Hazan 2017, arXiv 1602.03943; Fu, He, Xu and Tao 2021, arXiv 2101.06417, whose result
        this computes with s = scaling / N.
    """

    num_steps: int = 64
    scaling: float | Literal["power"] = "power"
    rtol: float = 1e-6
    power_steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.power_steps < 1:
            raise ValueError(
                f"`num_steps` is {self.num_steps} and `power_steps` is {self.power_steps}: pass positive numbers."
            )
        if self.scaling != "power" and not (isinstance(self.scaling, int | float) and 0 < self.scaling < math.inf):
            raise ValueError(f"`scaling` is {self.scaling!r}: pass a positive number, or 'power'.")

    def solve(self, operator: Operators, rhs: Params) -> Solution:
        """Solve H x = rhs.

        Args:
            operator: H; or a function from the step to Hₜ; or an iterable of at least as many Hₜ as steps are taken.
            rhs: b.

        Returns:
            The solution. Its residual is that of the iterate before the last, under that step's batch; the last one's
            is smaller where the recursion contracts. A diverged recursion has the value zero.

        Raises:
            ValueError: `operator` is none of these, or an iterable that ends too early.
        """
        product = _products(operator, rhs)
        target = flatten(rhs).detach()
        length = _length(target)
        if length == 0 or not math.isfinite(length):
            result = Result.CONVERGED if length == 0 else Result.NON_FINITE
            return _solution(torch.zeros_like(target), rhs, result, 0, length)
        scaling, failure = self._scaling(product, rhs)
        if failure is not None:
            return _solution(torch.zeros_like(target), rhs, failure, 0, 1.0)
        noisy = not isinstance(operator, LinearOperator)
        return self._recur(product, target, scaling, noisy, rhs)

    def _recur(
        self,
        product: Callable[[int, Tensor], Tensor],
        target: Tensor,
        scaling: float,
        noisy: bool,
        rhs: Params,
    ) -> Solution:
        value, residual, smallest, length = target, 1.0, math.inf, _length(target)
        # With one H and 0 < s·H < 2 the residual never grows, so more than ‖b‖ means divergence. Under batches the
        # residual holds their noise, too, which ten times ‖b‖ leaves room for.
        limit = 10.0 if noisy else 1.001
        for step in range(self.num_steps):
            # vₜ₊₁ − vₜ is the residual of s·vₜ: the recursion brings its own test.
            image = product(step, value)
            increment = torch.sub(target, image, alpha=scaling)
            residual = _length(increment) / length
            if not residual <= limit:
                failure = Result.DIVERGED if bool(torch.isfinite(image).all()) else Result.NON_FINITE
                return _solution(torch.zeros_like(target), rhs, failure, step + 1, residual)
            if residual <= self.rtol:
                return _solution(scaling * value, rhs, Result.CONVERGED, step + 1, residual)
            smallest = min(smallest, residual)
            value = value + increment
        if not noisy and residual > 2.0 * max(smallest, 100 * resolution(rhs)):
            return _solution(torch.zeros_like(target), rhs, Result.DIVERGED, self.num_steps, residual)
        return _solution(scaling * value, rhs, Result.MAX_STEPS, self.num_steps, residual)

    def _scaling(self, product: Callable[[int, Tensor], Tensor], rhs: Params) -> tuple[float, Result | None]:
        if isinstance(self.scaling, str):
            return self._power_scaling(product, rhs)
        return self.scaling, None

    def _power_scaling(self, product: Callable[[int, Tensor], Tensor], rhs: Params) -> tuple[float, Result | None]:
        """0.9 over the largest eigenvalue in absolute value, or why there is no such scaling."""
        vector = flatten(random_like(rhs, torch.Generator().manual_seed(self.seed)))
        growth, curvature = 0.0, 0.0
        for step in range(self.power_steps):
            vector = vector / _length(vector)
            image = product(step, vector)
            growth, curvature = _length(image), float(torch.dot(vector, image))
            if growth == 0 or not math.isfinite(growth):
                return 0.0, Result.SINGULAR if growth == 0 else Result.NON_FINITE
            vector = image
        return 0.9 / growth, Result.NEGATIVE_CURVATURE if curvature < 0 else None


def _products(operator: Operators, like: Params) -> Callable[[int, Tensor], Tensor]:
    """The product of step t with a flat vector."""
    if isinstance(operator, LinearOperator):
        flat = FlatOperator(operator, like)
        return lambda step, vector: flat.mv(vector)
    if callable(operator):
        return lambda step, vector: FlatOperator(operator(step), like).mv(vector)
    if isinstance(operator, Iterable):
        operators = iter(operator)
        return lambda step, vector: FlatOperator(_next(operators), like).mv(vector)
    raise ValueError(
        f"`operator` is a {type(operator).__name__}: pass an operator with `mv`, a function from the step to one, "
        "or an iterable of them."
    )


def _next(operators: Iterable[LinearOperator]) -> LinearOperator:
    for operator in operators:
        return operator
    raise ValueError(
        "The operators ran out before the steps did: pass an endless iterable, or one of at least `num_steps` "
        "(and `power_steps` more with scaling='power')."
    )


def _solution(value: Tensor, like: Params, result: Result, num_steps: int, residual: float) -> Solution:
    return Solution(from_vector(value, like), result, num_steps, residual)


def _length(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))
