"""One method a file: fitting, sampling and carrying draws over."""

from pyro_forget.inference.moment_matching import (
    Affine,
    MomentMatching,
    affine_fit,
    held_out_weights,
    moment_matching,
)

__all__ = ["Affine", "MomentMatching", "affine_fit", "held_out_weights", "moment_matching"]
