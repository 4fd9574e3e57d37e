"""What the methods for networks share: a posterior as points, what was asked of it, and the way back."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_forget.curvature.natural import natural_of
from pyro_forget.data import Batch, Data
from pyro_forget.effects.program import quiet
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
from pyro_forget.energy.variational import guide_part, model_part
from pyro_forget.gaussian import Gaussian
from pyro_forget.inference.last_layer import LastLayer, find_last_layer, some_rows
from pyro_forget.inference.pairing import SHARED_DRAWS, Problem, Verdict, share_gradient
from pyro_forget.outcome import Edit, Evidence
from pyro_forget.params import Params, all_finite, norm, scale, subtract
from pyro_forget.posterior import Posterior, SampledPosterior, VariationalPosterior

_MANY_LATENTS = 1000  # below, curvature products cost nothing and `Influence` refines what they miss
_MOST_FROM_SCALES = 0.75  # of a coordinate's precision, what the erased data may take away at once
_NUMBERS_AT_ONCE = 2_000_000  # of draws that move together: memory is bounded whatever their number


@dataclass(frozen=True)
class Network:
    """A posterior whose likelihood is read at a network's output.

    Attributes:
        posterior: as it came.
        points: how to run it, the scales of a Gaussian guide already without the erased data.
        origin: γ₀ with a leading dim: one guide, or every draw.
        force: ∇h(γ₀) of the erased data; nats.
        back: points to the posterior's own params.
    """

    posterior: Posterior
    points: Points
    origin: Params
    force: Params
    back: Callable[[Params], Params]

    @staticmethod
    def of(posterior: Posterior, erased: Data, seed: int) -> "Network":
        """Take a posterior over and measure the erased data's force.

        Raises:
            ValueError: the posterior has no model, the likelihood is of another family, or the erased rows have
                classes that the output does not have.
        """
        make = _maker(posterior)
        try:
            found = make(posterior, erased, seed)
        except (IndexError, RuntimeError):
            _require_known_classes(_points(posterior), erased)
            raise
        found.require_output(erased)
        return found

    @property
    def stationary(self) -> bool:
        """Whether the points are meant to be at the energy's minimum."""
        return not isinstance(self.points, DrawPoints)

    @property
    def num_points(self) -> int:
        """Draws, or 1."""
        return len(next(iter(self.origin.values())))

    def require_output(self, erased: Data) -> None:
        """Raise where the likelihood cannot be read as a function of an output."""
        _require_known_classes((self.points, {name: value[0] for name, value in self.origin.items()}), _first(erased))

    def groups(self) -> list[slice]:
        """Points that move together."""
        entries = sum(value[0].numel() for value in self.origin.values())
        size = max(1, _NUMBERS_AT_ONCE // max(entries, 1))
        return [slice(first, first + size) for first in range(0, self.num_points, size)]

    def problem(self, retained: Data, seed: int, group: slice) -> Problem:
        """The sampled tilted energy of some of the points."""
        origin, force = ({name: value[group] for name, value in part.items()} for part in (self.origin, self.force))
        return Problem.of(self.points, origin, force, retained, seed, self.stationary)

    def last_layer(self, data: Data) -> LastLayer | None:
        """The output layer of the first point, and of all."""
        return find_last_layer(self.points, {name: value[0] for name, value in self.origin.items()}, some_rows(data))

    def moved(self, params: Params, retained: Data, evidence: Evidence) -> Edit:
        """The posterior at other points."""
        if not all_finite(params):
            return Edit(self.posterior, replace(evidence, refused="the result is not finite: lower `learning_rate`"))
        own = self.back(params)
        steps = {name: norm({name: value}) for name, value in subtract(own, self.posterior.params).items()}
        evidence = replace(evidence, step_norm=steps)
        if isinstance(self.posterior, SampledPosterior):
            return Edit(self.posterior.edited(own, retained.ids, self.posterior.log_weights), evidence)
        return Edit(self.posterior.edited(own, retained.ids), evidence)


def verdict_of(verdicts: list[tuple[int, Verdict]]) -> Verdict:
    """The mean over all points from the means over groups."""
    total = sum(count for count, _ in verdicts)
    return Verdict(
        sum(count * verdict.rise for count, verdict in verdicts) / total,
        sum(count * verdict.untilted for count, verdict in verdicts) / total,
    )


def is_network(posterior: Posterior) -> bool:
    """Whether there are many latents and the likelihood's output is not affine in all of them.

    Looked at on made-up rows: no data are needed.
    """
    if not isinstance(posterior, (VariationalPosterior, SampledPosterior)):
        return False
    points, point = _points(posterior)
    if sum(value.numel() for value in point.values()) < _MANY_LATENTS:
        return False
    if isinstance(points, GuidePoints) and points.energy.guide.num_normals is None:
        return False
    try:
        layer = find_last_layer(points, point, points.energy.program.template)
    except ValueError:  # several data sites, or another family
        return False
    return layer is None or bool(layer.others)


def _maker(posterior: Posterior) -> Callable[[Posterior, Data, int], Network]:
    if isinstance(posterior, SampledPosterior):
        return _of_draws
    if not isinstance(posterior, VariationalPosterior):
        raise ValueError(f"A {type(posterior).__name__} has no model whose output could be read: use `Influence`.")
    energy = posterior.energy
    if energy.gaussian is not None and not model_part(posterior.params):
        return _of_locations
    if energy.whole.guide.num_normals is None:
        raise ValueError(
            "The guide draws other than standard normal noise, which two evaluations cannot share: use `Influence`."
        )
    return _of_guide


def _points(posterior: Posterior) -> tuple[LocationPoints | GuidePoints | DrawPoints, Params]:
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


def _of_locations(posterior: Posterior, erased: Data, seed: int) -> Network:
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
    return Network(posterior, LocationPoints(inner, widths), origin, force, back)


def _of_guide(posterior: Posterior, erased: Data, seed: int) -> Network:
    """All parameters of any other guide, learned ones of the model included."""
    points, first = _points(posterior)
    origin = {name: value.detach()[None] for name, value in first.items()}
    size = -(-erased.num_data // SHARED_DRAWS) if points.shares_noise else erased.batch_size
    force = share_gradient(points, origin, erased.with_batch_size(size), seed)
    return Network(posterior, points, origin, force, lambda params: {name: v[0] for name, v in params.items()})


def _of_draws(posterior: Posterior, erased: Data, seed: int) -> Network:
    """Every draw on its own."""
    points, _ = _points(posterior)
    lead = next(iter(posterior.params.values())).shape[:2]
    origin = {name: value.flatten(0, 1) for name, value in posterior.params.items()}
    empty = Network(posterior, points, origin, origin, lambda params: params)
    pieces = [
        share_gradient(points, {name: value[group] for name, value in origin.items()}, erased, seed)
        for group in empty.groups()
    ]
    force = {name: torch.cat([piece[name] for piece in pieces]) for name in origin}

    def back(params: Params) -> Params:
        return {name: value.reshape(*lead, *value.shape[1:]) for name, value in params.items()}

    return Network(posterior, points, origin, force, back)


def _require_known_classes(where: tuple[Points, Params], data: Data) -> None:
    """Raise where a row's class is none of the output's."""
    points, point = where

    def of(batch: Batch) -> Tensor:
        with torch.no_grad(), quiet():
            natural = natural_of(points.run(point, batch, points.noise(batch, 0)))
        if natural.kind == "Categorical":
            target, known = natural.target, natural.output.shape[-1]
            wrong = target[(target < 0) | (target >= known)]
            if len(wrong):
                raise ValueError(
                    f"{len(wrong)} erased rows have classes such as {int(wrong[0])}, the output layer has {known} "
                    "units: pass the rows that the posterior was fitted to."
                )
        return torch.zeros(())

    data.reduce(of)


def _first(data: Data) -> Data:
    return data.split(data.ids[:1])[0]
