"""Make a fitted Bayesian model in Pyro forget data, with evidence of how close the result is to a refit."""

from pyro_forget.data import Batch, Data
from pyro_forget.energy import Energy, FunctionEnergy
from pyro_forget.evaluation import remaining_fraction
from pyro_forget.export import from_netcdf, to_datatree, to_inferencedata, to_netcdf
from pyro_forget.forgetters import (
    Finetune,
    Influence,
    MoreSteps,
    OutputLayer,
    PairedDescent,
    PublishedChain,
    Retrain,
    Reweight,
    Transport,
)
from pyro_forget.forgetting import Refused, forget
from pyro_forget.inference.fit import fit_guide
from pyro_forget.inference.stochastic import (
    PSGLD,
    SGHMC,
    SGLD,
    SGNHT,
    MiniBatchKernel,
    Sampling,
    ScaleAdaptedSGHMC,
    sample_posterior,
)
from pyro_forget.outcome import Edit, Evidence, Forgetter, Report
from pyro_forget.page import write_page
from pyro_forget.posterior import EnergyPosterior, Posterior, SampledPosterior, VariationalPosterior

__version__ = "0.1.0"

__all__ = [
    "PSGLD",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "Batch",
    "Data",
    "Edit",
    "Energy",
    "EnergyPosterior",
    "Evidence",
    "Finetune",
    "Forgetter",
    "FunctionEnergy",
    "Influence",
    "MiniBatchKernel",
    "MoreSteps",
    "OutputLayer",
    "PairedDescent",
    "Posterior",
    "PublishedChain",
    "Refused",
    "Report",
    "Retrain",
    "Reweight",
    "SampledPosterior",
    "Sampling",
    "ScaleAdaptedSGHMC",
    "Transport",
    "VariationalPosterior",
    "fit_guide",
    "forget",
    "from_netcdf",
    "remaining_fraction",
    "sample_posterior",
    "to_datatree",
    "to_inferencedata",
    "to_netcdf",
    "write_page",
]
