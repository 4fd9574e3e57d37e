"""Whether a function of vectors is the linear operator that solvers take it for."""

import math

import torch

from pyro_forget.curvature.operator import LinearOperator
from pyro_forget.params import Params, all_finite, axpy, dot, map_params, norm, subtract


def check_deterministic(
    operator: LinearOperator,
    like: Params,
    *,
    seed: int = 0,
    rtol: float | None = None,
    linear: bool = True,
    symmetric: bool = True,
) -> None:
    """Raise unless two products of one vector agree, and the operator is linear and symmetric.

    A Hessian product with fresh noise, or over shuffled batches, is a different matrix each time: every Krylov method
    then returns a confident wrong answer. Draws from its own generator; the global one is not touched.

    Args:
        operator: the operator to test.
        like: names, shapes and types of its vectors.
        seed: of the vectors to test with.
        rtol: allowed difference relative to the products' norms; None for the square root of the machine precision.
        linear: also test A(v + 2w) = Av + 2Aw, two more products.
        symmetric: also test ⟨w, Av⟩ = ⟨v, Aw⟩, at most one more product.

    Raises:
        ValueError: which law fails, and by how much.
    """
    rtol = math.sqrt(resolution(like)) if rtol is None else rtol
    generator = torch.Generator().manual_seed(seed)
    vector, other = random_like(like, generator), random_like(like, generator)
    image = _product(operator, vector)
    _require_small(norm(subtract(_product(operator, vector), image)), rtol * norm(image), _NOISY)
    if not (linear or symmetric):
        return
    other_image = _product(operator, other)
    if linear:
        combined = _product(operator, axpy(2.0, other, vector))
        gap = norm(subtract(combined, axpy(2.0, other_image, image)))
        _require_small(gap, rtol * (norm(image) + 2.0 * norm(other_image)), _NONLINEAR)
    if symmetric:
        gap = abs(float(dot(other, image)) - float(dot(vector, other_image)))
        _require_small(gap, rtol * (norm(other) * norm(image) + norm(vector) * norm(other_image)), _ASYMMETRIC)


def random_like(like: Params, generator: torch.Generator) -> Params:
    """Standard-normal params of the same names, shapes, types and devices.

    Drawn by a CPU generator whatever the device, so that a seed means the same vector on every machine.
    """
    return map_params(
        lambda value: torch.randn(value.shape, generator=generator, device="cpu", dtype=value.dtype).to(value.device),
        like,
    )


def resolution(like: Params) -> float:
    """The machine precision of the coarsest type among the entries."""
    return max(torch.finfo(value.dtype).eps for value in like.values())


_NOISY = (
    "The operator is not deterministic: two products of the same vector differ by {gap:.1e}, allowed is {limit:.1e}. "
    "Pin the noise of its energy (`with_noise`) and keep its batches in a fixed order."
)
_NONLINEAR = (
    "The operator is not linear: A(v + 2w) and Av + 2Aw differ by {gap:.1e}, allowed is {limit:.1e}. "
    "Return a product with a fixed matrix, without a constant term."
)
_ASYMMETRIC = (
    "The operator is not symmetric: ⟨w, Av⟩ and ⟨v, Aw⟩ differ by {gap:.1e}, allowed is {limit:.1e}. "
    "Return the product with a Hessian or a Gauss-Newton matrix, not with a Jacobian."
)


def _product(operator: LinearOperator, vector: Params) -> Params:
    image = map_params(torch.Tensor.detach, operator.mv(vector))
    if not all_finite(image):
        raise ValueError(
            "The operator returned NaN or infinite entries for a standard-normal vector: "
            "check the parameters it was built at and the data it sums over."
        )
    return image


def _require_small(gap: float, limit: float, message: str) -> None:
    if gap > limit:
        raise ValueError(message.format(gap=gap, limit=limit))
