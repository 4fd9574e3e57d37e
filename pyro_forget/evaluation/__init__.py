"""One question a file: distance, membership, uncertainty, calibration."""

from pyro_forget.evaluation.distance import (
    RemainingFraction,
    gaussian_kl,
    mmd,
    moment_kl,
    predictive_kl,
    remaining_fraction,
    sliced_wasserstein,
)

__all__ = [
    "RemainingFraction",
    "gaussian_kl",
    "mmd",
    "moment_kl",
    "predictive_kl",
    "remaining_fraction",
    "sliced_wasserstein",
]
