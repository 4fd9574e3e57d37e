"""The mean-field Gaussian guide."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

from pyro_forget.guides.local_reparametrization import INFER_KEY


# Pyro's own base class, against the rule that nothing here inherits implementation: code that meets a guide asks
# isinstance(guide, AutoGuide) (AutoGuideList keeps .median and .quantiles of such parts only), and the base's handling
# of plates and of the model that must not become a submodule is the convention to follow, not one to write again.
class MeanField(AutoGuide):
    r"""Independent Gaussians over the unconstrained latents, \(q(\theta) = \prod_i N(\theta_i; m_i, e^{2\rho_i})\).

    Unlike `AutoNormal` it samples each Gaussian at the site itself: `TraceMeanField_ELBO` takes its KL to a normal
    prior in closed form, and `local_reparametrization` can see it. Sites with constrained support are Gaussians pushed
    through the bijection onto that support. Every latent is global: one mean and one log scale per entry.

    Parameters are `loc.<site>` (the means m in unconstrained space) and `log_scale.<site>` (ρ), created at the first
    call, which takes the model's arguments. Nothing of these arguments is kept.

    Args:
        model: A Pyro model with continuous latents.
        init_loc_fn: Where means start, one of Pyro's initialisation functions.
        init_scale: Where standard deviations start, in unconstrained space.
        create_plates: As for Pyro's autoguides.

    Raises:
        ValueError: if `init_scale` is not positive; at the first call, if a latent is discrete or lies in a plate
            that is subsampled.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        >>> guide = MeanField(model, init_scale=0.5)
        >>> guide()["scale"].shape
        torch.Size([2])
        >>> [name for name, _ in guide.named_pyro_params()]
        ['loc.scale', 'log_scale.scale']
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        create_plates: Callable[..., Any] | None = None,
    ):
        if not init_scale > 0:
            raise ValueError(f"`init_scale` must be positive, got {init_scale}: it is a standard deviation.")
        super().__init__(InitMessenger(_continuous(init_loc_fn))(model), create_plates=create_plates)
        self._init_scale = init_scale
        self._sites: dict[str, _Site] = {}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent, in constrained space."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        return {name: self._draw(name, plates) for name in self._sites}

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each latent, in constrained space."""
        return {name: value[0] for name, value in self.quantiles([0.5]).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: list[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of each entry of each latent: site → (num_quantiles, *site shape), in constrained space.

        On supports that tie entries together, such as the simplex, these are the images of the unconstrained quantiles.
        """
        if self.prototype_trace is None:
            raise RuntimeError("This guide has no parameters yet: call it once with the model's arguments.")
        return {name: site.quantiles(quantiles, *self._gaussian(name)) for name, site in self._sites.items()}

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        # Without gradients: priors with learned parameters would leave graphs behind, which cannot be deep-copied.
        with torch.no_grad():
            super()._setup_prototype(*args, **kwargs)
        trace: Any = self.prototype_trace
        for node in ("_INPUT", "_RETURN"):  # the data of the first call would outlive their erasure
            trace.remove_node(node)
        self.loc, self.log_scale = PyroModule(), PyroModule()
        for name, node in trace.iter_stochastic_nodes():
            self._start(name, node)

    def _start(self, name: str, node: dict[str, Any]) -> None:
        _refuse_subsampling(name, node)
        support = node["fn"].support
        loc = biject_to(support).inv(node["value"]).detach().clone()
        self._sites[name] = _Site(
            support=support,
            event_dim=node["fn"].event_dim + loc.dim() - node["value"].dim(),
            plates=tuple(frame.name for frame in node["cond_indep_stack"]),
        )
        # PyroParam although both are unconstrained: SVI under module-local parameters refuses a plain nn.Parameter.
        deep_setattr(self.loc, name, PyroParam(loc))
        deep_setattr(self.log_scale, name, PyroParam(torch.full_like(loc, math.log(self._init_scale))))

    def _gaussian(self, name: str) -> tuple[Tensor, Tensor]:
        read = attrgetter(name)
        return read(self.loc), read(self.log_scale).exp()

    def _draw(self, name: str, plates: dict[str, Any]) -> Tensor:
        site = self._sites[name]
        with ExitStack() as stack:
            for plate in site.plates:
                stack.enter_context(plates[plate])
            loc, scale = self._gaussian(name)
            infer = {INFER_KEY: (loc, scale)} if site.is_real else {}
            return pyro.sample(name, site.distribution(loc, scale), infer=infer)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Site:
    """What a latent's guide needs of the model, and nothing that came from the data."""

    support: constraints.Constraint
    event_dim: int  # of the unconstrained value
    plates: tuple[str, ...]

    @property
    def is_real(self) -> bool:
        """Whether the support is all of ℝⁿ, so that the Gaussian stands at the site as it is."""
        support = self.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        return support is constraints.real

    def distribution(self, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        """The Gaussian at the site, pushed onto the support."""
        normal = dist.Normal(loc, scale).to_event(self.event_dim)
        # The cache lets the density of a draw use the pre-image it came from, exact where the inverse saturates.
        return normal if self.is_real else dist.TransformedDistribution(normal, biject_to(self.support).with_cache())

    def quantiles(self, quantiles: list[float] | Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """(num_quantiles, *site shape), constrained."""
        transform = biject_to(self.support)
        levels = torch.as_tensor(quantiles, dtype=loc.dtype, device=loc.device).reshape((-1,) + (1,) * loc.dim())
        return transform(dist.Normal(loc, scale).icdf(1 - levels if _is_decreasing(transform) else levels))


def _is_decreasing(transform: Transform) -> bool:
    try:
        return transform.sign == -1
    except NotImplementedError:  # no sign: the entries of the value depend on each other
        return False


def _continuous(init_loc_fn: Callable[..., Any]) -> Callable[..., Any]:
    """`init_loc_fn`, refusing discrete latents before it fails on them."""

    def start(site: dict[str, Any]) -> Tensor:
        if site["fn"].support.is_discrete:
            name = site["name"]
            raise ValueError(
                f"Latent {name!r} is discrete and MeanField is Gaussian. Sum it out in the model (for a mixture, "
                f"MixtureSameFamily), or hide it: MeanField(poutine.block(model, hide=[{name!r}])). If it is an "
                "observation, give its data at the guide's first call."
            )
        return init_loc_fn(site)

    return start


def _refuse_subsampling(name: str, node: dict[str, Any]) -> None:
    for frame in node["cond_indep_stack"]:
        if frame.full_size not in (None, frame.size):
            raise ValueError(
                f"Latent {name!r} is in plate {frame.name!r}, which shows {frame.size} of {frame.full_size} at a time. "
                "MeanField has one parameter per latent: call it with all rows first, or use AutoNormal."
            )
