"""Posteriors: what a fit leaves, and what forgetting edits."""

from pyro_forget.posterior.handwritten import EnergyPosterior
from pyro_forget.posterior.protocol import Posterior
from pyro_forget.posterior.sampled import SampledPosterior
from pyro_forget.posterior.variational import VariationalPosterior

__all__ = ["EnergyPosterior", "Posterior", "SampledPosterior", "VariationalPosterior"]
