"""Forgetting from networks: paired descent from the output layer's solution."""

import math
from dataclasses import dataclass, replace

import torch

from pyro_forget.data import Data
from pyro_forget.forgetters.network import Network, verdict_of
from pyro_forget.inference.last_layer import LastLayer, NoLastLayer
from pyro_forget.inference.output_layer import Solved, draw_pool, solve_output_layer
from pyro_forget.inference.paired import Paired, PairedSteps
from pyro_forget.inference.pairing import Problem, Verdict, judge
from pyro_forget.outcome import Edit, Evidence
from pyro_forget.params import Params
from pyro_forget.posterior import Posterior

# In root mean squares of the latents, measured: too large a rate for a small request buries it in Adam's own noise.
_RATE, _SLOPE, _FASTEST, _FASTEST_FEW = 5e-3, 0.1, 4e-2, 2.5e-5
_RATE_FAR, _RATE_ALONE = 6e-2, 2e-2
_GONE, _MANY_STEPS = 0.5, 64
# Of a common shift: each mini-batch sees another draw, whose noise larger rates would walk on.
_RATE_SHIFT, _SLOPE_SHIFT, _WORTH = 1e-3, 1e-2, 0.02
_STEPS_KEPT, _START_KEPT, _NOTHING_KEPT = "paired descent", "output layer", "nothing"
_STEPS, _STEPS_SHIFT = 128, (32, 48)  # of a shift: from γ₀, and from the output layer's solution


@dataclass(frozen=True)
class PairedDescent:
    """Mini-batches of the tilted energy with the same rows and noise at γ and γ₀, from the output layer's solution.

    Where few rows of many go, the noise of mini-batches hides what is asked of plain fine-tuning; here most of it
    cancels between the two evaluations. For models whose likelihood is a Categorical, Normal or Bernoulli of a
    network's output: Gaussian guides (independent scales lose what the erased rows gave them, a full covariance stays
    as it is, the locations descend), any other guide of standard normal noise, point masses among them, and draws: all
    by one step, found with one draw a mini-batch, or each on its own, keeping its deviation. The result is returned
    only if the tilted energy of 1,000 retained rows that no step has seen fell under pinned noise; else the output
    layer's solution, if that passes; else nothing.

    Attributes:
        num_steps: of Adam; None for 128, and for 32 or 48 where draws shift.
        learning_rate: of the first step, linear to 2 % of it; None for 0.005 to 0.06 of the latents' root mean square
            (0.001 to 0.011 for a common shift), by how much the output layer's solution changes the residuals of an
            output unit, and less for few steps. Where more than half of them go, as with a whole class, 64 steps or
            more begin at γ₀ instead.
        batch_size: rows a step.
        pool: retained rows for the output layer; None for 2,000, or as many as there are.
        head_start: solve the output layer first, where there is one.
        jointly: of draws: one step for all, whose cost does not grow with their number; else each on its own, at as
            many times the cost.
        seed: of rows and all noise.

    References:
        R. Johnson and T. Zhang (2013), Accelerating stochastic gradient descent using predictive variance reduction,
        for the pairing; the tilt makes a full gradient at γ₀ unnecessary.
    """

    num_steps: int | None = None
    learning_rate: float | None = None
    batch_size: int = 128
    pool: int | None = None
    head_start: bool = True
    jointly: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "pool"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}.")

    def edit(self, posterior: Posterior, erased: Data, retained: Data) -> Edit:
        """The posterior after the steps; refused where held-out rows object to all there is.

        Raises:
            ValueError: the model's likelihood cannot be read at one output, or `pool` is more than there is.
        """
        if not erased.num_data:
            return Edit(posterior, Evidence("PairedDescent: nothing to erase, the posterior is returned as it is"))
        network = Network.of(posterior, erased, self.seed, self.jointly)
        layer = network.last_layer(retained)
        # One array for the result: of draws that move on their own there are as many copies as are held.
        moved = {name: torch.empty_like(value) for name, value in network.reading.origin.items()}
        ends = [self._end(network, layer, retained, group, moved) for group in network.groups()]
        evidence = self._evidence(network, layer, ends)
        if evidence.refused is not None:
            return Edit(posterior, evidence)
        return network.moved(moved, retained, evidence)

    def _end(self, network: Network, layer: LastLayer | None, retained: Data, group: slice, moved: Params) -> "_End":
        """Where some points end, put into `moved`: after the steps, else at the output layer's solution, or nowhere."""
        problem = network.problem(retained, self.seed, group)
        start = self._start(problem, layer)
        change = None if start is None else 1 - float(start.beta.values[:-1].min())
        plan = self._plan(network.shifts, change, network.points.typical_size(network.first))
        found, verdict = self._run(problem, layer, plan, start)
        params, returned = found.params, _STEPS_KEPT
        if not verdict.accepted:
            judged = None if start is None else judge(problem, start.params, start.beta)
            if start is not None and judged is not None and judged.accepted:
                params, returned, verdict = start.params, _START_KEPT, judged
            elif plan.begun:
                # A pool's noise may be all that the output layer's solution has.
                plan = replace(plan, begun=False)
                found, verdict = self._run(problem, layer, plan, start)
                params = found.params
        if not verdict.accepted:
            return _End(_NOTHING_KEPT, problem.copies, verdict, plan, replace(found, params={}, aim={}))
        for name, value in params.items():
            moved[name][group] = value
        return _End(returned, problem.copies, verdict, plan, replace(found, params={}, aim={}))

    def _start(self, problem: Problem, layer: LastLayer | None) -> Solved | None:
        pool = draw_pool(problem, self.pool, self.seed)
        if not self.head_start or layer is None:
            return None
        try:
            return solve_output_layer(problem, layer, pool, self.seed)
        except NoLastLayer:
            return None

    def _plan(self, shifts: bool, change: float | None, size: float) -> "_Plan":
        """By the largest change of a unit's residuals, 1 − β, and the root mean square of the latents."""
        if shifts:
            rate = size * (_RATE_SHIFT + _SLOPE_SHIFT * (change or 0.0))
            begun = change is not None and change > _WORTH
            return _Plan(self.num_steps or _STEPS_SHIFT[begun], self.learning_rate or rate, begun, shrink=False)
        num_steps = self.num_steps or _STEPS
        # The body must follow where a unit loses its residuals, and from γ₀ it follows sooner, given time.
        far = change is not None and change > _GONE and num_steps >= _MANY_STEPS
        # Few fast steps have no time left to settle.
        fastest = min(_FASTEST, _FASTEST_FEW * num_steps**2)
        rate = _RATE_ALONE if change is None else _RATE_FAR if far else min(_RATE + _SLOPE * change, fastest)
        return _Plan(num_steps, self.learning_rate or size * rate, change is not None and not far, shrink=True)

    def _run(
        self, problem: Problem, layer: LastLayer | None, plan: "_Plan", start: Solved | None
    ) -> tuple[Paired, Verdict]:
        size = min(self.batch_size, problem.rows.num_data)
        steps = PairedSteps(plan.num_steps, plan.rate, size, shrink=plan.shrink)
        found = steps.run(problem, layer, start.params if start and plan.begun else None)
        return found, judge(problem, found.params, found.beta, found.aim)

    def _evidence(self, network: Network, layer: LastLayer | None, ends: list["_End"]) -> Evidence:
        last = ends[-1]
        begun = "from the output layer's solution" if last.plan.begun else "from where the posterior stood"
        moves = " by a common shift" if network.shifts else ""
        evidence = replace(
            network.begun(f"PairedDescent{moves} ({last.plan.num_steps} steps at {last.plan.rate:.2g}, {begun})"),
            extra={
                "layer": list(layer.units) if layer else None,
                **({"reach": network.reach} if network.reach else {}),
                "learning_rate": last.plan.rate,
                "beta": last.found.beta.values.tolist(),
                "shrink": last.found.shrink,
                "noise_scale": last.found.noise_scale if math.isfinite(last.found.noise_scale) else None,
            },
        )
        return _judged(evidence, ends)


