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
        tries = [self._try(network, layer, retained, group) for group in network.groups()]
        chosen = _Choice.of(tries)
        evidence = chosen.added(self._evidence(network, layer, tries))
        if chosen.params is None:
            return Edit(posterior, evidence)
        return network.moved(chosen.params, retained, evidence)

    def _try(self, network: Network, layer: LastLayer | None, retained: Data, group: slice) -> "_Try":
        problem = network.problem(retained, self.seed, group)
        start = self._start(problem, layer)
        change = None if start is None else 1 - float(start.beta.values[:-1].min())
        plan = self._plan(network.shifts, change, network.points.typical_size(network.first))
        found = self._run(problem, layer, plan, start)
        if found.begun and not found.verdict.accepted:
            # A pool's noise may be all that the output layer's solution has.
            found = self._run(problem, layer, replace(plan, begun=False), start)
        return found

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

    def _run(self, problem: Problem, layer: LastLayer | None, plan: "_Plan", start: Solved | None) -> "_Try":
        size = min(self.batch_size, problem.rows.num_data)
        steps = PairedSteps(plan.num_steps, plan.rate, size, shrink=plan.shrink)
        found = steps.run(problem, layer, start.params if start and plan.begun else None)
        return _Try(problem, start, found, judge(problem, found.params, found.beta, found.aim), plan)

    def _evidence(self, network: Network, layer: LastLayer | None, tries: list["_Try"]) -> Evidence:
        last = tries[-1]
        begun = "from the output layer's solution" if last.plan.begun else "from where the posterior stood"
        moves = " by a common shift" if network.shifts else ""
        return replace(
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


@dataclass(frozen=True)
class _Plan:
    """How to descend; `begun`: from the output layer's solution."""

    num_steps: int
    rate: float
    begun: bool
    shrink: bool


@dataclass(frozen=True)
class _Try:
    """What the steps gave for some points."""

    problem: Problem
    start: Solved | None
    found: Paired
    verdict: Verdict
    plan: _Plan

    @property
    def begun(self) -> bool:
        """Whether at the output layer's solution."""
        return self.plan.begun

    def judged_start(self) -> Verdict | None:
        """Of the output layer's solution."""
        return None if self.start is None else judge(self.problem, self.start.params, self.start.beta)


@dataclass(frozen=True)
class _Choice:
    """What is returned: the steps' result, the output layer's solution, or nothing."""

    params: Params | None
    verdict: Verdict
    returned: str

    @staticmethod
    def of(tries: list[_Try]) -> "_Choice":
        """The first that held-out rows let pass."""
        verdict = verdict_of([(each.problem.copies, each.verdict) for each in tries])
        if verdict.accepted:
            return _Choice(_joined([each.found.params for each in tries]), verdict, "paired descent")
        starts = [(each, each.start, each.judged_start()) for each in tries]
        known = [(each.problem.copies, judged) for each, _, judged in starts if judged is not None]
        if len(known) == len(tries) and verdict_of(known).accepted:
            params = _joined([start.params for _, start, _ in starts if start is not None])
            return _Choice(params, verdict_of(known), "output layer")
        return _Choice(None, verdict, "nothing")

    def added(self, evidence: Evidence) -> Evidence:
        """The evidence with what held-out rows said."""
        rise = self.verdict.rise
        found = replace(
            evidence,
            held_out_fall=-rise,
            untilted_fall=-self.verdict.untilted,
            solver=f"returned: {self.returned}",
        )
        if self.params is None:
            reason = (
                f"the tilted energy of held-out retained rows rose by {rise:.3g} nats: the request is beyond what "
                "these steps can do here; take more or smaller steps, or refit"
            )
            return replace(found, refused=reason)
        if self.returned == "output layer":
            warning = (
                "The steps of the whole network raised the tilted energy of held-out rows: the output layer's solution "
                "was kept. Take more or smaller steps."
            )
            return replace(found, warnings=(*found.warnings, warning))
        return found


def _joined(parts: list[Params]) -> Params:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
