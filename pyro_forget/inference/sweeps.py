"""Block Gauss-Seidel on the tilted retained energy of a Gaussian guide: sweeps of location, then scale."""

import math
from dataclasses import dataclass, replace
from typing import cast

import torch

from pyro_forget.curvature import LinearOperator, check_deterministic
from pyro_forget.curvature.gauss_newton import GaussNewton
from pyro_forget.energy import CoordinateEnergy, gaussian_of, loc_part
from pyro_forget.energy.coordinates import LOC
from pyro_forget.gaussian import Gaussian
from pyro_forget.inference.location import Step, best_step, krylov, measured, moved
from pyro_forget.inference.scale import scale_step
from pyro_forget.params import Params, add, axpy, dot, norm, scale, size, subtract
from pyro_forget.solvers.lanczos import KrylovSpace
from pyro_forget.tilt import TiltedEnergy

GROWTH = 2.0
MAX_RATE = 0.8
# Of the fall so far. Along a ridge (a scale times an offset) a hundredth of the fall is a tenth of the distance.
ENOUGH = 0.001
# ν is a warning, not a step: 8 products give four fifths of it.
STATIONARITY_PRODUCTS = 8


@dataclass(frozen=True)
class Sweep:
    """One sweep that was kept; either part may have had nothing to do.

    Attributes:
        location, scale: the steps.
        num_products: curvature products.
        undamped: what the location's undamped step promised, accepted or not; see `undamped_fall`.
        ahead: the step further along the sweep's own direction.
    """

    location: Step | None
    scale: Step | None
    num_products: int
    undamped: float
    ahead: Step | None = None

    @property
    def fall(self) -> float:
        """Realised fall of the tilted energy under the sweep's own noise, nats."""
        return sum(step.realised for step in (self.location, self.scale, self.ahead) if step is not None)


@dataclass(frozen=True)
class Descent:
    """Where the sweeps ended.

    Attributes:
        params: coordinates; the origin's where nothing was accepted.
        sweeps: those that were kept.
        ended: why they ended: "converged", "diverging", "nothing accepted", "max_sweeps".
        first: the Krylov space of the first sweep, whose force is the request itself.
        curvature: C at the origin.
        values: the tilted energies at `params`, nats.
    """

    params: Params
    sweeps: tuple[Sweep, ...]
    ended: str
    first: KrylovSpace
    curvature: LinearOperator
    values: tuple[float, float]


@dataclass(frozen=True)
class Sweeps:
    """The rule for sweeps.

    Attributes:
        max_sweeps: at most so many; one is the influence function with its scale.
        num_products: Gauss-Newton products of a sweep's Krylov space.
    """

    max_sweeps: int = 8
    num_products: int = 20

    def run(self, pair: tuple[TiltedEnergy, TiltedEnergy]) -> Descent:
        """Sweep from the tilt's origin; `pair` is the tilted energy under the steps' and under held-out noise."""
        place, sweeps = Place.origin(pair), list[Sweep]()
        curvature = at_origin = location_curvature(pair[0], place.params)
        check_deterministic(at_origin, loc_part(place.params), linear=False, symmetric=False)
        first: KrylovSpace | None = None
        ended = "max_sweeps"
        for number in range(self.max_sweeps):
            curvature = location_curvature(pair[0], place.params) if number else at_origin
            space = self._space(curvature, place)
            first = first or space
            if number and (stop := ending(space, sweeps, pair[0])):
                ended = stop
                break
            sweep, end = _sweep(pair, place, space)
            if sweep is None:
                ended = "converged" if undamped_fall(space) <= tolerance(pair[0]) else "nothing accepted"
                break
            if _fade([*sweeps, sweep], pair[0]):
                place, ended = end, "converged"
                sweeps.append(sweep)
                break
            if sweeps and (ahead := _ahead(pair, place.params, end, sweep.fall / sweeps[-1].fall)):
                sweep, end = replace(sweep, ahead=ahead), end.after(ahead)
            place = end
            sweeps.append(sweep)
        return Descent(place.params, tuple(sweeps), ended, cast(KrylovSpace, first), at_origin, place.values)

    def _space(self, curvature: LinearOperator, place: "Place") -> KrylovSpace:
        gaussian = gaussian_of(place.params)
        force = scale(loc_part(place.gradient), -1.0)
        return krylov(curvature, force, (gaussian.root, gaussian.root_transposed), self.num_products)


@dataclass(frozen=True)
class Place:
    """Where a descent stands.

    Attributes:
        params: coordinates.
        values: the tilted energies there, under the steps' and under held-out noise, nats.
        gradient: of the former.
    """

    params: Params
    values: tuple[float, float]
    gradient: Params

    @staticmethod
    def origin(pair: tuple[TiltedEnergy, TiltedEnergy]) -> "Place":
        """The tilt's; the request is the only force there."""
        return Place(pair[0].origin, (pair[0].at_origin, pair[1].at_origin), scale(pair[0].share, -1.0))

    def after(self, step: Step) -> "Place":
        """Where the step leads."""
        return Place(step.params, (self.values[0] - step.realised, self.values[1] - step.held_out), step.gradient)


def location_curvature(tilted: TiltedEnergy, params: Params) -> LinearOperator:
    """C at these coordinates, over the retained data and under the steps' noise."""
    energy = cast(CoordinateEnergy, tilted.energy)
    return GaussNewton(energy.gaussian, gaussian_of(params), tilted.retained)


