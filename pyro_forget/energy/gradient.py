"""The gradient of an energy over one batch, by the shortest way that the energy allows.

Autograd through everything differentiates the map from a guide's parameters to its draws and the KL divergence entry
by entry, which costs a mean-field guide as much as a small network does. Both derivatives are one line each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from pyro_forget.data import Batch
from pyro_forget.energy.coordinates import CoordinateEnergy, coordinate_params, gaussian_of
from pyro_forget.energy.gaussian import LOC, SCALE, VALUE, GaussianEnergy
from pyro_forget.energy.protocol import Energy, finite, value_and_gradient
from pyro_forget.energy.variational import VariationalEnergy, model_part
from pyro_forget.gaussian import Gaussian
from pyro_forget.params import Params, zeros_like


def estimate_and_gradient(energy: Energy, params: Params, batch: Batch, num_data: int) -> tuple[float, Params]:
    """F(γ, S) and ∇F, estimated with the batch standing for all `num_data` rows; nats.

    With as many data as the batch has rows it is F of the batch.

    Raises:
        ValueError: the value is not finite.
    """
    closed = _closed_form(energy, params)
    if closed is None:
        return value_and_gradient(lambda leaves: energy.estimate(leaves, batch, num_data), params)
    return closed.gradient(params, batch, num_data / len(batch), with_prior=True)


def share_and_gradient(energy: Energy, params: Params, batch: Batch) -> tuple[float, Params]:
    """Σ h(γ, z) over the batch's rows and its gradient; nats.

    Raises:
        ValueError: the value is not finite.
    """
    closed = _closed_form(energy, params)
    if closed is None:
        return value_and_gradient(lambda leaves: energy.share(leaves, batch), params)
    return closed.gradient(params, batch, 1.0, with_prior=False)


@dataclass(frozen=True)
class _ClosedForm:
    """The energy of independent Gaussians with fixed Normal priors.

    Attributes:
        energy: in the Gaussians' coordinates.
        gaussian: where.
        arrange: from slopes by site in loc and in log scale to slopes by parameter, which are the same numbers.
    """

    energy: GaussianEnergy
    gaussian: Gaussian
    arrange: Callable[[Params, Params], Params]

    def gradient(self, params: Params, batch: Batch, weight: float, with_prior: bool) -> tuple[float, Params]:
        """Of weight · share, and of the KL divergence: (loc − m)/s² in loc, scale²/s² − 1 in log scale."""
        share, loc, scale = _share_gradient(self.energy, self.gaussian, batch, weight)
        value, log_scale = weight * share, {}
        if with_prior:
            value = value + self.energy.prior(self.gaussian)
        for name, width in cast(Params, self.gaussian.scale).items():
            if with_prior:
                prior = self.energy.conjugate[name]
                loc[name] = prior.add_gradient(prior.gap(self.gaussian.loc[name]), loc[name])
                log_scale[name] = prior.add_gradient(width, scale[name]).mul_(width).sub_(1.0)
            else:
                log_scale[name] = scale[name] * width
        found = self.arrange(loc, log_scale)
        return finite(value), {name: found[name].reshape(value.shape) for name, value in params.items()}


def _closed_form(energy: Energy, params: Params) -> _ClosedForm | None:
    arrange: Callable[[Params, Params], Params] | None
    params = {name: value.detach() for name, value in params.items()}
    if isinstance(energy, CoordinateEnergy):
        found, gaussian, arrange = energy.gaussian, gaussian_of(params), coordinate_params
    elif isinstance(energy, VariationalEnergy) and energy.gaussian is not None and not model_part(params):
        found, gaussian, arrange = energy.gaussian, energy.read(params), energy.gaussian.view.write_logs
    else:
        return None
    if not found.is_closed or gaussian.log_scale is None or arrange is None:
        return None
    return _ClosedForm(found, gaussian, arrange)


def _share_gradient(
    energy: GaussianEnergy, gaussian: Gaussian, batch: Batch, weight: float
) -> tuple[Tensor, Params, Params]:
    """(share, weight · its slopes in loc, in scale): of draws loc + scale·ε with slopes g, the sums of g and of g·ε."""
    drawn = {name: value.detach().requires_grad_(True) for name, value in energy.drawn(gaussian).items()}
    with torch.enable_grad():
        share = energy.share_at(drawn, batch)
    slopes = _slopes(share, drawn, weight)
    noise = gaussian.split(energy.weight_noise(gaussian)) if energy.drawn_sites else {}
    loc, scale = {}, {}
    for name in gaussian.loc:
        if name in energy.local:
            loc[name], scale[name] = slopes[LOC + name], slopes[SCALE + name]
        else:
            slope = slopes[VALUE + name]
            loc[name], scale[name] = _sum_over_draws(slope), _sum_over_draws(slope * noise[name])
    return share.detach(), loc, scale


def _slopes(value: Tensor, leaves: Params, weight: float) -> Params:
    if not value.requires_grad:
        return zeros_like(leaves)
    found = torch.autograd.grad(
        value, list(leaves.values()), value.new_tensor(weight), allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def _sum_over_draws(value: Tensor) -> Tensor:
    return value.squeeze(0) if len(value) == 1 else value.sum(0)
