"""Energies: functions of parameters whose minimiser is the posterior of the data, in nats for the whole data set."""

from pyro_forget.energy.coordinates import CoordinateEnergy, coordinates_of, gaussian_of, loc_part, scale_part
from pyro_forget.energy.gaussian import GaussianEnergy
from pyro_forget.energy.gradient import estimate_and_gradient, share_and_gradient
from pyro_forget.energy.protocol import (
    Energy,
    FunctionEnergy,
    NonFinite,
    gradient_over,
    share_of,
    total_of_parts,
    value_and_gradient,
)
from pyro_forget.energy.sampled import SampledEnergy
from pyro_forget.energy.variational import VariationalEnergy, variational_energy
from pyro_forget.energy.weights import WeightSpace, weight_space

__all__ = [
    "CoordinateEnergy",
    "Energy",
    "FunctionEnergy",
    "GaussianEnergy",
    "NonFinite",
    "SampledEnergy",
    "VariationalEnergy",
    "WeightSpace",
    "coordinates_of",
    "estimate_and_gradient",
    "gaussian_of",
    "gradient_over",
    "loc_part",
    "scale_part",
    "share_and_gradient",
    "share_of",
    "total_of_parts",
    "value_and_gradient",
    "variational_energy",
    "weight_space",
]
