"""How far apart are two posteriors, and what part of the way to a refit is left?

Distances between Gaussians in closed form, between clouds of draws and between predictions. A distance to a refit
means nothing beside the distance of two refits from each other: `remaining_fraction` reports both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pyro_forget.importance import effective_sample_size, normalise

Compared = TypeVar("Compared")

_BLOCK = 1 << 22  # kernel values in memory at once: 32 MiB
_FOR_BANDWIDTH = 1000  # pooled draws whose distances the median is taken of; its error does not matter to the test


def gaussian_kl(loc0: Tensor, scale0: Tensor, loc1: Tensor, scale1: Tensor) -> Tensor:
    """KL(N(loc0, scale0) ‖ N(loc1, scale1)) in nats, a float64 scalar.

    ½ [tr(Σ₁⁻¹Σ₀) + (μ₁ − μ₀)ᵀ Σ₁⁻¹ (μ₁ − μ₀) − d] + log|L₁| − log|L₀|.

    Args:
        loc0: of any shape.
        scale0: standard deviations of the shape of `loc0` or, if that is (d,), a lower Cholesky factor (d, d).
        loc1: of the shape of `loc0`.
        scale1: like `scale0`; the two may differ in kind.

    Raises:
        ValueError: a shape fits neither, the locations differ in shape, or a standard deviation is not positive.
    """
    _check_scale(loc0, scale0, "0")
    _check_scale(loc1, scale1, "1")
    if loc0.shape != loc1.shape:
        raise ValueError(f"the locations differ in shape: {tuple(loc0.shape)} and {tuple(loc1.shape)}.")
    difference = loc1.double() - loc0.double()
    if scale0.shape == loc0.shape and scale1.shape == loc1.shape:
        ratio = scale0.double() / scale1.double()
        shift = difference / scale1.double()
        return (0.5 * (ratio.square() + shift.square() - 1) - ratio.log()).sum()
    left, right = _triangular(scale0), _triangular(scale1)
    whitened = torch.linalg.solve_triangular(right, torch.cat([left, difference[:, None]], 1), upper=False)
    log_ratio = (right.diagonal().log() - left.diagonal().log()).sum()
    return 0.5 * (whitened.square().sum() - len(difference)) + log_ratio


def moment_kl(
    draws_a: Tensor, draws_b: Tensor, log_weights_a: Tensor | None = None, log_weights_b: Tensor | None = None
) -> Tensor:
    """KL(a ‖ b) in nats between the Gaussians with the moments of two clouds of draws.

    Two clouds of S independent draws of one distribution are about (d + d(d + 1)/2)/S apart.

    Args:
        draws_a: of shape (draw, *event); the event is flattened to d numbers.
        draws_b: as many or other draws of the same event.
        log_weights_a: of shape (draw,), need not be normalised; None for equal weights.
        log_weights_b: likewise.

    Raises:
        ValueError: a cloud has too few draws, or too few different ones, for a covariance.
    """
    rows_a, rows_b = _rows(draws_a, draws_b)
    return gaussian_kl(*_moments(rows_a, log_weights_a, "a"), *_moments(rows_b, log_weights_b, "b"))


def mmd(
    draws_a: Tensor,
    draws_b: Tensor,
    log_weights_a: Tensor | None = None,
    log_weights_b: Tensor | None = None,
    *,
    bandwidth: float | None = None,
) -> Tensor:
    """The squared maximum mean discrepancy under exp(−‖x − y‖² / 2h²), without bias: below 0 where it is near 0.

    Args:
        draws_a: of shape (draw, *event), at least two of them.
        draws_b: as many or other draws of the same event.
        log_weights_a: of shape (draw,); None for equal weights.
        log_weights_b: likewise.
        bandwidth: h; the median distance between pooled draws if None. Fix it to compare several clouds with one.

    References:
        Gretton, Borgwardt, Rasch, Schölkopf and Smola (2012), A kernel two-sample test, JMLR 13, eq. 3.
    """
    a, b = _rows(draws_a, draws_b)
    weights_a, weights_b = _weights(a, log_weights_a, "a"), _weights(b, log_weights_b, "b")
    pooled = torch.cat([a, b])
    a, b = a - pooled.mean(0), b - pooled.mean(0)  # cdist squares: digits are lost far from 0
    some = pooled[:: max(1, len(pooled) // _FOR_BANDWIDTH)]
    h = float(torch.pdist(some).median()) if bandwidth is None else bandwidth
    if not h > 0:
        raise ValueError(f"the bandwidth must be positive, got {h}: do all draws coincide?")
    within_a = _mean_kernel(a, weights_a, a, weights_a, h, distinct=True)
    within_b = _mean_kernel(b, weights_b, b, weights_b, h, distinct=True)
    return within_a + within_b - 2 * _mean_kernel(a, weights_a, b, weights_b, h, distinct=False)


def sliced_wasserstein(
    draws_a: Tensor,
    draws_b: Tensor,
    log_weights_a: Tensor | None = None,
    log_weights_b: Tensor | None = None,
    *,
    num_directions: int = 128,
    seed: int = 0,
) -> Tensor:
    """The root of the mean squared 2-Wasserstein distance between projections, in units of the draws.

    Clouds that differ by a shift δ are ‖δ‖/√d apart, exactly if `num_directions` is a multiple of d: the directions
    are seeded random orthonormal frames.

    Args:
        draws_a: of shape (draw, *event).
        draws_b: as many or other draws of the same event.
        log_weights_a: of shape (draw,); None for equal weights.
        log_weights_b: likewise.
        num_directions: projections averaged over.
        seed: of the directions; the caller's random state is not touched.

    References:
        Bonneel, Rabin, Peyré and Pfister (2015), Sliced and Radon Wasserstein barycenters of measures, section 3.
    """
    a, b = _rows(draws_a, draws_b)
    weights_a, weights_b = _weights(a, log_weights_a, "a"), _weights(b, log_weights_b, "b")
    directions = _directions(a.shape[1], num_directions, seed).to(a)
    blocks = directions.split(max(1, _BLOCK // (len(a) + len(b))))
    squared = [_squared_wasserstein(block @ a.T, weights_a, block @ b.T, weights_b) for block in blocks]
    return torch.cat(squared).mean().sqrt()


def predictive_kl(log_probs_a: Tensor, log_probs_b: Tensor) -> Tensor:
    """KL between the mean predictive distributions of a and b, in nats, averaged over the data.

    Args:
        log_probs_a: log probabilities of shape (draw, *data, category).
        log_probs_b: likewise, of as many or other draws.

    Raises:
        ValueError: the probabilities of a draw do not sum to 1, or the shapes beyond the draws differ.
    """
    if log_probs_a.shape[1:] != log_probs_b.shape[1:]:
        shapes = f"{tuple(log_probs_a.shape)} and {tuple(log_probs_b.shape)}"
        raise ValueError(f"predictions of shapes {shapes} must agree in all but the first dimension, the draws.")
    a, b = _mean_log_prob(log_probs_a, "a"), _mean_log_prob(log_probs_b, "b")
    terms = torch.where(a > -math.inf, a.exp() * (a - b), 0.0)
    return terms.sum(-1).mean()


@dataclass(frozen=True)
class RemainingFraction:
    """What is left of the way from the posterior before to a refit: 0 is the refit, 1 is nothing done.

    Attributes:
        value: distance(after, refit) / distance(before, refit).
        floor: distance(another refit, refit) / distance(before, refit): what a refit itself would score. None
            without another refit.
        distance_before, distance_after, distance_floor: the three distances.
    """

    value: float
    floor: float | None
    distance_before: float
    distance_after: float
    distance_floor: float | None

    @property
    def meaningful(self) -> bool:
        """Whether there was a way to go: the distance before is at least twice that between two refits.

        Without another refit, only that the distance before is positive: enough if refits have no noise.
        """
        return math.isfinite(self.value) and self.distance_before > 2 * (self.distance_floor or 0.0)


def remaining_fraction(
    before: Compared,
    after: Compared,
    refit: Compared,
    refit_again: Compared | None = None,
    *,
    distance: Callable[[Compared, Compared], Tensor | float],
) -> RemainingFraction:
    """How much of the distance between the posterior `before` and a refit is left `after` forgetting.

    Args:
        before: whatever `distance` takes.
        after: likewise.
        refit: likewise.
        refit_again: a second, independent refit (other start, other noise), for the floor.
        distance: between a posterior and the refit, which comes second.
    """
    distance_before = float(distance(before, refit))
    distance_after = float(distance(after, refit))
    distance_floor = None if refit_again is None else float(distance(refit_again, refit))
    scale = 1 / distance_before if distance_before > 0 else math.nan
    return RemainingFraction(
        value=distance_after * scale,
        floor=None if distance_floor is None else distance_floor * scale,
        distance_before=distance_before,
        distance_after=distance_after,
        distance_floor=distance_floor,
    )


def _check_scale(loc: Tensor, scale: Tensor, which: str) -> None:
    matrix = loc.ndim == 1 and scale.shape == (*loc.shape, *loc.shape)
    if scale.shape != loc.shape and not matrix:
        raise ValueError(
            f"`scale{which}` has shape {tuple(scale.shape)} for a location of shape {tuple(loc.shape)}; "
            "pass standard deviations of that shape or a lower Cholesky factor (d, d)."
        )
    if not bool(((scale.diagonal() if matrix else scale) > 0).all()):
        raise ValueError(f"`scale{which}` must be positive (on the diagonal): standard deviations, not their logs.")


def _triangular(scale: Tensor) -> Tensor:
    return (scale if scale.ndim == 2 else torch.diag(scale)).double().tril()


def _rows(draws_a: Tensor, draws_b: Tensor) -> tuple[Tensor, Tensor]:
    """Both clouds as float64 matrices (draw, d)."""
    if draws_a.shape[1:] != draws_b.shape[1:] or 0 in (*draws_a.shape, *draws_b.shape) or not draws_a.shape:
        shapes = f"{tuple(draws_a.shape)} and {tuple(draws_b.shape)}"
        raise ValueError(f"draws of shapes {shapes} must agree in all but the first dimension, and hold some draws.")
    a, b = (draws.detach().double().reshape(len(draws), -1) for draws in (draws_a, draws_b))
    return a, b


def _weights(rows: Tensor, log_weights: Tensor | None, which: str) -> Tensor:
    if log_weights is None:
        return torch.full_like(rows[:, 0], 1 / len(rows))
    if log_weights.shape != rows.shape[:1]:
        raise ValueError(f"`log_weights_{which}` has shape {tuple(log_weights.shape)} for {len(rows)} draws.")
    return normalise(log_weights.detach()).exp()


def _moments(rows: Tensor, log_weights: Tensor | None, which: str) -> tuple[Tensor, Tensor]:
    """Mean and Cholesky factor of the covariance, with the n − 1 of weighted draws: 1 − Σw²."""
    weights = _weights(rows, log_weights, which)
    mean = weights @ rows
    centred = rows - mean
    covariance = (weights * centred.T) @ centred / (1 - weights.square().sum())
    factor, info = torch.linalg.cholesky_ex(covariance)
    if info or not bool(factor.isfinite().all()):
        ess = effective_sample_size(weights.log())
        raise ValueError(
            f"draws_{which} have no covariance of full rank: {len(rows)} draws (effectively {ess:.0f}) "
            f"in {rows.shape[1]} dimensions; give more draws, or leave out constant and collinear columns."
        )
    return mean, factor


def _mean_kernel(a: Tensor, weights_a: Tensor, b: Tensor, weights_b: Tensor, h: float, *, distinct: bool) -> Tensor:
    """Σ wᵢ wⱼ k(aᵢ, bⱼ), in blocks of rows; over i ≠ j and normalised by 1 − Σw² if `distinct`."""
    num_rows = max(1, _BLOCK // len(b))
    total = a.new_zeros(())
    for rows, weights in zip(a.split(num_rows), weights_a.split(num_rows), strict=True):
        total = total + weights @ torch.exp(torch.cdist(rows, b).square() / (-2 * h**2)) @ weights_b
    diagonal = weights_a.square().sum()
    return (total - diagonal) / (1 - diagonal) if distinct else total


def _directions(dim: int, num_directions: int, seed: int) -> Tensor:
    """Random orthonormal frames, cut to (num_directions, dim)."""
    if num_directions < 1:
        raise ValueError(f"`num_directions` must be at least 1, got {num_directions}.")
    size = min(dim, num_directions)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(-(-num_directions // size), dim, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(normal).Q.mT.flatten(0, 1)[:num_directions]


def _squared_wasserstein(a: Tensor, weights_a: Tensor, b: Tensor, weights_b: Tensor) -> Tensor:
    """W₂² of each row of `a` (direction, draw) to that of `b`: ∫₀¹ (A⁻¹(u) − B⁻¹(u))² du over the steps of both."""
    a, order_a = a.sort(-1)
    b, order_b = b.sort(-1)
    levels_a, levels_b = weights_a[order_a].cumsum(-1), weights_b[order_b].cumsum(-1)
    levels = torch.cat([levels_a, levels_b], -1).sort(-1).values.clamp(max=1)
    widths = levels.diff(dim=-1, prepend=torch.zeros_like(levels[:, :1]))
    middles = levels - widths / 2
    at_a = torch.searchsorted(levels_a, middles).clamp(max=a.shape[-1] - 1)
    at_b = torch.searchsorted(levels_b, middles).clamp(max=b.shape[-1] - 1)
    return (widths * (a.gather(-1, at_a) - b.gather(-1, at_b)).square()).sum(-1)


def _mean_log_prob(log_probs: Tensor, which: str) -> Tensor:
    """Log of the mean over the draws, the first dimension."""
    log_probs = log_probs.detach().double()
    if not bool((log_probs.logsumexp(-1).abs() < 1e-3).all()):
        raise ValueError(f"`log_probs_{which}` do not sum to 1 over the last dimension: pass log_softmax of logits.")
    return log_probs.logsumexp(0) - math.log(len(log_probs))
