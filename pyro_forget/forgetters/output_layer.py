"""Forgetting in the output layer of a network alone, a convex problem."""

from dataclasses import dataclass, replace

import torch

from pyro_forget.data import Data
from pyro_forget.forgetters.network import Network, verdict_of
from pyro_forget.inference.last_layer import NoLastLayer
from pyro_forget.inference.output_layer import draw_pool, solve_output_layer
from pyro_forget.inference.pairing import Verdict, judge
from pyro_forget.outcome import Edit, Evidence
from pyro_forget.params import Params
from pyro_forget.posterior import Posterior


@dataclass(frozen=True)
class OutputLayer:
    """Solve the last layer on the features that the body gives a pool of retained rows; the body stays as it is.

    What is minimised is the pool's tilted energy, with a proximal term that keeps few rows from being fitted to
    themselves. It is the cheapest step that forgets anything on a network, and alone the best where the erased rows are
    very few. The scales of a Gaussian guide lose what the erased rows gave them. The result is returned only if the
    tilted energy of other retained rows fell.

    Attributes:
        pool: retained rows to solve on; None for 2,000, or as many as there are.
        max_steps: of L-BFGS.
        jointly: of draws: one step for all; else each on its own.
        seed: of the pool and all noise.
    """

    pool: int | None = None
    max_steps: int = 20
    jointly: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pool", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")

    def edit(self, posterior: Posterior, erased: Data, retained: Data) -> Edit:
        """The posterior with another output layer; refused where there is none, or held-out rows object.

        Raises:
            ValueError: the model's likelihood cannot be read at one output, or `pool` is more than there is.
        """
        if not erased.num_data:
            return Edit(posterior, Evidence("OutputLayer: nothing to erase, the posterior is returned as it is"))
        network = Network.of(posterior, erased, self.seed, self.jointly)
        method = "OutputLayer (the last layer alone, on features of retained rows)"
        layer = network.last_layer(retained)
        if layer is None:
            return Edit(posterior, Evidence(method, refused=NO_LAYER))
        ends: list[Params] = []
        verdicts: list[tuple[int, Verdict]] = []
        evaluations = 0
        for group in network.groups():
            problem = network.problem(retained, self.seed, group)
            try:
                solved = solve_output_layer(
                    problem, layer, draw_pool(problem, self.pool, self.seed), self.seed, self.max_steps
                )
            except NoLastLayer as error:
                return Edit(posterior, Evidence(method, refused=str(error)))
            ends.append(solved.params)
            verdicts.append((problem.copies, judge(problem, solved.params, solved.beta)))
            evaluations += solved.evaluations
        verdict = verdict_of(verdicts)
        evidence = replace(
            network.begun(method),
            refused=None if verdict.accepted else REFUSED.format(rise=verdict.rise),
            held_out_fall=-verdict.rise,
            untilted_fall=-verdict.untilted,
            extra={"layer": list(layer.units), "evaluations": evaluations, "beta": solved.beta.values[:-1].tolist()},
        )
        if not verdict.accepted:
            return Edit(posterior, evidence)
        return network.moved({n: torch.cat([end[n] for end in ends]) for n in ends[0]}, retained, evidence)


NO_LAYER = (
    "the output is not affine in any of the model's parameters, so there is no output layer to solve: use "
    "`PairedDescent(head_start=False)` or `Influence`"
)
REFUSED = (
    "the tilted energy of held-out retained rows rose by {rise:.3g} nats: the request is beyond what the output layer "
    "alone can do here; use `PairedDescent`, or refit"
)
