"""Forgetting by moving draws: an influence map, moment matching, and weights for what an affine map cannot do."""

import math
import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyro_forget.data import Data
from pyro_forget.forgetters.cloud import BLIND_SPOT, Cloud, Move, Request, cloud_of, spread_factor
from pyro_forget.forgetters.health import health_warnings, input_health
from pyro_forget.forgetters.shifts import common_shift, each_on_its_own, recursive_shift, shifted, solved
from pyro_forget.forgetters.steps import DENSE, common_shifts, newton_steps
from pyro_forget.forgetters.sweeps import swept_map
from pyro_forget.importance import DRAWS_FOR_KHAT, SmoothedWeights, khat_threshold, normalise, systematic_resample
from pyro_forget.inference import Affine, MomentMatching, affine_fit, held_out_weights, moment_matching
from pyro_forget.inference.hmc import HMC
from pyro_forget.inference.moment_matching import HOPELESS, weights_under
from pyro_forget.inference.recursion import Recursion
from pyro_forget.outcome import Edit, Evidence
from pyro_forget.posterior import Posterior

_DRAWS_FOR_A_MAP = 5  # times the dimensions: with fewer draws a covariance is mostly noise
_ESS_FOR_WEIGHTS = 20  # times the dimensions: with a smaller ESS the weights add more noise than they remove
_LEAPFROG = 5
_GOOD, _DOUBTFUL = 0.9, 0.5  # ESS / S
_DRAWS_LOOKED_AT = 200  # to see what a map is good for


