"""Can a threshold on the confidence tell the erased data from data that were never there?"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ThresholdAttack:
    """A membership attack that calls a datum a member where its true class is given at least so much probability.

    Attributes:
        threshold: the one with the best balanced accuracy on known members and known strangers.
        accuracy: that accuracy; ½ is chance.
        erased_as_strangers: the share of the erased data that the attack takes for strangers.
        test_as_strangers: the same of the known strangers: what the former would be had they never been there.
    """

    threshold: float
    accuracy: float
    erased_as_strangers: float
    test_as_strangers: float


def threshold_attack(erased: Tensor, retained: Tensor, test: Tensor) -> ThresholdAttack:
    """Fit the threshold on retained against test data, and try it on the erased.

    Whoever attacks a posterior that forgot a whole class sees it fail, for the class is then rare in every respect:
    compare with the same attack on a refit.

    Args:
        erased: probability that the posterior gives each erased datum's true class, shape (datum,).
        retained: likewise of data that are still in.
        test: likewise of data that never were.

    Raises:
        ValueError: a probability is not in [0, 1], or there are none.

    References:
        Yeom, Giacomelli, Fredrikson and Jha (2018), Privacy risk in machine learning, section 3; as used by Fu, He
        and Tao (2022), Knowledge removal in sampling-based Bayesian inference, section 6.
    """
    for name, values in (("erased", erased), ("retained", retained), ("test", test)):
        if not values.numel() or not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"`{name}` must be probabilities of true classes in [0, 1], one or more.")
    candidates = torch.cat([retained, test]).unique()
    members = 1 - _share_below(retained, candidates)
    strangers = _share_below(test, candidates)
    balanced = 0.5 * (members + strangers)
    best = int(balanced.argmax())
    threshold = candidates[best]
    return ThresholdAttack(
        threshold=float(threshold),
        accuracy=float(balanced[best]),
        erased_as_strangers=float((erased < threshold).double().mean()),
        test_as_strangers=float((test < threshold).double().mean()),
    )


def _share_below(values: Tensor, thresholds: Tensor) -> Tensor:
    """Share of the values strictly below each threshold."""
    return torch.searchsorted(values.sort().values, thresholds).double() / len(values)
