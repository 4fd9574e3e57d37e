"""The scale of a Gaussian at a given location: the ratio of the precision it has to the one it should have."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_forget.energy.coordinates import FACTOR, LOG_SCALE
from pyro_forget.inference.location import ACCEPT, Step, measured
from pyro_forget.params import Params
from pyro_forget.tilt import TiltedEnergy

FLOOR = 0.05
CAPS = (64.0, 4.0)
POWERS = (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class _Candidate:
    """A scale and the fall that the fixed point's quadratic predicts for it, nats."""

    params: Params
    predicted: float


def scale_step(
    params: Params,
    pair: tuple[TiltedEnergy, TiltedEnergy],
    values: tuple[float, float],
    gradient: Params,
    tolerance: float,
) -> Step | None:
    """The first scale, from the boldest to the mildest, that keeps ¼ of its promise under both noises.

    At the optimum of the tilted energy 1 + t = M = σ²·E_q[∂²(−log joint)] by Price's theorem, read from the gradient
    in log σ as 1 + σ∂_σF (Opper and Archambeau 2009, equation 11). So σ² ← σ²·(1 + t)/M, and for a Cholesky factor
    the matrices of the same meaning.

    Args:
        params: coordinates at the new location.
        pair: tilted energies under the step's noise and the held-out noise.
        values: of both at `params`.
        gradient: of the first's *untilted* energy F at `params`.
        tolerance: a predicted fall that is as good as none, nats.
    """
    for candidate in _candidates(params, gradient, pair[0].tilt):
        if not candidate.predicted > tolerance:
            continue
        least = ACCEPT * candidate.predicted
        step = measured(candidate.params, pair, values, least, predicted=candidate.predicted)
        if step is not None:
            return step
    return None


def _candidates(params: Params, gradient: Params, tilt: Params) -> Iterator[_Candidate]:
    """Cap 64 in full, then cap 4 in full, by half and by a quarter."""
    make = _factor_candidate if FACTOR in params else _diagonal_candidate
    yield make(params, gradient, tilt, CAPS[0], POWERS[0])
    for power in POWERS:
        yield make(params, gradient, tilt, CAPS[1], power)


def _diagonal_candidate(params: Params, gradient: Params, tilt: Params, cap: float, power: float) -> _Candidate:
    written, predicted = dict(params), 0.0
    for name in params:
        if not name.startswith(LOG_SCALE):
            continue
        precision = 1 + gradient[name].double()
        wanted = (1 + tilt[name].double()).clamp(min=FLOOR)
        # M may be negative, where the energy is not convex: then the scale grows by the cap.
        ratio = torch.where(precision <= wanted / cap, cap, wanted / precision.clamp(min=1e-300)) ** power
        written[name] = params[name] + 0.5 * ratio.log().to(params[name])
        predicted += float((precision * (1 - ratio) + wanted * ratio.log()).sum())
    return _Candidate(written, 0.5 * predicted)


def _factor_candidate(params: Params, gradient: Params, tilt: Params, cap: float, power: float) -> _Candidate:
    """L ← L·chol(K) with K = (B^−½ M B^−½)⁻¹ = B^½ M⁻¹ B^½: the ratio B/M of the diagonal case, made symmetric."""
    factor = params[FACTOR].double()
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    precision = identity + _mirrored(factor.mT @ gradient[FACTOR].double())
    wanted = _floored(identity + _mirrored(factor.mT @ tilt[FACTOR].double()), FLOOR)
    inverse_root = _powers(wanted, -0.5)
    eigenvalues, vectors = torch.linalg.eigh(inverse_root @ precision @ inverse_root)
    ratio = torch.where(eigenvalues <= 1 / cap, cap, 1 / eigenvalues.clamp(min=1e-300))
    change = (vectors * ratio**power) @ vectors.mT
    log_change = _logarithm(change)
    predicted = 0.5 * float((precision * (identity - change)).sum() + (wanted * log_change).sum())
    new = factor @ torch.linalg.cholesky(change)
    return _Candidate(params | {FACTOR: new.to(params[FACTOR])}, predicted)


def _mirrored(matrix: Tensor) -> Tensor:
    """The symmetric matrix with this lower triangle: only it is a gradient in a lower-triangular factor."""
    lower = matrix.tril()
    return lower + lower.tril(-1).mT


def _floored(matrix: Tensor, floor: float) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    return (vectors * eigenvalues.clamp(min=floor)) @ vectors.mT


def _powers(matrix: Tensor, power: float) -> Tensor:
    if power == 1:
        return matrix
    eigenvalues, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
    return (vectors * eigenvalues.clamp(min=1e-300) ** power) @ vectors.mT


def _logarithm(matrix: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
    return (vectors * eigenvalues.clamp(min=1e-300).log()) @ vectors.mT
