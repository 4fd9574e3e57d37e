"""One method a file: fitting, sampling and carrying draws over."""

from pyro_forget.inference.affine import Affine, affine_fit
from pyro_forget.inference.moment_matching import MomentMatching, held_out_weights, moment_matching
from pyro_forget.inference.stochastic import (
    PSGLD,
    SGHMC,
    SGLD,
    SGNHT,
    SVRG,
    Constant,
    Cyclic,
    Diverged,
    FixedMode,
    MiniBatchKernel,
    RobbinsMonro,
    Sampling,
    ScaleAdaptedSGHMC,
    sample_posterior,
)

__all__ = [
    "PSGLD",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "SVRG",
    "Affine",
    "Constant",
    "Cyclic",
    "Diverged",
    "FixedMode",
    "MiniBatchKernel",
    "MomentMatching",
    "RobbinsMonro",
    "Sampling",
    "ScaleAdaptedSGHMC",
    "affine_fit",
    "held_out_weights",
    "moment_matching",
    "sample_posterior",
]
