"""What the methods for networks share: a posterior as points, what was asked of it, and the way back."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_forget.curvature.natural import natural_of
from pyro_forget.data import Batch, Data
from pyro_forget.effects.program import quiet
from pyro_forget.energy.points import DrawPoints, GuidePoints, Points
from pyro_forget.energy.shift import ShiftPoints
from pyro_forget.forgetters.health import health_warnings, input_health
from pyro_forget.forgetters.reading import Reading, groups, points_of, reader
from pyro_forget.importance import pareto_smooth
from pyro_forget.inference.last_layer import LastLayer, find_last_layer, some_rows
from pyro_forget.inference.pairing import Problem, Verdict
from pyro_forget.outcome import Edit, Evidence
from pyro_forget.params import Params, all_finite, gaps
from pyro_forget.posterior import Posterior, SampledPosterior, VariationalPosterior

_MANY_LATENTS = 1000  # below, curvature products cost nothing and `Influence` refines what they miss
_SAME_COVARIANCE = "All draws moved by the same step: their covariance is still that of all data."

_BLIND_SPOT = (
    "ESS and k̂ are of the weights 1/p(erased | θ) of the draws as they came: they say how unevenly the draws explain "
    "what goes, not how well they moved, and cannot see a sampler's own bias, nor a mode that no draw has visited."
)


@dataclass(frozen=True)
class Network:
    """A posterior whose likelihood is read at a network's output.

    Attributes:
        posterior: as it came.
        reading: as points.
    """

    posterior: Posterior
    reading: Reading

    @staticmethod
    def of(posterior: Posterior, erased: Data, seed: int, jointly: bool = True) -> "Network":
        """Take a posterior over and measure the erased data's force; `jointly`: as one shift of all draws.

        Raises:
            ValueError: the posterior has no model, the likelihood is of another family, or the erased rows have
                classes that the output does not have.
        """
        read = reader(posterior, jointly)
        try:
            found = Network(posterior, read(posterior, erased, seed))
        except (IndexError, RuntimeError):
            _require_known_classes(points_of(posterior), erased)
            raise
        found.require_output(erased)
        return found

    @property
    def points(self) -> Points:
        """How to run it."""
        return self.reading.points

    @property
    def first(self) -> Params:
        """Where the first point stands."""
        return {name: value[0] for name, value in self.reading.origin.items()}

    @property
    def stationary(self) -> bool:
        """Whether the points are meant to be at the energy's minimum."""
        return not isinstance(self.points, DrawPoints)

    @property
    def shifts(self) -> bool:
        """Whether the point is a shift of draws: then what their mean gradient lacks of zero is noise of few draws."""
        return isinstance(self.points, ShiftPoints)

    @property
    def num_draws(self) -> int | None:
        """Of a sampled posterior."""
        return self.posterior.num_draws if isinstance(self.posterior, SampledPosterior) else None

    def begun(self, method: str) -> Evidence:
        """Evidence of what came in: draws and their health, and what a method for networks leaves as it is."""
        if not isinstance(self.posterior, SampledPosterior):
            return Evidence(method)
        rhat, ess = input_health(self.posterior)
        still = (_SAME_COVARIANCE,) if self.shifts and self.posterior.num_draws > 1 else ()
        return Evidence(
            method,
            num_draws=self.posterior.num_draws,
            rhat_input=rhat,
            ess_input=ess,
            warnings=(*health_warnings(rhat, ess), *still),
        )

    @property
    def reach(self) -> dict[str, float | int | str | None]:
        """How far the request is from what weights alone could do, in function space; empty for guides.

        In weight space no draw of a large network would count after any move, which says nothing.
        """
        if self.reading.log_likelihood is None:
            return {}
        weights = pareto_smooth(-self.reading.log_likelihood)
        count = len(self.reading.log_likelihood)
        return {"space": "function", "ess": weights.ess, "khat": weights.khat, "draws": count, "limits": _BLIND_SPOT}

    def require_output(self, erased: Data) -> None:
        """Raise where the likelihood cannot be read as a function of an output."""
        _require_known_classes((self.points, self.first), _first(erased))

    def groups(self) -> list[slice]:
        """Points that move together."""
        return groups(self.reading.origin)

    def problem(self, retained: Data, seed: int, group: slice) -> Problem:
        """The sampled tilted energy of some of the points."""
        origin, force = (
            {name: value[group] for name, value in part.items()} for part in (self.reading.origin, self.reading.force)
        )
        return Problem.of(self.points, origin, force, retained, seed, self.stationary)

    def last_layer(self, data: Data) -> LastLayer | None:
        """The output layer of the first point, and of all."""
        return find_last_layer(self.points, self.first, some_rows(data))

    def moved(self, params: Params, retained: Data, evidence: Evidence) -> Edit:
        """The posterior at other points."""
        if not all_finite(params):
            return Edit(self.posterior, replace(evidence, refused="the result is not finite: lower `learning_rate`"))
        own = self.reading.back(params)
        # Of draws the root mean square.
        steps = {n: length / math.sqrt(self.num_draws or 1) for n, length in gaps(own, self.posterior.params).items()}
        evidence = replace(evidence, step_norm=steps)
        if isinstance(self.posterior, SampledPosterior):
            return Edit(self.posterior.edited(own, retained.ids, self.posterior.log_weights, take=True), evidence)
        return Edit(self.posterior.edited(own, retained.ids), evidence)


def verdict_of(verdicts: list[tuple[int, Verdict]]) -> Verdict:
    """The mean over all points from the means over groups."""
    total = sum(count for count, _ in verdicts)
    return Verdict(
        sum(count * verdict.rise for count, verdict in verdicts) / total,
        sum(count * verdict.untilted for count, verdict in verdicts) / total,
    )


def is_network(posterior: Posterior) -> bool:
    """Whether there are many latents and the likelihood's output is not affine in all of them.

    Looked at on made-up rows: no data are needed.
    """
    if not isinstance(posterior, (VariationalPosterior, SampledPosterior)):
        return False
    points, point = points_of(posterior)
    if sum(value.numel() for value in point.values()) < _MANY_LATENTS:
        return False
    if isinstance(points, GuidePoints) and points.energy.guide.num_normals is None:
        return False
    try:
        layer = find_last_layer(points, point, points.energy.program.template)
    except ValueError:  # several data sites, or another family
        return False
    return layer is None or bool(layer.others)


def _require_known_classes(where: tuple[Points, Params], data: Data) -> None:
    """Raise where a row's class is none of the output's."""
    points, point = where

    def of(batch: Batch) -> Tensor:
        with torch.no_grad(), quiet():
            natural = natural_of(points.run(point, batch, points.noise(batch, 0)))
        if natural.kind == "Categorical":
            target, known = natural.target, natural.output.shape[-1]
            wrong = target[(target < 0) | (target >= known)]
            if len(wrong):
                raise ValueError(
                    f"{len(wrong)} erased rows have classes such as {int(wrong[0])}, the output layer has {known} "
                    "units: pass the rows that the posterior was fitted to."
                )
        return torch.zeros(())

    data.reduce(of)


def _first(data: Data) -> Data:
    return data.split(data.ids[:1])[0]
