"""The energy of a Gaussian guide as a function of (location, log scale) or (location, Cholesky factor)."""

from dataclasses import dataclass

from torch import Tensor

from pyro_forget.data import Batch, Data
from pyro_forget.effects.noise import Noise
from pyro_forget.energy.gaussian import GaussianEnergy
from pyro_forget.energy.protocol import estimate_of_parts, total_of_parts
from pyro_forget.gaussian import Gaussian
from pyro_forget.params import Params

LOC, LOG_SCALE, FACTOR = "loc/", "log_scale/", "factor"


@dataclass(frozen=True)
class CoordinateEnergy:
    """A `GaussianEnergy` whose params are the Gaussian's coordinates, whatever the guide's own parameters are.

    Log scales, so that a gradient is per relative change and no guide's map (exp, softplus) enters.
    """

    gaussian: GaussianEnergy

    def prior(self, params: Params) -> Tensor:
        """KL(q ‖ prior), scalar, nats."""
        return self.gaussian.prior(gaussian_of(params))

    def share(self, params: Params, batch: Batch) -> Tensor:
        """E_q[−log likelihood] summed over the batch's rows, scalar, nats."""
        return self.gaussian.share(gaussian_of(params), batch)

    def total(self, params: Params, data: Data) -> Tensor:
        """F(γ, data), scalar, nats."""
        return total_of_parts(self, params, data)

    def with_noise(self, seed: int, pairs: int | None = None) -> "CoordinateEnergy":
        """The same under other noise."""
        return CoordinateEnergy(self.gaussian.with_noise(Noise(seed, pairs or self.gaussian.noise.pairs)))

    def with_fresh_noise(self, seed: int, num_draws: int) -> "CoordinateEnergy":
        """The same under independent draws for one batch, the noise of stochastic methods."""
        return CoordinateEnergy(self.gaussian.with_noise(Noise.fresh(seed, num_draws)))

    def estimate(self, params: Params, batch: Batch, num_data: int) -> Tensor:
        """F(γ, S) estimated with the batch standing for all `num_data` rows, scalar, nats."""
        return estimate_of_parts(self, params, batch, num_data)


def coordinates_of(gaussian: Gaussian) -> Params:
    """Location and log scale by site, or location by site and the whole factor."""
    if isinstance(gaussian.scale, Tensor):
        return {LOC + name: value for name, value in gaussian.loc.items()} | {FACTOR: gaussian.scale}
    return coordinate_params(gaussian.loc, {name: value.log() for name, value in gaussian.scale.items()})


def coordinate_params(loc: Params, log_scale: Params) -> Params:
    """The params of these locations and log scales, by site."""
    return {LOC + name: value for name, value in loc.items()} | {
        LOG_SCALE + name: value for name, value in log_scale.items()
    }


def gaussian_of(params: Params) -> Gaussian:
    """The inverse of `coordinates_of`."""
    loc = {name[len(LOC) :]: value for name, value in params.items() if name.startswith(LOC)}
    if FACTOR in params:
        return Gaussian(loc, params[FACTOR])
    log_scale = {name: params[LOG_SCALE + name] for name in loc}
    return Gaussian(loc, {name: value.exp() for name, value in log_scale.items()}, log_scale)


def loc_part(params: Params) -> Params:
    """The location's entries, by site."""
    return {name[len(LOC) :]: value for name, value in params.items() if name.startswith(LOC)}


def scale_part(params: Params) -> Params | Tensor:
    """The log scale's entries by site, or the factor's."""
    if FACTOR in params:
        return params[FACTOR]
    return {name[len(LOG_SCALE) :]: value for name, value in params.items() if name.startswith(LOG_SCALE)}
