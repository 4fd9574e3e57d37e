"""Forgetting by moving draws: an influence map, moment matching, and weights for what an affine map cannot do."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from pyro_forget.data import Data
from pyro_forget.forgetters.cloud import BLIND_SPOT, Cloud, cloud_of, health_warnings, input_health
from pyro_forget.forgetters.steps import DENSE, Steps, newton_steps
from pyro_forget.importance import khat_threshold, pareto_smooth, systematic_resample
from pyro_forget.inference import Affine, MomentMatching, affine_fit, held_out_weights, moment_matching
from pyro_forget.inference.recursion import Recursion
from pyro_forget.outcome import Edit, Evidence
from pyro_forget.posterior import Posterior

_DRAWS_FOR_A_MAP = 5  # times the dimensions: with fewer draws a covariance is mostly noise
_ESS_FOR_WEIGHTS = 20  # times the dimensions: with a smaller ESS the weights add more noise than they remove
_DOUBTFUL, _HOPELESS = 0.5, 0.1  # ESS / S
_LEAST_FALL = 0.25  # of the energy, realised over predicted: a shift that does less is refused
_DIVERGED = 1000  # times the spread of the draws

_NO_STEP = (
    "The mean Hessian of −log joint over the draws is not positive definite, so there is no step to a minimum: give "
    "more draws, or refit."
)


@dataclass(frozen=True)
class _Move:
    """Moved draws (draw, d), their log weights (draw,) or None, and what to say of them."""

    matrix: Tensor
    log_weights: Tensor | None
    evidence: Evidence


@dataclass(frozen=True)
class Transport:
    """Move the draws of a sampled posterior to the posterior of the retained data.

    Each draw's influence step is d = H⁻¹∇h(θ), H the mean retained Hessian of −log joint. The affine map closest to
    θ ↦ θ + d̄ + ½(d − d̄) is right to first order for mean and covariance; moment matching refines it, and the moved
    draws keep their chain order and carry Pareto-smoothed weights. Where their effective sample size is below 20 times
    the dimensions, the draws are returned unweighted and the weights are evidence only. With fewer than 5 draws a
    dimension there is no map to fit, and all draws move by the mean step.

    Attributes:
        shift_only: move all draws by the mean step d̄, unweighted: the covariance stays.
        per_draw: move each draw by its own step d, unweighted: the covariance changes twice too much.
        resample: return equally weighted draws; they no longer stand in the order of their chains.
        num_passes: of moment matching, at most.
        seed: of the resampling.
        recursion: find the common shift by the published algorithm.

    References:
        Fu, He, Xu and Tao (2021), arXiv 2101.06417, for the shift; Paananen, Piironen, Bürkner and Vehtari (2021),
        Statistics and Computing 31:16, for moment matching.
    """

    shift_only: bool = False
    per_draw: bool = False
    resample: bool = False
    num_passes: int = 25
    seed: int = 0
    recursion: Recursion | None = field(default=None)

    def __post_init__(self) -> None:
        chosen = [name for name in ("shift_only", "per_draw", "resample", "recursion") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(f'`{name}`' for name in chosen)} exclude each other: choose one.")

    @staticmethod
    def published(recursion: Recursion | None = None) -> "Transport":
        """The common shift as it was published: stochastic recursion, few draws, part by part, no test."""
        return Transport(recursion=recursion or Recursion())

    def edit(self, posterior: Posterior, erased: Data, retained: Data) -> Edit:
        """The posterior of the retained data. With nothing erased it is the input itself.

        Raises:
            ValueError: the posterior is not one of draws.
        """
        cloud = cloud_of(posterior, "Transport")
        evidence = Evidence(method=self._method(cloud), num_draws=len(cloud.matrix))
        if len(erased) == 0:
            return Edit(posterior, evidence)
        rhat, ess = input_health(cloud.posterior)
        evidence = replace(evidence, rhat_input=rhat, ess_input=ess, warnings=health_warnings(rhat, ess))
        log_source = cloud.log_joint(cloud.matrix, retained) + cloud.log_likelihood(erased)
        num_bad = int((~log_source.isfinite()).sum())
        if num_bad:
            refused = f"The log joint density is not finite at {num_bad} of {len(log_source)} draws: drop them first."
            return Edit(posterior, replace(evidence, refused=refused))
        move = self._move(_Request(cloud, erased, retained, log_source), evidence)
        if move.evidence.refused is not None:
            return Edit(posterior, move.evidence)
        evidence = replace(move.evidence, step_norm=cloud.step_norm(move.matrix))
        return Edit(cloud.edited(move.matrix, retained.ids, move.log_weights), evidence)

    def _method(self, cloud: Cloud) -> str:
        if self.recursion is not None:
            return f"transport by a common shift, published recursion ({self.recursion})"
        if self.shift_only or self._too_few(cloud):
            return "transport by a common shift"
        if self.per_draw:
            return "transport, each draw by its own influence step"
        ends = ", resampled" if self.resample else ""
        return f"transport by moment matching, up to {self.num_passes} passes{ends}"

    def _too_few(self, cloud: Cloud) -> bool:
        num_draws, dim = cloud.matrix.shape
        return num_draws < _DRAWS_FOR_A_MAP * dim and not self.per_draw

    def _move(self, request: "_Request", evidence: Evidence) -> _Move:
        if self.recursion is not None:
            return _recursive(request, self.recursion, evidence)
        if self.per_draw:
            return _each_on_its_own(request, evidence)
        if self._too_few(request.cloud) and not self.shift_only:
            num_draws, dim = request.cloud.matrix.shape
            few = (
                f"{num_draws} draws are too few for a map in {dim} dimensions (5 a dimension): all were moved by the "
                "same step, and their covariance is still that of all data."
            )
            evidence = replace(evidence, warnings=(*evidence.warnings, few))
        if self.shift_only or self._too_few(request.cloud):
            return _common_shift(request, evidence)
        return self._matched(request, evidence)

    def _matched(self, request: "_Request", evidence: Evidence) -> _Move:
        """Moment matching from the influence map."""
        cloud, steps = request.cloud, request.steps()
        initial = _influence_map(cloud, steps)
        source = request.log_source - cloud.log_weights
        found = moment_matching(cloud.matrix, request.log_target, source, initial, num_passes=self.num_passes)
        held_out = held_out_weights(cloud.matrix, request.log_target, source, initial, num_passes=self.num_passes)
        weighted = found.ess >= _ESS_FOR_WEIGHTS * cloud.matrix.shape[1]
        evidence = replace(
            evidence,
            solver=steps.solver,
            num_products=steps.num_products,
            residual=steps.residual,
            ess=found.ess,
            ess_held_out=held_out.ess,
            khat=found.khat,
            num_passes=found.num_passes,
            warnings=(*evidence.warnings, *_weight_warnings(cloud, found, weighted), BLIND_SPOT),
            extra={"start": found.start, "diagonal": found.diagonal, "weighted": weighted},
        )
        if not weighted:
            return _Move(found.draws, None, evidence)
        if self.resample:
            chosen = systematic_resample(found.log_weights, len(found.draws), self.seed)
            return _Move(found.draws[chosen], None, evidence)
        return _Move(found.draws, found.log_weights, evidence)


@dataclass(frozen=True)
class _Request:
    """What is to be forgotten; `log_source` is the log joint of all data at the draws."""

    cloud: Cloud
    erased: Data
    retained: Data
    log_source: Tensor

    def log_target(self, draws: Tensor) -> Tensor:
        return self.cloud.log_joint(draws, self.retained)

    @cached_property
    def forces(self) -> Tensor:
        """∇h of the erased data at each draw, (draw, d)."""
        return self.cloud.force(self.erased)

    @cached_property
    def force(self) -> Tensor:
        """Its mean over the draws, (d,)."""
        return self.cloud.log_weights.exp() @ self.forces

    def steps(self) -> Steps:
        """The influence step of each draw; in many dimensions only the mean one."""
        many = self.cloud.matrix.shape[1] > DENSE
        return newton_steps(self.cloud, self.retained, self.force[None] if many else self.forces)


def _influence_map(cloud: Cloud, steps: Steps) -> Affine:
    """The affine map closest to θ ↦ θ + d̄ + ½(d − d̄); the shift by d̄ where the draws do not span the space."""
    draws, value = cloud.matrix, steps.value
    if len(value) < len(draws):
        return Affine(Affine.identity(draws).matrix, value[0])
    mean = cloud.log_weights.exp() @ value
    try:
        return affine_fit(draws, draws + mean + 0.5 * (value - mean))
    except ValueError:  # a coordinate in which all draws agree
        return Affine(Affine.identity(draws).matrix, mean)


def _each_on_its_own(request: _Request, evidence: Evidence) -> _Move:
    cloud = request.cloud
    steps = newton_steps(cloud, request.retained, request.forces)
    evidence = _solved(evidence, steps)
    if not steps.usable:
        return _Move(cloud.matrix, None, replace(evidence, refused=_NO_STEP))
    return _Move(cloud.matrix + steps.value, _input_weights(cloud), evidence)


def _common_shift(request: _Request, evidence: Evidence) -> _Move:
    """All draws by the mean step, kept if it lowers the tilted retained energy as it promised."""
    cloud, steps = request.cloud, newton_steps(request.cloud, request.retained, request.force[None])
    if not steps.usable:
        return _Move(cloud.matrix, None, replace(_solved(evidence, steps), refused=_NO_STEP))
    shift = steps.value[0]
    moved, log_target = cloud.matrix + shift, request.log_target(cloud.matrix + shift)
    predicted = 0.5 * float(request.force @ shift)
    realised = _tilted_fall(request, shift, log_target)
    evidence = replace(
        _with_shift_weights(_solved(evidence, steps), request, log_target),
        predicted_fall=predicted,
        realised_fall=realised,
    )
    if not realised >= _LEAST_FALL * predicted:
        refused = (
            f"The common shift promised to lower the tilted retained energy by {predicted:.3g} nats and lowered it by "
            f"{realised:.3g}: the draws' posterior is not quadratic enough. Erase less at a time, or refit."
        )
        return _Move(cloud.matrix, None, replace(evidence, refused=refused))
    return _Move(moved, _input_weights(cloud), evidence)


def _recursive(request: _Request, recursion: Recursion, evidence: Evidence) -> _Move:
    """The published algorithm tests nothing; only a shift out of all proportion is refused."""
    cloud = request.cloud
    energy = cloud.posterior.energy.shifted(cloud.posterior.params)
    nowhere = cloud.shift(torch.zeros_like(cloud.matrix[0]))
    found = recursion.run(energy, nowhere, request.erased, request.erased.join(request.retained))
    shift = cloud.vector(found)
    if not float(shift.norm()) < _DIVERGED * float(cloud.matrix.std(0).norm()):
        refused = "The published recursion diverged: lower its `scaling`."
        return _Move(cloud.matrix, None, replace(evidence, solver="recursion: diverged", refused=refused))
    moved = cloud.matrix + shift
    log_target = request.log_target(moved)
    evidence = _with_shift_weights(replace(evidence, solver="recursion"), request, log_target)
    evidence = replace(evidence, realised_fall=_tilted_fall(request, shift, log_target))
    return _Move(moved, _input_weights(cloud), evidence)


def _tilted_fall(request: _Request, shift: Tensor, log_target: Tensor) -> float:
    """φ(0) − φ(shift) for φ(γ) = F(γ, retained) − ⟨∇F(0, retained) + ∇h(0), γ⟩, F the mean over the draws; nats."""
    weights = request.cloud.log_weights.exp()
    before = request.log_target(request.cloud.matrix)
    tilt = request.cloud.mean_gradient(request.retained) + request.force
    return float(weights @ (log_target - before) + tilt @ shift)


def _with_shift_weights(evidence: Evidence, request: _Request, log_target: Tensor) -> Evidence:
    """With k̂ and ESS of the weights that the shifted draws would carry, as evidence only."""
    if not bool(log_target.isfinite().any()):
        return replace(evidence, ess=0.0)
    raw = torch.where(log_target.isfinite(), log_target, -torch.inf) - request.log_source + request.cloud.log_weights
    weights = pareto_smooth(raw)
    return replace(evidence, ess=weights.ess, khat=weights.khat)


def _solved(evidence: Evidence, steps: Steps) -> Evidence:
    return replace(evidence, solver=steps.solver, num_products=steps.num_products, residual=steps.residual)


def _input_weights(cloud: Cloud) -> Tensor | None:
    return None if cloud.posterior.log_weights is None else cloud.log_weights


def _weight_warnings(cloud: Cloud, found: MomentMatching, weighted: bool) -> tuple[str, ...]:
    num_draws, dim = cloud.matrix.shape
    threshold = khat_threshold(num_draws)
    said = []
    if not weighted:
        said.append(
            f"The weights' effective sample size of {found.ess:.0f} is below 20 a dimension ({20 * dim}): they would "
            "add more noise than they remove, so the moved draws are unweighted."
        )
    if found.khat is not None and found.khat > threshold:
        said.append(f"Pareto k̂ is {found.khat:.2f}, above {threshold:.2f}: the weights have too heavy a tail.")
    if found.ess < _HOPELESS * num_draws:
        said.append(f"Only {found.ess:.0f} of {num_draws} draws count: refit.")
    elif found.ess < _DOUBTFUL * num_draws:
        said.append(f"Less than half of the draws count ({found.ess:.0f} of {num_draws}): move them on by MCMC.")
    return tuple(said)
