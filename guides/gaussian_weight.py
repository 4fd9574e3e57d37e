"""A weight that is a distribution: linear maps by it are drawn at their outputs."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor


class Noise(Protocol):
    """Where a `GaussianWeight` gets its noise from."""

    def __call__(self, output: Tensor, names: tuple[str, ...]) -> Tensor:
        """Standard normals of the output's shape, for an output of the weights of these names."""


def _fresh_noise(output: Tensor, names: tuple[str, ...]) -> Tensor:
    return torch.randn_like(output)


@dataclass(frozen=True, eq=False)
class GaussianWeight:
    """A weight known by its Gaussian; a linear map by it is drawn at its output.

    It goes where a weight goes in `x @ w`, `torch.matmul`, `F.linear`, `F.conv2d` and, as a bias, in `h + w`, and may
    be transposed before. Any other function of it is refused: noise per datum would not be that function's noise.

    Args:
        loc: Its mean, of the weight's shape.
        scale: Its standard deviation, of the same shape.
        name: Its site, for messages.
        noise: Where the standard normals come from; fresh ones by default.
    """

    loc: Tensor
    scale: Tensor
    name: str = "weight"
    noise: Noise = _fresh_noise

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Collection[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Torch's hook for objects that stand where tensors do."""
        if function not in _HANDLERS:
            raise _refusal(torch.overrides.resolve_name(function) or repr(function), *args, *(kwargs or {}).values())
        return _HANDLERS[function](*args, **(kwargs or {}))

    def __getattr__(self, attribute: str) -> Any:
        """Reached by what the class lacks: a tensor's methods are refused with the fix named."""
        if attribute.startswith("__") or not hasattr(Tensor, attribute):
            raise AttributeError(f"GaussianWeight has no attribute {attribute!r}")
        raise _refusal(f"torch.Tensor.{attribute}", self)

    shape = property(lambda self: self.loc.shape)
    ndim = property(lambda self: self.loc.ndim)
    dtype = property(lambda self: self.loc.dtype)
    device = property(lambda self: self.loc.device)
    T = property(lambda self: self.transpose(-2, -1))
    mT = property(lambda self: self.transpose(-2, -1))

    def dim(self) -> int:
        """The number of dimensions."""
        return self.loc.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        """The shape, or its entry at `dim`."""
        return self.loc.shape if dim is None else self.loc.shape[dim]

    def t(self) -> Self:
        """The transpose of a matrix."""
        return self.transpose(-2, -1)

    def transpose(self, dim0: int, dim1: int) -> Self:
        """The transpose of a matrix: the same weight, used up together with it."""
        if self.loc.ndim != 2:
            raise _refusal(f"The transpose of shape {tuple(self.loc.shape)}", self)
        return replace(self, loc=self.loc.transpose(dim0, dim1), scale=self.scale.transpose(dim0, dim1))

    def __add__(self, other: Tensor) -> Tensor:
        """A bias, written first."""
        return _add(self, other)

    __radd__ = __add__


def _refusal(function: str, *operands: object) -> TypeError:
    names = ", ".join(repr(operand.name) for operand in operands if isinstance(operand, GaussianWeight))
    return TypeError(
        f"{function} cannot be reparametrised locally with weight {names or '?'}: a Gaussian weight goes into "
        "x @ weight, F.linear, F.conv2d or h + weight only, with data in the place of x and h. Write the layer so, or "
        "name the weights it is true of: local_reparametrization(model, sites=[...])."
    )


def _refused_operator(name: str) -> Callable[..., Any]:
    def operator(self: GaussianWeight, *others: object) -> Any:
        raise _refusal(f"torch.Tensor.{name}", self, *others)

    return operator


# Python looks operators up on the class, never through __getattr__, and its own message would not name the fix.
for _operator in [
    "mul",
    "rmul",
    "sub",
    "rsub",
    "truediv",
    "rtruediv",
    "pow",
    "rpow",
    "neg",
    "abs",
    "getitem",
    "matmul",
]:
    setattr(GaussianWeight, f"__{_operator}__", _refused_operator(f"__{_operator}__"))


def _linear(x: Tensor, weight: "Tensor | GaussianWeight", bias: "Tensor | GaussianWeight | None" = None) -> Tensor:
    return _affine(F.linear, x, weight, bias)


def _conv2d(
    x: Tensor,
    weight: "Tensor | GaussianWeight",
    bias: "Tensor | GaussianWeight | None" = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    return _affine(convolve, x, weight, bias)


def _matmul(x: Tensor, weight: GaussianWeight) -> Tensor:
    if not isinstance(weight, GaussianWeight) or weight.ndim > 2:
        raise _refusal("torch.matmul with the weight on the left or of more than two dimensions", x, weight)
    return _affine(lambda x, weight, _: x @ weight, x, weight, None)


def _add(left: "Tensor | GaussianWeight", right: "Tensor | GaussianWeight") -> Tensor:
    bias, h = (left, right) if isinstance(left, GaussianWeight) else (right, left)
    if not isinstance(h, Tensor) or not isinstance(bias, GaussianWeight):
        raise _refusal("torch.add with no data", left, right)
    mean = h + bias.loc
    return _draw(mean, bias.scale.square().expand(mean.shape), bias)


def _affine(
    function: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: "Tensor | GaussianWeight",
    bias: "Tensor | GaussianWeight | None",
) -> Tensor:
    """A draw of f(x, w, b), f linear in w and b: mean f(x, 𝔼w, 𝔼b), variance f(x², Var w, Var b)."""
    if not isinstance(x, Tensor):
        raise _refusal("A linear map of a weight", x, weight, bias)
    mean = function(x, _mean(weight), None if bias is None else _mean(bias))
    variance = function(x.square(), _variance(weight), None if bias is None else _variance(bias))
    return _draw(mean, variance, *(operand for operand in (weight, bias) if isinstance(operand, GaussianWeight)))


def _mean(operand: "Tensor | GaussianWeight") -> Tensor:
    return operand.loc if isinstance(operand, GaussianWeight) else operand


def _variance(operand: "Tensor | GaussianWeight") -> Tensor:
    return operand.scale.square() if isinstance(operand, GaussianWeight) else torch.zeros_like(operand)


def _draw(mean: Tensor, variance: Tensor, *weights: GaussianWeight) -> Tensor:
    noise = weights[0].noise(mean, tuple(weight.name for weight in weights))
    return torch.addcmul(mean, _root(variance), noise)


def _root(variance: Tensor) -> Tensor:
    """√variance, with derivatives 0 where the variance is 0, as it is for a row of zeros.

    The bound keeps the second derivative, ¼ variance^(-3/2), finite in the same precision; its own standard deviation
    (3e-10 in float32) is lost beside the mean.
    """
    return variance.clamp(min=torch.finfo(variance.dtype).tiny ** 0.5).sqrt()


_HANDLERS: dict[Callable, Callable[..., Any]] = {
    F.linear: _linear,
    F.conv2d: _conv2d,
    torch.conv2d: _conv2d,
    torch.add: _add,
    torch.t: GaussianWeight.t,
    torch.transpose: GaussianWeight.transpose,
    **dict.fromkeys([Tensor.add, Tensor.__add__, Tensor.__radd__], _add),
    **dict.fromkeys([torch.matmul, torch.mm, torch.mv], _matmul),
    **dict.fromkeys([Tensor.matmul, Tensor.mm, Tensor.mv, Tensor.__matmul__], _matmul),
}
