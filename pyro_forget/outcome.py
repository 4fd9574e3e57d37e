"""What a forgetter returns and what a request reports.

A forgetter hands over an `Edit`: the edited posterior and the `Evidence` it gathered on the way. The verb `forget`
times it, measures what the edit did and builds the `Report`. Evidence is values, not prose: a later judge reads it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from pyro_forget.data import Data
from pyro_forget.posterior import Posterior


@dataclass(frozen=True)
class Sweep:
    """One sweep of location and scale. Falls are of the tilted retained energy, in nats; a kept step lowers it.

    `realised` is measured under the noise that the step was computed with, `held_out` under another. `scale_…` are
    the scale's, `ahead_…` those of going on along the sweep's own direction, which promises nothing.
    """

    damping: float
    predicted: float
    realised: float
    held_out: float
    scale_predicted: float = 0.0
    scale_realised: float = 0.0
    scale_held_out: float = 0.0
    num_products: int = 0
    ahead_realised: float = 0.0
    ahead_held_out: float = 0.0


@dataclass(frozen=True)
class Evidence:
    """What a forgetter saw. A field that does not apply to the method is None.

    Attributes:
        method: the forgetter, with its settings, in words.
        refused: why nothing was edited; None when something was.
        warnings: plain sentences for a reader.
        solver: the solver's result, such as "converged".
        num_products: curvature products spent.
        residual: ‖Ax − b‖ / ‖b‖ of the last solve.
        damping: λ kept in the last sweep.
        sweeps: the sweeps that were kept.
        predicted_fall, realised_fall, held_out_fall: of the tilted retained energy over all sweeps, nats.
        untilted_fall: fall of F(γ, S∖S′) itself under the held-out noise, nats; negative if it rose.
        stationarity: ν, how far the fit was from stationary relative to what is asked (0: at its minimum).
        ess, ess_held_out: effective sample size of the weights, of a half the map was not fitted on.
        khat: Pareto k̂ of the weights.
        num_draws, num_passes: draws moved, passes of moment matching.
        rhat_input, ess_input: of the draws as they came.
        step_norm: Euclidean length of the change of each site or parameter.
        extra: anything else a method wants to show, JSON types only.
    """

    method: str
    refused: str | None = None
    warnings: tuple[str, ...] = ()
    solver: str | None = None
    num_products: int | None = None
    residual: float | None = None
    damping: float | None = None
    sweeps: tuple[Sweep, ...] = ()
    predicted_fall: float | None = None
    realised_fall: float | None = None
    held_out_fall: float | None = None
    untilted_fall: float | None = None
    stationarity: float | None = None
    ess: float | None = None
    ess_held_out: float | None = None
    khat: float | None = None
    num_draws: int | None = None
    num_passes: int | None = None
    rhat_input: float | None = None
    ess_input: float | None = None
    step_norm: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def gathered(evidence: Sequence[Evidence]) -> Evidence:
    """The evidence of chunks erased one after another, as one: sums of what adds up, the last of the rest."""
    if len(evidence) == 1:
        return evidence[0]

    def total(name: str) -> Any:
        values = [getattr(part, name) for part in evidence if getattr(part, name) is not None]
        return sum(values) if values else None

    return replace(
        evidence[-1],
        num_products=total("num_products"),
        predicted_fall=total("predicted_fall"),
        realised_fall=total("realised_fall"),
        held_out_fall=total("held_out_fall"),
        untilted_fall=total("untilted_fall"),
        sweeps=tuple(sweep for part in evidence for sweep in part.sweeps),
        warnings=tuple(dict.fromkeys(warning for part in evidence for warning in part.warnings)),
        stationarity=max((part.stationarity for part in evidence if part.stationarity is not None), default=None),
        extra={**evidence[-1].extra, "chunks": len(evidence)},
    )


@dataclass(frozen=True)
class Edit:
    """An edited posterior and the evidence for it. Refused: the input posterior, and `evidence.refused` says why."""

    posterior: Posterior
    evidence: Evidence


@dataclass(frozen=True)
class Report:
    """The account of one request.

    Attributes:
        num_data: N before the request; `num_erased` + `num_retained`.
        seconds: wall time of the forgetter alone, without the evaluation below.
        log_likelihood_before, log_likelihood_after: mean log predictive density of the erased data, nats per datum.
        kl: KL(after ‖ before), nats, where it has a closed form or moments to estimate it from.
        evidence: what the forgetter saw.
    """

    num_data: int
    num_erased: int
    num_retained: int
    seconds: float
    evidence: Evidence
    log_likelihood_before: float | None = None
    log_likelihood_after: float | None = None
    kl: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def refused(self) -> str | None:
        """Why nothing was edited, or None."""
        return self.evidence.refused

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, nested as the dataclasses are."""
        return asdict(self) | {"refused": self.refused}


class Forgetter(Protocol):
    """A method of forgetting: stateless, its settings are its fields."""

    def edit(self, posterior: Posterior, erased: Data, retained: Data) -> Edit:
        """The posterior without `erased`; `retained` is the rest of its data. Neither argument is changed."""
        ...
