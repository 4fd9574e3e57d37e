"""Stochastic-gradient MCMC on Pyro models: one rule a file, chains side by side, draws streamed to disk."""

from pyro_forget.inference.stochastic.control import SVRG, FixedMode
from pyro_forget.inference.stochastic.failure import Diverged
from pyro_forget.inference.stochastic.kernel import MiniBatchKernel
from pyro_forget.inference.stochastic.psgld import PSGLD
from pyro_forget.inference.stochastic.rule import Rule
from pyro_forget.inference.stochastic.sample import sample_posterior
from pyro_forget.inference.stochastic.sampling import Sampling
from pyro_forget.inference.stochastic.scale_adapted_sghmc import ScaleAdaptedSGHMC
from pyro_forget.inference.stochastic.schedule import Constant, Cyclic, RobbinsMonro, Schedule
from pyro_forget.inference.stochastic.sghmc import SGHMC
from pyro_forget.inference.stochastic.sgld import SGLD
from pyro_forget.inference.stochastic.sgnht import SGNHT

__all__ = [
    "PSGLD",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "SVRG",
    "Constant",
    "Cyclic",
    "Diverged",
    "FixedMode",
    "MiniBatchKernel",
    "RobbinsMonro",
    "Rule",
    "Sampling",
    "ScaleAdaptedSGHMC",
    "Schedule",
    "sample_posterior",
]