@dataclass(frozen=True)
class Transport:
    """Move the draws of a sampled posterior to the posterior of the retained data.

    Each draw's influence step is d = H⁻¹∇h(θ), H the mean retained Hessian of −log joint. The affine map closest to
    θ ↦ θ + d̄ + ½(d − d̄) is right to first order for mean and covariance; where it leaves less than nine tenths of the
    draws that count, Newton's method over affine maps takes its place. Moment matching refines the map, and the moved
    draws keep their chain order and carry Pareto-smoothed weights. Where their effective sample size is below 20 times
    the dimensions, the draws are returned unweighted and the weights are evidence only. With fewer than 5 draws a
    dimension there is no map to fit, and all draws move by the mean step.

    Attributes:
        shift_only: move all draws by the mean step d̄, unweighted: the covariance stays.
        per_draw: move each draw by its own step d, unweighted: the covariance changes twice too much.
        resample: return equally weighted draws; they no longer stand in the order of their chains.
        num_passes: of moment matching, at most.
        seed: of the resampling and of the moves after it.
        refresh: Hamiltonian moves of each draw on the retained data after all that: the cheap way to mend what no
            affine map can do. The moves leave the retained posterior as it is, so weights stay right.
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
    refresh: int = 0
    recursion: Recursion | None = field(default=None)

    def __post_init__(self) -> None:
        chosen = [name for name in ("shift_only", "per_draw", "resample", "recursion") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(f'`{name}`' for name in chosen)} exclude each other: choose one.")
        if self.refresh < 0:
            raise ValueError(f"`refresh` must be 0 or more moves, got {self.refresh}.")

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
        move = self._move(Request(cloud, erased, retained, log_source), evidence)
        if self.refresh and move.evidence.refused is None:
            move = _refreshed(cloud, retained, move, HMC(self.refresh, _LEAPFROG, seed=self.seed))
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

    def _move(self, request: Request, evidence: Evidence) -> Move:
        if self.recursion is not None:
            return recursive_shift(request, self.recursion, evidence)
        if self.per_draw:
            return each_on_its_own(request, evidence)
        if self._too_few(request.cloud) and not self.shift_only:
            num_draws, dim = request.cloud.matrix.shape
            few = (
                f"{num_draws} draws are too few for a map in {dim} dimensions (5 a dimension): all were moved by the "
                "same step, and their covariance is still that of all data."
            )
            evidence = replace(evidence, warnings=(*evidence.warnings, few))
        if self.shift_only or self._too_few(request.cloud):
            return common_shift(request, evidence)
        return self._matched(request, evidence)

    def _matched(self, request: Request, evidence: Evidence) -> Move:
        """Moment matching from the influence map, or from Newton's where that falls short."""
        cloud = request.cloud
        source = request.log_source - cloud.log_weights
        initial, evidence = _influence_map(request, evidence)
        swept = _misses(request, initial, source)
        if swept:
            initial = swept_map(request)
            evidence = replace(evidence, method=f"{evidence.method}, from an affine map by Newton's method")
        found = moment_matching(
            cloud.matrix, request.log_target, source, initial, num_passes=self.num_passes, restart=not swept
        )
        evidence = replace(evidence, ess=found.ess, khat=found.khat, num_passes=found.num_passes)
        if found.ess < HOPELESS * len(found.draws):
            return _unweighted(request, evidence, found, initial)
        # A map by Newton's method has seen all draws, and would fit those held out as well.
        first = swept_map(request, slice(len(found.draws) // 2)) if swept else initial
        held_out = held_out_weights(cloud.matrix, request.log_target, source, first, num_passes=self.num_passes)
        weighted = found.ess >= _ESS_FOR_WEIGHTS * cloud.matrix.shape[1]
        evidence = replace(
            evidence,
            ess_held_out=held_out.ess,
            warnings=(*evidence.warnings, *_weight_warnings(cloud, found, held_out, weighted)),
            extra={"start": found.start, "diagonal": found.diagonal, "weighted": weighted, "limits": BLIND_SPOT},
        )
        if not weighted:
            return Move(found.draws, None, evidence)
        if self.resample:
            chosen = systematic_resample(found.log_weights, len(found.draws), self.seed)
            return Move(found.draws[chosen], None, evidence)
        return Move(found.draws, found.log_weights, evidence)


def _refreshed(cloud: Cloud, retained: Data, move: Move, moves: HMC) -> Move:
    """Moved draws after a few moves more, each on its own, that keep the density of the retained data."""
    weights = cloud.log_weights if move.log_weights is None else move.log_weights
    begun = time.perf_counter()
    factor = spread_factor(move.matrix, weights)
    found = moves.run(lambda draws: cloud.log_joint_and_gradient(draws, retained), move.matrix, factor)
    cost = {"moves": moves.num_moves, "acceptance": found.acceptance, "seconds": time.perf_counter() - begun}
    said = f"{move.evidence.method}, then {moves.num_moves} Hamiltonian moves of {moves.num_leapfrog} steps"
    evidence = replace(move.evidence, method=said, extra=move.evidence.extra | {"refresh": cost})
    if not bool(found.draws.isfinite().all()):
        return Move(move.matrix, None, replace(evidence, refused="the log joint density is not finite at the draws"))
    return Move(found.draws, move.log_weights, evidence)


def _influence_map(request: Request, evidence: Evidence) -> tuple[Affine | None, Evidence]:
    """The affine map closest to θ ↦ θ + d̄ + ½(d − d̄); in many dimensions the shift by d̄; None where H forbids it."""
    cloud, draws = request.cloud, request.cloud.matrix
    matrix = Affine.identity(draws).matrix
    if draws.shape[1] > DENSE:
        shift = next(common_shifts(cloud, request.retained, request.force), None)
        return (None, evidence) if shift is None else (Affine(matrix, shift.value), shifted(evidence, shift))
    steps = newton_steps(cloud, request.retained, request.forces)
    mean = cloud.log_weights.exp() @ steps.value
    try:
        initial = affine_fit(draws, draws + mean + 0.5 * (steps.value - mean))
    except ValueError:  # a coordinate in which all draws agree
        initial = Affine(matrix, mean)
    return initial, solved(evidence, steps)


def _misses(request: Request, initial: Affine | None, source: Tensor) -> bool:
    """Whether the influence map leaves less than nine tenths of the draws that count."""
    draws = request.cloud.matrix
    if draws.shape[1] > DENSE:
        return False
    some = _some(len(draws))
    ess = 0.0 if initial is None else weights_under(initial, draws[some], request.log_target, source[some]).ess
    return ess < _GOOD * len(some)


def _some(num_draws: int) -> Tensor:
    """Places of draws from all over the chains."""
    return torch.linspace(0, num_draws - 1, min(num_draws, _DRAWS_LOOKED_AT)).round().long()


def _unweighted(request: Request, evidence: Evidence, found: MomentMatching, initial: Affine | None) -> Move:
    """Draws under the map that lies higher, where hardly one would count: moment matching's, or the one it began with.

    E[log p] + log|det| of the moved draws is −KL to the retained posterior, up to a constant that all maps share.
    """
    cloud, through = request.cloud, found.map
    some = _some(len(cloud.matrix))
    weights = normalise(cloud.log_weights[some]).exp()

    def height(candidate: Affine) -> float:
        value = float(weights @ request.log_target(candidate(cloud.matrix[some])) + candidate.log_det)
        return value if math.isfinite(value) else -math.inf

    if initial is not None and height(initial) > height(through):
        through = initial
    said = (
        f"No map left more than {found.ess:.0f} of {len(found.draws)} draws that count: they are returned unweighted. "
        "Erase less at a time, move them on by `refresh`, or refit. Draws that are wider than their posterior, such as "
        "those of SG-MCMC with large steps, look so after any move."
    )
    extra = {"start": found.start, "diagonal": found.diagonal, "weighted": False, "limits": BLIND_SPOT}
    return Move(through(cloud.matrix), None, replace(evidence, warnings=(*evidence.warnings, said), extra=extra))


def _weight_warnings(cloud: Cloud, found: MomentMatching, held_out: SmoothedWeights, weighted: bool) -> tuple[str, ...]:
    num_draws, dim = cloud.matrix.shape
    num_held_out = held_out.log_weights.numel()
    threshold = khat_threshold(num_draws)
    said = []
    if not weighted:
        said.append(
            f"The weights' effective sample size of {found.ess:.0f} is below 20 a dimension ({20 * dim}): they would "
            "add more noise than they remove, so the moved draws are unweighted."
        )
    if num_draws < DRAWS_FOR_KHAT:
        said.append(f"Pareto k̂ needs {DRAWS_FOR_KHAT} draws, there are {num_draws}: nothing is known of the tail.")
    if found.khat is not None and found.khat > threshold:
        said.append(f"Pareto k̂ is {found.khat:.2f}, above {threshold:.2f}: the weights have too heavy a tail.")
    if found.ess < _DOUBTFUL * num_draws:
        said.append(f"Less than half of the draws count ({found.ess:.0f} of {num_draws}): move them on by MCMC.")
    elif held_out.ess < _DOUBTFUL * num_held_out:
        said.append(
            f"Of the half of the draws that a map was not fitted on only {held_out.ess:.0f} of {num_held_out} count: "
            "the map fits the noise of its own draws. Move them on by MCMC."
        )
    return tuple(said)
