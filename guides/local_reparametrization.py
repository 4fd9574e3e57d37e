"""Local reparametrisation: noise per datum in place of noise per weight.

Where a Gaussian weight only enters a linear map, the map's output is Gaussian too, and its mean and variance are two
maps of the same kind. Drawing that output for each datum on its own leaves the expected log likelihood as it is and
takes away the covariance between data that a shared weight brings: the variance of a mini-batch's gradient then falls
as one over its size.

A guide says which of its sites are Gaussian by `infer={"local_reparametrization": (loc, scale)}` at the site, and
Pyro's replay carries that into the model. So the noise per datum is there exactly while a model is scored against such
a guide: under `SVI` and its ELBOs. `Predictive`, MCMC and `poutine.condition` set weights without replaying a guide; a
wrapped model is then the plain model, whose rows share one weight as they should in a joint prediction.

References:
    D. P. Kingma, T. Salimans and M. Welling (2015), Variational dropout and the local reparameterization trick,
    arXiv:1506.02557, section 2.2, equation 6 and appendix A.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import pyro
import torch
import torch.nn.functional as F
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

INFER_KEY = "local_reparametrization"


def local_reparametrization(model: Callable[..., Any], sites: Collection[str] | None = None) -> Callable[..., Any]:
    """The model with its Gaussian weights met at the outputs of its linear maps, one noise per datum.

    Exact for each output's marginal: a weight that meets a datum once (`F.linear`, `x @ w`, a bias) gives exactly the
    plain model's expected log likelihood. Positions of one datum that share a weight (convolutions, sequences) are
    drawn independently given their means, as is customary.

    Each application draws one auxiliary site `_noise_0`, `_noise_1`, … in the order of the calls, standard normal and
    of the output's shape. No trace records these sites; an outer handler may answer them.

    Args:
        model: A Pyro model, plain or wrapped already.
        sites: The names of the weights to treat so; by default all whose guide site is a plain Gaussian.

    Raises:
        TypeError: while the model runs, when such a weight meets a function that is no linear map of the data.
        ValueError: while the model runs, when it uses such a weight twice, or draws it once per particle.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro_forget.guides import MeanField
        >>> def model(x, y):
        ...     weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Normal(x @ weight, 1.0), obs=y)
        >>> guide = MeanField(model)
        >>> loss = Trace_ELBO().loss(local_reparametrization(model), guide, torch.ones(3, 2), torch.ones(3))
    """
    chosen = None if sites is None else frozenset(sites)
    if isinstance(model, nn.Module):
        return _WrappedModule(model, chosen)
    return _LocalReparametrization(chosen)(model)


class _WrappedModule(nn.Module):
    """A wrapped module is still a module, so that its learned parameters can be found and substituted."""

    def __init__(self, model: nn.Module, sites: frozenset[str] | None):
        super().__init__()
        self.model, self._sites = model, sites

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _LocalReparametrization(self._sites)(self.model)(*args, **kwargs)


class _LocalReparametrization(Messenger):
    """The handler inside the wrapped model; handlers outside have recorded the drawn weight before it replaces it."""

    def __init__(self, sites: frozenset[str] | None):
        super().__init__()
        self._sites = sites

    def __enter__(self) -> Self:
        self._num_drawn = 0
        self._used: set[str] = set()
        return super().__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        if INFER_KEY not in msg["infer"] or (self._sites is not None and msg["name"] not in self._sites):
            return
        loc, scale = torch.broadcast_tensors(*msg["infer"][INFER_KEY])
        if msg["value"].shape != loc.shape:
            raise ValueError(
                f"Weight {msg['name']!r} was drawn with shape {tuple(msg['value'].shape)}, its Gaussian has shape "
                f"{tuple(loc.shape)}. Vectorised particles cannot be reparametrised locally: leave out "
                "`vectorize_particles`."
            )
        msg["value"] = GaussianWeight(loc, scale, msg["name"], self._noise)

    def _noise(self, output: Tensor, names: tuple[str, ...]) -> Tensor:
        for name in self._used.intersection(names):
            raise ValueError(
                f"Weight {name!r} is used twice in one run of the model, and noise per datum would draw its uses "
                "independently. Name the other weights: local_reparametrization(model, sites=[...])."
            )
        self._used.update(names)
        fn = StandardNormal(output.shape, output.dtype, output.device)
        site = f"_noise_{self._num_drawn}"
        self._num_drawn += 1
        return pyro.sample(site, fn, infer={"_do_not_trace": True, "is_auxiliary": True})  # type: ignore[arg-type]


@dataclass(frozen=True)
class StandardNormal:
    """What draws the noise: independent standard normals of one shape.

    Not one of Pyro's distributions, because plates broadcast those: noise of shape (num_rows, num_outputs) drawn
    within the data plate would be expanded to one such matrix per row.
    """

    batch_shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def shape(self) -> torch.Size:
        """The shape of a draw."""
        return self.batch_shape

    def __call__(self) -> Tensor:
        """A draw."""
        return torch.randn(self.batch_shape, dtype=self.dtype, device=self.device)


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
    return mean + _root(variance) * noise


def _root(variance: Tensor) -> Tensor:
    """√variance, with derivatives 0 where the variance is 0, as it is for a row of zeros.

    The bound keeps the second derivative, ¼ variance^(-3/2), finite in the same precision; below it a standard
    deviation (3e-10 in float32) is lost beside the mean.
    """
    positive = variance > torch.finfo(variance.dtype).tiny ** 0.5
    return torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)


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
