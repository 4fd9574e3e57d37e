"""Iterated moment matching: an affine map that carries draws of one density to another, and weights for the rest.

Pure mathematics on tensors. Draws θ follow a source density; T is an affine map, and the weights of the moved draws Tθ
are  log p(Tθ, target) + log|det T| − log p(θ, source),  always relative to the original draws, never resampled between
passes. Each pass maps the cloud to its own weighted mean and covariance; the better the cloud fits, the more equal the
weights, until nothing is left to match.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_forget.importance import SmoothedWeights, effective_sample_size, pareto_smooth
from pyro_forget.inference.affine import Affine, cloud_moments

LogDensity = Callable[[Tensor], Tensor]

_DONE = 0.95  # ESS / S at which the weights are as good as equal
_GAIN = 1.01  # a pass that raises the ESS by less is stalled
_PATIENCE = (3, 6)  # so many stalled passes in a row end an attempt: where the best ESS is above S/2, and below
_GOOD = 0.9  # ESS / S below which another start is tried
_FEW_DRAWS_PER_DIMENSION = 30  # below, a full covariance is noisy, and a diagonal one is tried too
_TEMPERED_PASSES = 1.6  # a tempered path is longer: 40 passes for 25
_TEMPERED_PATIENCE = 3  # tempered passes in a row without a new best: a path that leads on finds one sooner
HOPELESS = 0.1  # ESS / S below which hardly a draw counts


@dataclass(frozen=True)
class MomentMatching:
    """Draws carried over to the target, with the weights that correct them.

    Attributes:
        draws: (draw, d), moved by `map`, in the order they came.
        log_weights: (draw,), normalised.
        khat: Pareto k̂ of the weights, see `SmoothedWeights`.
        ess: effective sample size of the weights.
        num_passes: evaluations of the target at the whole cloud, over all attempts.
        map: the composed affine map from the original draws.
        start: the attempt that won, "initial" or "identity".
        diagonal: whether it matched variances only.
    """

    draws: Tensor
    log_weights: Tensor
    khat: float | None
    ess: float
    num_passes: int
    map: Affine
    start: str
    diagonal: bool


@dataclass(frozen=True)
class _Problem:
    draws: Tensor
    log_target: LogDensity
    log_source: Tensor
    num_passes: int

    @property
    def tempering_bound(self) -> float:
        """The ESS below which a full covariance of the weighted draws is mostly noise."""
        num_draws, dim = self.draws.shape
        return min(5 * dim + 10, num_draws / 2)


@dataclass(frozen=True)
class _Pass:
    map: Affine
    draws: Tensor
    weights: SmoothedWeights


def moment_matching(
    draws: Tensor,
    log_target: LogDensity,
    log_source: Tensor,
    initial: Affine | None = None,
    *,
    num_passes: int = 25,
    restart: bool = True,
) -> MomentMatching:
    """Move draws of the source to the target and weight them.

    Args:
        draws: unconstrained, of shape (draw, d).
        log_target: log density of the target at draws of that shape, up to a constant, of shape (draw,).
        log_source: log density at the original draws of what they follow, of shape (draw,). For draws that carry
            weights already: less their log weights.
        initial: a first guess of the map. If it leads nowhere the identity is tried too, and the better kept.
        num_passes: at most so many from each start; 1.6 times as many where the weights need tempering.
        restart: whether to begin again where less than a tenth of the draws count at the end of the first attempt.

    Raises:
        ValueError: the shapes disagree, a source density is not finite, or the target is finite at no draw.

    References:
        Paananen, Piironen, Bürkner and Vehtari (2021), Implicitly adaptive importance sampling, Statistics and
        Computing 31:16, algorithm 1. Different here: the moments are matched jointly, whatever k̂ says, up to equal
        weights; degenerate weights are tempered; there is a first guess, and no split into two halves.
    """
    _check(draws, log_source, num_passes)
    problem = _Problem(draws.detach().double(), log_target, log_source.detach().double(), num_passes)
    best, total = None, 0
    for start, name, diagonal in _attempts(problem.draws, initial):
        found, passes = _attempt(problem, start, diagonal)
        total += passes
        if found is not None and (best is None or found.weights.ess > best.ess):
            best = _result(found, name, diagonal)
        if best is not None and (best.ess >= _GOOD * len(draws) or (not restart and best.ess < HOPELESS * len(draws))):
            break
    if best is None:
        raise ValueError("the target's log density is finite at none of the draws, moved or not.")
    return replace(best, num_passes=total)


def held_out_weights(
    draws: Tensor, log_target: LogDensity, log_source: Tensor, initial: Affine | None = None, *, num_passes: int = 25
) -> SmoothedWeights:
    """Weights of the second half of the draws under a map that was fitted on the first.

    A map can fit the noise of its own draws; the effective sample size here, of at most half the draws, does not see
    that fit. The halves are of the order given: with chains laid end to end, other chains.

    Args:
        draws: see `moment_matching`, as are the others.
        log_target: log density of the target.
        log_source: log density of what the draws follow.
        initial: a first guess of the map.
        num_passes: at most so many from each start.

    Returns:
        The weights of the second half; where the target is finite at none of these draws, equal ones with an effective
        sample size of 0.
    """
    half = len(draws) // 2
    fitted = moment_matching(draws[:half], log_target, log_source[:half], initial, num_passes=num_passes)
    return weights_under(fitted.map, draws[half:], log_target, log_source[half:])


def weights_under(through: Affine, draws: Tensor, log_target: LogDensity, log_source: Tensor) -> SmoothedWeights:
    """Weights of draws moved by a map; equal ones with an effective sample size of 0 where all are worth nothing."""
    draws, source = draws.detach().double(), log_source.detach().double()
    found = _weigh(_Problem(draws, log_target, source, 1), through)
    if found is None:
        return SmoothedWeights(torch.full_like(source, -math.log(len(source))), math.inf, 0.0)
    return found.weights


def _check(draws: Tensor, log_source: Tensor, num_passes: int) -> None:
    if draws.ndim != 2 or len(draws) < 2 or log_source.shape != draws.shape[:1]:
        raise ValueError(
            "`draws` must be of shape (draw, d) with at least 2 draws and `log_source` of shape (draw,), "
            f"got {tuple(draws.shape)} and {tuple(log_source.shape)}."
        )
    num_bad = int((~log_source.isfinite()).sum())
    if num_bad:
        raise ValueError(f"the source density is not finite at {num_bad} of {len(draws)} draws: drop these draws.")
    if num_passes < 1:
        raise ValueError(f"`num_passes` must be at least 1, got {num_passes}.")


def _attempts(draws: Tensor, initial: Affine | None) -> Iterator[tuple[Affine, str, bool]]:
    num_draws, dim = draws.shape
    starts = [] if initial is None else [(Affine(initial.matrix.double(), initial.offset.double()), "initial")]
    starts.append((Affine.identity(draws), "identity"))
    yield from ((start, name, False) for start, name in starts)
    if num_draws / dim < _FEW_DRAWS_PER_DIMENSION:
        yield from ((start, name, True) for start, name in starts)


def _attempt(problem: _Problem, start: Affine, diagonal: bool) -> tuple[_Pass | None, int]:
    """The best pass from one start, and how many were made."""
    best, current, stalled, hardly, passes, limit = None, start, 0, 0, 0, problem.num_passes
    while passes < limit and stalled < _PATIENCE[best is None or 2 * best.weights.ess < len(problem.draws)]:
        passes += 1
        here = _weigh(problem, current)
        if here is None:
            break
        stalled = stalled + 1 if best is not None and here.weights.ess < _GAIN * best.weights.ess else 0
        hardly += 1
        if best is None or here.weights.ess > best.weights.ess:
            best, hardly = here, 0
        if here.weights.ess >= _DONE * len(problem.draws):
            break
        log_weights = here.weights.log_weights
        if here.weights.ess < problem.tempering_bound:
            log_weights = tempered(log_weights, problem.tempering_bound)
            limit, stalled = math.ceil(_TEMPERED_PASSES * problem.num_passes), 0
            if hardly >= _TEMPERED_PATIENCE:
                break
        step = _match(here.draws, log_weights, diagonal)
        if step is None:
            break
        current = step.after(current)
    return best, passes


def _weigh(problem: _Problem, current: Affine) -> _Pass | None:
    """The cloud under a map, weighted; None where the map or all weights are good for nothing."""
    moved, log_det = current(problem.draws), current.log_det
    if not (bool(moved.isfinite().all()) and bool(log_det.isfinite())):
        return None
    log_weights = _finite_or_zero(problem.log_target(moved)) + log_det - problem.log_source
    if not bool(log_weights.isfinite().any()):
        return None
    return _Pass(current, moved, pareto_smooth(log_weights))


def _finite_or_zero(log_density: Tensor) -> Tensor:
    """A draw at which the target overflows gets weight 0, as a sampler would reject it."""
    log_density = log_density.detach().double()
    return torch.where(log_density.isfinite(), log_density, -math.inf)


def tempered(log_weights: Tensor, ess: float) -> Tensor:
    """The log weights times the β in (0, 1) that gives them this effective sample size, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if effective_sample_size(middle * log_weights) > ess else (low, middle)
    return middle * log_weights


def _match(draws: Tensor, log_weights: Tensor, diagonal: bool) -> Affine | None:
    """The map from the cloud's own mean and covariance to the weighted ones; None where there is no covariance."""
    mean, factor = cloud_moments(draws, torch.zeros_like(log_weights), diagonal)
    new_mean, new_factor = cloud_moments(draws, log_weights, diagonal)
    if factor is None or new_factor is None:
        return None
    matrix = torch.linalg.solve_triangular(factor, new_factor, upper=False, left=False)
    return Affine(matrix, new_mean - matrix @ mean)


def _result(found: _Pass, start: str, diagonal: bool) -> MomentMatching:
    weights = found.weights
    return MomentMatching(
        draws=found.draws,
        log_weights=weights.log_weights,
        khat=weights.khat,
        ess=weights.ess,
        num_passes=0,
        map=found.map,
        start=start,
        diagonal=diagonal,
    )
