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
    arXiv:1506.02557, section 2.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Self

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_forget.guides.gaussian_weight import GaussianWeight

INFER_KEY = "local_reparametrization"


def local_reparametrization(model: Callable[..., Any], sites: Collection[str] | None = None) -> Callable[..., Any]:
    """The model with its Gaussian weights drawn at the outputs of its linear maps, one noise per datum.

    Exact for each output's marginal: a weight that meets a datum once (`F.linear`, `x @ w`, a bias) gives exactly the
    plain model's expected log likelihood. Positions of one datum that share a weight (convolutions, sequences) are
    drawn independently given their means, as is customary.

    Each application draws one auxiliary site `_noise_0`, `_noise_1`, … in the order of the calls, standard normal and
    of the output's shape, with the weights' names under "weights" in its infer dict. No trace records these sites; an
    outer handler may answer them.

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
        infer = {"_do_not_trace": True, "is_auxiliary": True, "weights": names}
        return pyro.sample(site, fn, infer=infer)  # type: ignore[arg-type]


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
