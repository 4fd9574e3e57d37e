"""Moves of a cloud without a map: all draws by one step, or each by its own."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from pyro_forget.forgetters.cloud import BLIND_SPOT, Cloud, Move, Request
from pyro_forget.forgetters.steps import Shift, Steps, common_shifts, newton_steps
from pyro_forget.importance import pareto_smooth
from pyro_forget.inference.recursion import Recursion
from pyro_forget.outcome import Evidence

_LEAST_FALL, _GOOD_FALL = 0.25, 0.5  # of the energy, realised over predicted: below, a shift is not worth having
_DIVERGED = 1000  # times the spread of the draws

_NO_STEP = (
    "The mean Hessian of −log joint over the draws is so far from positive definite that there is no step to a "
    "minimum: give more draws, or refit."
)


def each_on_its_own(request: Request, evidence: Evidence) -> Move:
    """Each draw by its own Newton step."""
    cloud = request.cloud
    steps = newton_steps(cloud, request.retained, request.forces)
    evidence = solved(evidence, steps)
    if not steps.usable:
        return Move(cloud.matrix, None, replace(evidence, refused=_NO_STEP))
    return Move(cloud.matrix + steps.value, _input_weights(cloud), evidence)


def common_shift(request: Request, evidence: Evidence) -> Move:
    """All draws by the mean step, damped until the tilted retained energy falls about as it promises."""
    cloud, best = request.cloud, None
    for shift in common_shifts(cloud, request.retained, request.force):
        log_target = request.log_target(cloud.matrix + shift.value)
        realised = request.tilted_fall(shift.value, log_target)
        evidence = replace(evidence, predicted_fall=shift.predicted, realised_fall=realised)
        if realised >= _LEAST_FALL * shift.predicted and (best is None or realised > best[1]):
            best = shift, realised, log_target
        if realised >= _GOOD_FALL * shift.predicted:
            break
    if best is None:
        return Move(cloud.matrix, None, replace(evidence, refused=_no_shift(evidence)))
    evidence = _with_shift_weights(shifted(evidence, best[0], best[1]), request, best[2])
    return Move(cloud.matrix + best[0].value, _input_weights(cloud), evidence)


def _no_shift(evidence: Evidence) -> str:
    if evidence.predicted_fall is None:
        return _NO_STEP
    return (
        f"Even the most damped common shift promised to lower the tilted retained energy by "
        f"{evidence.predicted_fall:.3g} nats and lowered it by {evidence.realised_fall:.3g}: the posterior is not "
        "quadratic enough here. Erase less at a time, or refit."
    )


def shifted(evidence: Evidence, shift: Shift, realised: float | None = None) -> Evidence:
    """With how the common shift was found, and by how much it lowered the energy."""
    return replace(
        evidence,
        solver="Lanczos",
        num_products=shift.num_products,
        residual=shift.residual,
        damping=shift.damping,
        predicted_fall=shift.predicted,
        realised_fall=realised,
    )


def recursive_shift(request: Request, recursion: Recursion, evidence: Evidence) -> Move:
    """The published algorithm tests nothing; only a shift out of all proportion is refused."""
    cloud = request.cloud
    energy = cloud.posterior.energy.shifted(cloud.posterior.params)
    nowhere = cloud.shift(torch.zeros_like(cloud.matrix[0]))
    found = recursion.run(energy, nowhere, request.erased, request.erased.join(request.retained))
    shift = cloud.vector(found)
    spread = float(cloud.matrix.std(0).norm()) if len(cloud.matrix) > 1 else math.inf
    if not float(shift.norm()) < _DIVERGED * spread:
        refused = "The published recursion diverged: lower its `scaling`."
        return Move(cloud.matrix, None, replace(evidence, solver="recursion: diverged", refused=refused))
    moved = cloud.matrix + shift
    log_target = request.log_target(moved)
    evidence = _with_shift_weights(replace(evidence, solver="recursion"), request, log_target)
    evidence = replace(evidence, realised_fall=request.tilted_fall(shift, log_target))
    return Move(moved, _input_weights(cloud), evidence)


def _with_shift_weights(evidence: Evidence, request: Request, log_target: Tensor) -> Evidence:
    """With k̂ and ESS of the weights that the shifted draws would carry, as evidence only."""
    if not bool(log_target.isfinite().any()):
        return replace(evidence, ess=0.0)
    raw = torch.where(log_target.isfinite(), log_target, -math.inf) - request.log_source + request.cloud.log_weights
    weights = pareto_smooth(raw)
    return replace(evidence, ess=weights.ess, khat=weights.khat, extra={**evidence.extra, "limits": BLIND_SPOT})


def solved(evidence: Evidence, steps: Steps) -> Evidence:
    """With how the steps were found."""
    return replace(evidence, solver=steps.solver, num_products=steps.num_products, residual=steps.residual)


def _input_weights(cloud: Cloud) -> Tensor | None:
    return None if cloud.posterior.log_weights is None else cloud.log_weights