def tolerance(tilted: TiltedEnergy) -> float:
    """A predicted fall that is as good as none, nats."""
    eps = torch.finfo(next(iter(tilted.origin.values())).dtype).eps
    return max(1e-9, 10 * eps) * max(1.0, abs(tilted.at_origin))


def undamped_fall(space: KrylovSpace) -> float:
    """Predicted fall of the undamped step, nats; infinite where curvature is not positive and there is none.

    Nothing promised is nothing to gain only where there is no force: an indefinite space is far from a minimum.
    """
    predicted = space.predicted_fall()
    return predicted if predicted > 0 or space.length == 0 else math.inf


def ending(space: KrylovSpace, sweeps: list[Sweep], tilted: TiltedEnergy) -> str | None:
    """Why no further step is due: done, or growing where it should shrink; None where one is.

    Like is compared with like: the undamped step's promise with the last sweep's, whatever damping was kept there.
    """
    predicted = undamped_fall(space)
    if predicted <= _enough(sweeps, tilted):
        return "converged"
    if sweeps and math.isfinite(predicted) and predicted > GROWTH * max(sweeps[-1].undamped, sweeps[-1].fall):
        return "diverging"
    return None


def _enough(sweeps: list[Sweep], tilted: TiltedEnergy) -> float:
    """A predicted fall that is not worth a sweep, nats."""
    return max(tolerance(tilted), ENOUGH * sum(sweep.fall for sweep in sweeps))


def _fade(sweeps: list[Sweep], tilted: TiltedEnergy) -> bool:
    """Whether undamped sweeps shrink so fast that the next, by the same ratio, would not be worth its products."""
    if len(sweeps) < 2 or any(sweep.location is None or sweep.location.damping for sweep in sweeps[-2:]):
        return False
    # Undamped steps converge faster than by a steady ratio: a sixth to a half of what it says is what comes.
    return sweeps[-1].fall ** 2 <= 4 * _enough(sweeps, tilted) * sweeps[-2].fall


def _sweep(pair: tuple[TiltedEnergy, TiltedEnergy], place: Place, space: KrylovSpace) -> tuple[Sweep | None, Place]:
    """Location, then scale at the new location; None where neither had an acceptable step."""
    location = None
    if undamped_fall(space) > tolerance(pair[0]):
        location = best_step(space, lambda u: _shifted(place.params, gaussian_of(place.params), u), pair, place.values)
    moved_to = place.after(location) if location else place
    # A location that has converged does not excuse the scale: points of zero residual still narrow it.
    untilted = add(moved_to.gradient, pair[0].tilt)
    widened = scale_step(moved_to.params, pair, moved_to.values, untilted, tolerance(pair[0]))
    if location is None and widened is None:
        return None, place
    sweep = Sweep(location, widened, space.num_steps, undamped_fall(space))
    return sweep, moved_to.after(widened) if widened else moved_to


def _ahead(pair: tuple[TiltedEnergy, TiltedEnergy], start: Params, end: Place, ratio: float) -> Step | None:
    """Where the sweeps are heading, if the energy is lower there under both noises.

    Location and scale pull at each other in hierarchies, so that sweeps shrink by a steady factor ρ; the sum of the
    geometric series that is left is ρ / (1 − ρ) of the last one (Aitken 1926). Falls shrink by ρ².
    """
    rate = min(math.sqrt(max(ratio, 0.0)), MAX_RATE)
    ahead = axpy(rate / (1 - rate), subtract(end.params, start), end.params)
    return measured(ahead, pair, end.values, least=0.0)


def _shifted(params: Params, gaussian: Gaussian, solution: Params) -> Params:
    """The coordinates after the location's step L·u."""
    step = {LOC + name: value for name, value in gaussian.root(solution).items()}
    return moved(params, step)


def stationarity(pair: tuple[TiltedEnergy, TiltedEnergy], descent: Descent) -> float | None:
    """ν = ⟨t_B, C⁻¹t_A⟩ / ⟨∇h, C⁻¹∇h⟩: how far the fit was from stationary relative to what is asked.

    The two noises are independent, so theirs cancels. None without a Krylov space to tell, or for params without a
    location.
    """
    asked = 2 * descent.first.predicted_fall()
    if asked <= 0 or not loc_part(pair[0].tilt):
        return None
    gaussian = gaussian_of(pair[0].origin)
    metric = (gaussian.root, gaussian.root_transposed)
    num_products = min(STATIONARITY_PRODUCTS, descent.first.num_steps)
    space = krylov(descent.curvature, loc_part(pair[0].tilt), metric, num_products)
    if space.smallest_ritz <= 0:
        return None
    left = gaussian.root(space.solve().value)
    return abs(float(dot(loc_part(pair[1].tilt), left))) / asked


def loc_force(pair: tuple[TiltedEnergy, TiltedEnergy]) -> tuple[float, float]:
    """(‖σ ⊙ ∇F(γ₀, S)‖/√D over the location, its Monte Carlo error); independent noises, so theirs cancels."""
    gaussian = gaussian_of(pair[0].origin)
    mine, theirs = (gaussian.root_transposed(loc_part(tilted.tilt)) for tilted in pair)
    count = size(mine)
    return (abs(float(dot(mine, theirs))) / count) ** 0.5, norm(subtract(mine, theirs)) / (2 * count**0.5)
