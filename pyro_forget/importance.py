"""Importance weights: Pareto smoothing, effective sample size, resampling.

Everywhere in this package a log weight is log(target) − log(proposal), up to a constant: large where a draw should
count for more. To delete data from exact draws the weights are therefore 1/p(erased | θ), minus a log likelihood.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from arviz_stats.base import array_stats
from torch import Tensor

DRAWS_FOR_KHAT = 25  # the generalised Pareto fit wants a tail of 5 draws, a fifth of a small sample
_NO_SPREAD = 1e-10  # log weights that differ by less are rounding errors of equal weights
_UNDERFLOW = -700.0  # log weights below this, relative to the largest, are 0 in float64


@dataclass(frozen=True)
class SmoothedWeights:
    """Normalised importance weights and how far to trust them.

    Attributes:
        log_weights: of the shape of the raw ones, float64; their exponentials sum to 1.
        khat: Pareto k̂ of the upper tail; −inf where that tail is constant, inf where a few draws carry
            everything, None where it cannot be estimated (fewer than 25 draws, or a tail full of repeated draws).
        ess: effective sample size 1 / Σw².
    """

    log_weights: Tensor
    khat: float | None
    ess: float


def pareto_smooth(log_weights: Tensor) -> SmoothedWeights:
    """Replace the largest weights by quantiles of a generalised Pareto fit, and normalise all.

    Args:
        log_weights: raw log weights of any shape, say (chain, draw); all entries are draws of one sample. An entry
            of −inf is a draw of weight 0.

    Raises:
        ValueError: an entry is NaN or +inf, none is finite, or there is none.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, JMLR 25(72).
    """
    _check(log_weights)
    raw = log_weights.detach().double().cpu().reshape(-1)
    smoothed, khat = _smoothed(raw)
    return SmoothedWeights(
        log_weights=smoothed.reshape(log_weights.shape).to(log_weights.device),
        khat=khat,
        ess=effective_sample_size(smoothed),
    )


def khat_threshold(num_draws: int) -> float:
    """The k̂ above which `num_draws` draws are too few: min(1 − 1/log₁₀ S, 0.7), Vehtari et al. (2024)."""
    if num_draws < 2:
        raise ValueError(f"a threshold for k̂ needs at least 2 draws, got {num_draws}.")
    return min(1 - 1 / math.log10(num_draws), 0.7)


def effective_sample_size(log_weights: Tensor) -> float:
    """(Σw)² / Σw², between 1 and the number of draws: Kish's measure. The weights need not be normalised."""
    flat = log_weights.detach().double().reshape(-1)
    return float(torch.exp(2 * flat.logsumexp(0) - (2 * flat).logsumexp(0)))


def normalise(log_weights: Tensor) -> Tensor:
    """The log weights less their logsumexp, over all entries, in float64."""
    log_weights = log_weights.double()
    return log_weights - log_weights.reshape(-1).logsumexp(0)


def systematic_resample(log_weights: Tensor, num_draws: int, seed: int = 0) -> Tensor:
    """Indices of `num_draws` equally weighted draws, ascending, of shape (num_draws,) and type int64.

    One uniform number places a comb of equal distances over the cumulative weights, so a draw of weight w appears
    ⌊w·num_draws⌋ or ⌈w·num_draws⌉ times and a draw of weight 0 never. They index the flattened weights. The random
    state of the caller is neither read nor changed.

    References:
        Kitagawa (1996), Monte Carlo filter and smoother for non-Gaussian nonlinear state space models, appendix.
    """
    _check(log_weights)
    if num_draws < 1:
        raise ValueError(f"`num_draws` must be at least 1, got {num_draws}.")
    cumulative = normalise(log_weights.detach()).reshape(-1).cpu().exp().cumsum(0)
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand((), generator=generator, dtype=torch.float64)
    comb = (first + torch.arange(num_draws, dtype=torch.float64)) / num_draws
    comb = comb.clamp(max=1 - 2**-53)  # below the last cumulative weight, which the division makes 1
    indices = torch.searchsorted(cumulative / cumulative[-1], comb, right=True)
    return indices.to(log_weights.device)


def _check(log_weights: Tensor) -> None:
    if log_weights.numel() == 0:
        raise ValueError(f"log weights of shape {tuple(log_weights.shape)} hold no draw.")
    num_bad = int((log_weights.isnan() | log_weights.isposinf()).sum())
    if num_bad:
        raise ValueError(
            f"{num_bad} of {log_weights.numel()} log weights are NaN or +inf: "
            "the log densities must be finite at the draws."
        )
    if not bool(log_weights.isfinite().any()):
        raise ValueError("every draw has weight 0: the target gives none of the draws any density.")


def _smoothed(raw: Tensor) -> tuple[Tensor, float | None]:
    """Normalised log weights and k̂ of a flat float64 vector on the CPU."""
    if float(raw.max() - raw.min()) < _NO_SPREAD:
        return torch.full_like(raw, -math.log(len(raw))), -math.inf
    if len(raw) < DRAWS_FOR_KHAT:
        return normalise(raw), None
    cutoff, tail = _tail(raw - raw.max())
    if float(tail[-1] - tail[0]) < _NO_SPREAD:
        return normalise(raw), -math.inf
    if tail[math.floor(len(tail) / 4 + 0.5) - 1].exp() == cutoff.exp():  # the fit divides by their difference
        return normalise(raw), None if cutoff > _UNDERFLOW else math.inf
    # Minus, for psislw is made for log likelihoods: it smooths the weights exp(−ary).
    smoothed, khat = array_stats.psislw(-raw.numpy())
    if not (np.isfinite(khat) and np.isfinite(smoothed[raw.isfinite().numpy()]).all()):
        return normalise(raw), math.inf
    return torch.from_numpy(np.array(smoothed)), float(khat)


def _tail(raw: Tensor) -> tuple[Tensor, Tensor]:
    """The log weights that the Pareto fit sees, ascending, and the largest one below them."""
    num_draws = len(raw)
    size = math.floor(3 * math.sqrt(num_draws) if num_draws > 225 else num_draws / 5)
    ordered = raw.sort().values
    return ordered[-size - 1], ordered[-size:]
