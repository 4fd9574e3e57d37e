"""Damped Newton steps on the tilted retained energy, for params of any meaning."""

from dataclasses import dataclass
from typing import cast

from pyro_forget.curvature import check_deterministic
from pyro_forget.curvature.hessian import Hessian
from pyro_forget.inference.location import Step, best_step, krylov, moved
from pyro_forget.inference.sweeps import Descent, Place, Sweep, ending, undamped_fall
from pyro_forget.params import Params, scale
from pyro_forget.solvers.lanczos import KrylovSpace
from pyro_forget.tilt import TiltedEnergy

# Of the largest curvature seen: the params have no metric of their own here.
RELATIVE_DAMPINGS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class NewtonSteps:
    """The rule of `Sweeps` with the Hessian of the params themselves.

    Attributes:
        max_sweeps: at most so many steps; one is the influence function.
        num_products: Hessian products of a step's Krylov space.
    """

    max_sweeps: int = 8
    num_products: int = 20

    def run(self, pair: tuple[TiltedEnergy, TiltedEnergy]) -> Descent:
        """Step from the tilt's origin; `pair` is the tilted energy under the steps' and under held-out noise."""
        tilted, place, sweeps = pair[0], Place.origin(pair), list[Sweep]()
        curvature = at_origin = Hessian(tilted.energy, place.params, tilted.retained)
        check_deterministic(at_origin, place.params, linear=False, symmetric=False)
        first: KrylovSpace | None = None
        ended = "max_sweeps"
        for number in range(self.max_sweeps):
            curvature = Hessian(tilted.energy, place.params, tilted.retained) if number else at_origin
            space = self._space(curvature, place.gradient)
            first = first or space
            step = None if (stop := ending(space, sweeps, tilted)) else _step(space, place.params, pair, place.values)
            if step is None:
                ended = stop or "nothing accepted"
                break
            sweeps.append(Sweep(step, None, space.num_steps, undamped_fall(space)))
            place = place.after(step)
        return Descent(place.params, tuple(sweeps), ended, cast(KrylovSpace, first), at_origin, place.values)

    def _space(self, curvature: Hessian, gradient: Params) -> KrylovSpace:
        return krylov(curvature, scale(gradient, -1.0), (_same, _same), self.num_products)


def _step(
    space: KrylovSpace, params: Params, pair: tuple[TiltedEnergy, TiltedEnergy], values: tuple[float, float]
) -> Step | None:
    largest = float(space.ritz_values.abs().max()) if space.num_steps else 0.0
    # Where curvature is negative, damping must first lift it.
    lift = max(0.0, -space.smallest_ritz) * 1.1 if space.num_steps else 0.0
    dampings = [lift + relative * largest for relative in RELATIVE_DAMPINGS]
    return best_step(space, lambda u: moved(params, u), pair, values, dampings)


def _same(params: Params) -> Params:
    return params