@dataclass(frozen=True)
class _Plan:
    """How to descend; `begun`: from the output layer's solution."""

    num_steps: int
    rate: float
    begun: bool
    shrink: bool


@dataclass(frozen=True)
class _End:
    """What was kept of some points' steps, and what held-out rows said of that; `found` without its points."""

    returned: str
    copies: int
    verdict: Verdict
    plan: _Plan
    found: Paired


def _judged(evidence: Evidence, ends: list[_End]) -> Evidence:
    """The evidence with what held-out rows said: of all points, or of those that they refused."""
    refused = [end for end in ends if end.returned == _NOTHING_KEPT]
    verdict = verdict_of([(end.copies, end.verdict) for end in refused or ends])
    returned = " and ".join(sorted({end.returned for end in refused or ends}))
    found = replace(
        evidence,
        held_out_fall=-verdict.rise,
        untilted_fall=-verdict.untilted,
        solver=f"returned: {returned}",
    )
    if refused:
        reason = (
            f"the tilted energy of held-out retained rows rose by {verdict.rise:.3g} nats: the request is beyond what "
            "these steps can do here; take more or smaller steps, or refit"
        )
        return replace(found, refused=reason)
    if any(end.returned == _START_KEPT for end in ends):
        warning = (
            "The steps of the whole network raised the tilted energy of held-out rows: the output layer's solution "
            "was kept. Take more or smaller steps."
        )
        return replace(found, warnings=(*found.warnings, warning))
    return found
