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
from pyro_forget.evaluation.membership import ThresholdAttack, threshold_attack
from pyro_forget.evaluation.neighbours import neighbour_kl
from pyro_forget.evaluation.predictions import error_rate, mean_log_probs, predictive_l1, true_class_probability

__all__ = [
    "RemainingFraction",
    "ThresholdAttack",
    "error_rate",
    "gaussian_kl",
    "mean_log_probs",
    "mmd",
    "moment_kl",
    "neighbour_kl",
    "predictive_kl",
    "predictive_l1",
    "remaining_fraction",
    "sliced_wasserstein",
    "threshold_attack",
    "true_class_probability",
]
