"""Mean predictions of a classifier beside labels and beside those of another."""

import math

from torch import Tensor


def mean_log_probs(log_probs: Tensor) -> Tensor:
    """Log of the mean probability over the draws: (draw, *data, category) to (*data, category)."""
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def error_rate(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Share of the data whose most probable class under the mean prediction is not theirs.

    Args:
        log_probs: shape (draw, datum, category).
        labels: int64, shape (datum,).
    """
    return (mean_log_probs(log_probs).argmax(-1) != labels).double().mean()


def predictive_l1(log_probs_a: Tensor, log_probs_b: Tensor) -> Tensor:
    """Σ over categories of |p_a − p_b| of the mean predictions, averaged over the data: 0 to 2.

    Args:
        log_probs_a: log probabilities of shape (draw, *data, category).
        log_probs_b: likewise, of as many or other draws.
    """
    if log_probs_a.shape[1:] != log_probs_b.shape[1:]:
        shapes = f"{tuple(log_probs_a.shape)} and {tuple(log_probs_b.shape)}"
        raise ValueError(f"predictions of shapes {shapes} must agree in all but the first dimension, the draws.")
    gap = mean_log_probs(log_probs_a).exp() - mean_log_probs(log_probs_b).exp()
    return gap.abs().sum(-1).mean()


def true_class_probability(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Probability of each datum's own class under the mean prediction, shape (datum,)."""
    return mean_log_probs(log_probs).gather(-1, labels[:, None])[:, 0].exp().clamp(max=1.0)
