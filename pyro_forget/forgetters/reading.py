"""A posterior read as points that a network is run at, and the erased data's force on them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_forget.data import Batch, Data
from pyro_forget.energy import (
    CoordinateEnergy,
    SampledEnergy,
    VariationalEnergy,
    coordinates_of,
    loc_part,
    scale_part,
    share_and_gradient,
)
from pyro_forget.energy.points import DrawPoints, GuidePoints, LocationPoints, Points
from pyro_forget.energy.shift import ShiftPoints
from pyro_forget.energy.variational import guide_part, model_part
from pyro_forget.gaussian import Gaussian
from pyro_forget.importance import systematic_resample
from pyro_forget.inference.pairing import SHARED_DRAWS, batch_gradient, share_gradient
from pyro_forget.params import Params, scale
from pyro_forget.posterior import Posterior, SampledPosterior, VariationalPosterior

_MOST_FROM_SCALES = 0.75  # of a coordinate's precision, what the erased data may take away at once
_NUMBERS_AT_ONCE = 2_000_000  # of draws that move together
_ROWS_AT_ONCE = 2_048  # times draws: with as many rows one draw after another is as fast, and with convolutions faster
_DRAWS_OF_A_SHIFT = 64  # that a common shift is found with


class Reading(NamedTuple):
    """How a posterior is run, where it stands, and what pulls at it.

    Attributes:
        points: how to run it, the scales of a Gaussian guide already without the erased data.
        origin: γ₀ with a leading dim: one guide, one shift of all draws, or every draw.
        force: ∇h(γ₀) of the erased data; nats.
        back: points to the posterior's own params.
        log_likelihood: of the erased rows under each of the draws that were looked at, (draw,), nats; None for guides.
    """

    points: Points
    origin: Params
    force: Params
    back: Callable[[Params], Params]
    log_likelihood: Tensor | None = None


def reader(posterior: Posterior, jointly: bool) -> Callable[[Posterior, Data, int], Reading]:
    """What reads this kind of posterior; draws as one shift if `jointly`.

    Raises:
        ValueError: it has no model, or noise that two evaluations cannot share.
    """
    if isinstance(posterior, SampledPosterior):
        return _read_shift if jointly else _read_draws
    if not isinstance(posterior, VariationalPosterior):
        raise ValueError(f"A {type(posterior).__name__} has no model whose output could be read: use `Influence`.")
    energy = posterior.energy
    if energy.gaussian is not None and not model_part(posterior.params):
        return _read_locations
    if energy.whole.guide.num_normals is None:
        raise ValueError(
            "The guide draws other than standard normal noise, which two evaluations cannot share: use `Influence`."
        )
    return _read_guide


def points_of(posterior: Posterior) -> tuple[LocationPoints | GuidePoints | DrawPoints, Params]:
    """The points of a posterior as it came, and the first of them."""
    if isinstance(posterior.energy, SampledEnergy):
        return DrawPoints(posterior.energy), {name: value[0, 0] for name, value in posterior.params.items()}
    if not isinstance(posterior.energy, VariationalEnergy):
        raise ValueError(f"A {type(posterior).__name__} has no model whose output could be read: use `Influence`.")
    energy = posterior.energy
    if energy.gaussian is not None and not model_part(posterior.params):
        gaussian = energy.read(posterior.params).detach()
        return LocationPoints(energy.gaussian, gaussian.scale), gaussian.loc
    return GuidePoints(energy.whole), posterior.params


def _read_locations(posterior: Posterior, erased: Data, seed: int) -> Reading:
    """The locations of a Gaussian guide; its scales take their step at once and stand still."""
    energy = posterior.energy
    if not isinstance(energy, VariationalEnergy) or energy.gaussian is None:
        raise ValueError("This guide is not a Gaussian.")
    inner, view, own = energy.gaussian, energy.gaussian.view, guide_part(posterior.params)
    gaussian = view.read(own).detach()
    pairs = SHARED_DRAWS if inner.drawn_sites else 1
    coordinates, sampled = coordinates_of(gaussian), CoordinateEnergy(inner).with_noise(2 * seed + 1, pairs)
    slopes = erased.reduce(lambda b: share_and_gradient(sampled, coordinates, b)[1], start=scale(coordinates, 0.0))
    narrow = scale_part(slopes)
    widths = gaussian.scale
    if not isinstance(widths, Tensor) and not isinstance(narrow, Tensor):
        left = {name: 1 - narrow[name].clamp(max=_MOST_FROM_SCALES) for name in widths}
        widths = {name: value * left[name].rsqrt() for name, value in widths.items()}

    def back(params: Params) -> Params:
        return posterior.params | view.write(own, Gaussian({n: v[0] for n, v in params.items()}, widths))

    force = {name: value[None] for name, value in loc_part(slopes).items()}
    origin = {name: value[None] for name, value in gaussian.loc.items()}
    return Reading(LocationPoints(inner, widths), origin, force, back)


def _read_guide(posterior: Posterior, erased: Data, seed: int) -> Reading:
    """All parameters of any other guide, learned ones of the model included."""
    points, first = points_of(posterior)
    origin = {name: value.detach()[None] for name, value in first.items()}
    size = -(-erased.num_data // SHARED_DRAWS) if points.shares_noise else erased.batch_size
    force = share_gradient(points, origin, erased.with_batch_size(size), seed)
    return Reading(points, origin, force, lambda params: {name: v[0] for name, v in params.items()})


def _read_draws(posterior: Posterior, erased: Data, seed: int) -> Reading:
    """Every draw on its own."""
    points, _ = points_of(posterior)
    lead = next(iter(posterior.params.values())).shape[:2]
    origin = {name: value.flatten(0, 1) for name, value in posterior.params.items()}
    force, values = {name: torch.empty_like(value) for name, value in origin.items()}, []
    for group in _groups(origin, erased):
        slopes, value = _pull(points, {name: draws[group] for name, draws in origin.items()}, erased)
        values.append(value)
        for name, slope in slopes.items():
            force[name][group] = slope

    def back(params: Params) -> Params:
        return {name: value.reshape(*lead, *value.shape[1:]) for name, value in params.items()}

    return Reading(points, origin, force, back, torch.cat(values))


def _read_shift(posterior: Posterior, erased: Data, seed: int) -> Reading:
    """One shift of all draws, found with some of them."""
    if not isinstance(posterior, SampledPosterior):
        raise ValueError(f"A {type(posterior).__name__} has no draws to shift.")
    flat = {name: value.flatten(0, 1) for name, value in posterior.params.items()}
    draws = {name: value[_spread(posterior)] for name, value in flat.items()}
    points, count = DrawPoints(posterior.energy), len(next(iter(draws.values())))
    force = {name: torch.zeros_like(value[:1]) for name, value in draws.items()}
    values = []
    for group in _groups(draws, erased):
        slopes, value = _pull(points, {name: some[group] for name, some in draws.items()}, erased)
        force = {name: total + slopes[name].sum(0, keepdim=True) / count for name, total in force.items()}
        values.append(value)

    def back(params: Params) -> Params:
        return {name: value + params[name] for name, value in posterior.params.items()}

    origin = {name: torch.zeros_like(value) for name, value in force.items()}
    return Reading(ShiftPoints.of(posterior.energy, draws), origin, force, back, torch.cat(values))


def _pull(points: Points, stacked: Params, erased: Data) -> tuple[Params, Tensor]:
    """(∇h at each draw, the log likelihood of the erased rows under it (draw,))."""

    def of(batch: Batch) -> tuple[Params, Tensor]:
        slopes, (value,) = batch_gradient(points, stacked, batch, {}, lambda run: (run.log_likelihood(),))
        return slopes, value.double().sum(-1)

    return erased.reduce(of)


def _spread(posterior: SampledPosterior) -> Tensor:
    """Places of equally weighted draws from all over the chains."""
    count = min(posterior.num_draws, _DRAWS_OF_A_SHIFT)
    if posterior.log_weights is not None:
        return systematic_resample(posterior.log_weights.flatten(), count, 0)
    return torch.linspace(0, posterior.num_draws - 1, count).round().long()


def groups(stacked: Params, size: int | None = None) -> list[slice]:
    """Points that move together: memory is bounded whatever their number."""
    entries = sum(value[0].numel() for value in stacked.values())
    size = max(1, min(size or len(next(iter(stacked.values()))), _NUMBERS_AT_ONCE // max(entries, 1)))
    return [slice(first, first + size) for first in range(0, len(next(iter(stacked.values()))), size)]


def _groups(stacked: Params, data: Data) -> list[slice]:
    """Points that are looked at together with the data."""
    return groups(stacked, max(1, _ROWS_AT_ONCE // min(data.num_data, data.batch_size)))
