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

# Measured on mean-field networks: too large a rate for a small request buries it in Adam's own noise.
_RATE, _SLOPE, _FASTEST = 5e-4, 1e-2, 4e-3
_RATE_FAR, _RATE_ALONE = 6e-3, 2e-3
_GONE, _MANY_STEPS = 0.5, 64


@dataclass(frozen=True)
class PairedDescent:
    """Mini-batches of the tilted energy with the same rows and noise at γ and γ₀, from the output layer's solution.

    Where few rows of many go, the noise of mini-batches hides what is asked of plain fine-tuning; here most of it
    cancels between the two evaluations. For models whose likelihood is a Categorical, Normal or Bernoulli of a
    network's output: Gaussian guides (the scales lose what the erased rows gave them, the locations descend), any other
    guide of standard normal noise, point masses among them, and draws, each of which moves on its own and keeps its
    deviation. The result is returned only if the tilted energy of 1,000 retained rows that no step has seen fell under
    pinned noise; else the output layer's solution, if that passes; else nothing.

    Attributes:
        num_steps: of Adam.
        learning_rate: of the first step, linear to 2 % of it; None for 0.0005 to 0.006, by how much the output layer's
            solution changes the residuals of an output unit. Where more than half of them go, as with a whole class,
            64 steps or more begin at γ₀ instead.
        batch_size: rows a step.
        pool: retained rows for the output layer; None for 2,000, or as many as there are.
        head_start: solve the output layer first, where there is one.
        seed: of rows and all noise.

    References:
        R. Johnson and T. Zhang (2013), Accelerating stochastic gradient descent using predictive variance reduction,
        for the pairing; the tilt makes a full gradient at γ₀ unnecessary.
    """

    num_steps: int = 128
    learning_rate: float | None = None
    batch_size: int = 128
    pool: int | None = None
    head_start: bool = True
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
        network = Network.of(posterior, erased, self.seed)
        layer = network.last_layer(retained)
        tries = [self._try(network, layer, retained, group) for group in network.groups()]
        chosen = _Choice.of(tries)
        evidence = chosen.added(self._evidence(network, layer, tries))
        if chosen.params is None:
            return Edit(posterior, evidence)
        return network.moved(chosen.params, retained, evidence)

    def _try(self, network: Network, layer: LastLayer | None, retained: Data, group: slice) -> "_Try":
        problem = network.problem(retained, self.seed, group)
        pool = draw_pool(problem, self.pool, self.seed)
        start: Solved | None = None
        if self.head_start and layer is not None:
            try:
                start = solve_output_layer(problem, layer, pool, self.seed)
            except NoLastLayer:
                start = None
        change = None if start is None else 1 - float(start.beta.values[:-1].min())
        # The body must follow where a unit loses its residuals, and from γ₀ it follows sooner, given time.
        far = change is not None and change > _GONE and self.num_steps >= _MANY_STEPS
        rate = self.learning_rate or _rate(change, far)
        steps = PairedSteps(self.num_steps, rate, min(self.batch_size, problem.rows.num_data))
        found = steps.run(problem, layer, start.params if start and not far else None)
        verdict = judge(problem, found.params, found.beta, found.aim)
        return _Try(problem, start, found, verdict, rate, start is not None and not far)

    def _evidence(self, network: Network, layer: LastLayer | None, tries: list["_Try"]) -> Evidence:
        last = tries[-1]
        begun = "from the output layer's solution" if last.begun else "from where the posterior stood"
        return Evidence(
            method=f"PairedDescent ({self.num_steps} steps at {last.rate:.2g}, {begun})",
            num_draws=None if network.stationary else network.num_points,
            extra={
                "layer": list(layer.units) if layer else None,
                "learning_rate": last.rate,
                "beta": last.found.beta.values.tolist(),
                "shrink": last.found.shrink,
                "noise_scale": last.found.noise_scale if math.isfinite(last.found.noise_scale) else None,
            },
        )


@dataclass(frozen=True)
class _Try:
    """What the steps gave for some points; `begun`: whether they began at the output layer's solution."""

    problem: Problem
    start: Solved | None
    found: Paired
    verdict: Verdict
    rate: float
    begun: bool

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
            return replace(found, warnings=(warning,))
        return found


def _joined(parts: list[Params]) -> Params:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _rate(change: float | None, far: bool) -> float:
    """By the largest change of a unit's residuals, 1 − β."""
    if change is None:
        return _RATE_ALONE
    return _RATE_FAR if far else min(_RATE + _SLOPE * change, _FASTEST)
