"""What the page says in words: the state of the request, its evidence, and what the evidence does not show."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyro_forget.importance import khat_threshold
from pyro_forget.page.summary import Gap, Likelihood

_UNSTATIONARY = 0.3

_ALWAYS = (
    "Other copies of the erased data: raw files, backups, logs, draws exported earlier, other models fitted to them. "
    "Forgetting edits one posterior and touches nothing else.",
    "Choices that were made with the erased data in view, such as the model, its priors, scalings or stopping times. "
    "The result is what this model gives without the data, not what another analyst would have chosen.",
    "Whether the model is right. A poor model without the data is still a poor model.",
    "That nobody could infer the erased data from the result. The account compares posteriors; an attack that tries "
    "to tell who was in the data is a test of its own.",
)
_NO_REFIT = "The distance to a refit: nobody refitted. Closeness is judged by the method's own evidence."
_HOLDS_BEFORE = (
    "That the exported file is free of the erased data. It also holds the posterior before the request (group "
    "posterior_before), which they shaped. Delete that group where it must not be kept."
)
_BLIND = {  # what a kind of evidence cannot see, by the field that shows it was used
    "residual": "That the solution is the refit: a small residual shows that a linear system was solved. The realised "
    "and the held-out fall of the energy say more.",
    "khat": "A mode that the draws never visited, or a bias that the sampler had before the request: a good k̂ and a "
    "large effective sample size see neither.",
    "stationarity": "The exact posterior. Forgetting leads to what fitting the same family of approximations to the "
    "retained data would give, and carries over how far the first fit was from its own optimum.",
}


@dataclass(frozen=True)
class Status:
    """One line for a reader in a hurry. `level` is done, caution or refused."""

    level: str
    headline: str
    sentence: str


@dataclass(frozen=True)
class Finding:
    """One piece of evidence: its name, its value as text, and how to read it."""

    name: str
    value: str
    reading: str


@dataclass(frozen=True)
class _Reading:
    """How to show fields of the evidence or the report, and what they say."""

    name: str
    keys: tuple[str, ...]
    reading: Callable[[Mapping[str, Any]], str]
    digits: int = 3
    between: str = ", "


def number(value: Any, digits: int = 3) -> str:
    """A value as text: `digits` significant digits, thousands apart, "–" for what is missing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return _digits(value, digits).replace("inf", "∞").replace("-", "−")


def _digits(value: float, digits: int) -> str:
    if isinstance(value, int) or value == 0 or not math.isfinite(value):
        return f"{value:,}" if value else "0"
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def status(report: Mapping[str, Any], warnings: list[str]) -> Status:
    """Refused, done with reservations, or done."""
    if not report:
        return Status("caution", "No report", "This tree was exported without the report of a request.")
    if report["refused"]:
        return Status("refused", "Refused: nothing was changed", str(report["refused"]))
    share = report["num_erased"] / report["num_data"] if report["num_data"] else 0.0
    erased = f"{number(report['num_erased'])} of {number(report['num_data'])} data ({100 * share:.1f} %)"
    sentence = f"The posterior was edited to what the other {number(report['num_retained'])} data say."
    if warnings:
        plural = "a warning" if len(warnings) == 1 else f"{len(warnings)} warnings"
        return Status("caution", f"Erased {erased}, with {plural}", sentence)
    return Status("done", f"Erased {erased}", sentence)


def findings(
    report: Mapping[str, Any],
    evidence: Mapping[str, Any],
    likelihoods: Mapping[str, Likelihood],
    gap: Gap | None,
) -> list[Finding]:
    """Everything that was measured, the most telling first."""
    found = _against_refit(likelihoods, gap)
    known = {**report, **evidence}
    for entry in _READINGS:
        values = [known.get(key) for key in entry.keys]
        if None not in values:
            text = entry.between.join(number(value, entry.digits) for value in values)
            found.append(Finding(entry.name, text, entry.reading(evidence)))
    return found


def not_shown(evidence: Mapping[str, Any], has_before: bool, has_refit: bool) -> list[str]:
    """The limits of this account, as sentences."""
    said = [*_ALWAYS] if has_refit else [_NO_REFIT, *_ALWAYS]
    said += [sentence for field, sentence in _BLIND.items() if evidence[field] is not None]
    return [*said, _HOLDS_BEFORE] if has_before else said


def _against_refit(likelihoods: Mapping[str, Likelihood], gap: Gap | None) -> list[Finding]:
    if gap is None:
        return []
    start = f"before {number(gap.largest['before'])}, " if "before" in gap.largest else ""
    noise = f"Draws alone make the typical one about {number(0.67 * gap.noise)}; 0 is the refit itself."
    found = [
        Finding(
            "Distance of a mean from the refit, largest",
            f"{start}after {number(gap.largest['after'])}",
            _closer(gap) + "In standard deviations of the refit, over all parameters.",
        ),
        Finding(
            "The same, typical parameter",
            ", ".join(f"{role} {number(value)}" for role, value in gap.typical.items()),
            noise,
        ),
    ]
    away = likelihoods["after"].mean - likelihoods["refit"].mean
    reading = "Nats per datum, on the data all posteriors were evaluated on; 0: as the refit."
    return [*found, Finding("Log predictive density, after less refit", number(away), reading)]


def _closer(gap: Gap) -> str:
    farther = gap.largest["after"] > max(gap.largest.get("before", math.inf), 4 * gap.noise)
    return "Farther from the refit than before: forgetting did not help here. " if farther else ""


def _read_khat(evidence: Mapping[str, Any]) -> str:
    num_draws = evidence.get("num_draws")
    if not num_draws:
        return "Below 0.7 the weights are usable."
    limit = khat_threshold(num_draws)
    good = float(evidence["khat"]) < limit
    return f"{'Below' if good else 'Not below'} {limit:.2f}, the threshold for {number(num_draws)} draws: " + (
        "the weights are usable." if good else "do not rely on the weights."
    )


def _read_ess(evidence: Mapping[str, Any]) -> str:
    num_draws = evidence.get("num_draws")
    if not num_draws:
        return "Draws that the weights are worth."
    return f"Of {number(num_draws)} draws ({100 * float(evidence['ess']) / num_draws:.0f} %); half or more is good."


def _read_stationarity(evidence: Mapping[str, Any]) -> str:
    value = abs(float(evidence["stationarity"]))
    if value < _UNSTATIONARY:
        return "Near 0: the first fit had converged as far as this request can tell."
    return "The first fit was not at its optimum; the result inherits that. Fit longer, or refit."


def _read_untilted(evidence: Mapping[str, Any]) -> str:
    rose = float(evidence["untilted_fall"]) < 0
    return "Negative: the retained data are described worse than before." if rose else "Positive is good."


def _says(text: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda evidence: text


_READINGS = (
    _Reading(
        "Log predictive density of the erased data",
        ("log_likelihood_before", "log_likelihood_after"),
        _says("Nats per datum, before → after. It falls when the posterior stops knowing them."),
        between=" → ",
    ),
    _Reading("KL(after ‖ before)", ("kl",), _says("Nats. How much the posterior moved; 0: not at all.")),
    _Reading("Pareto k̂", ("khat",), _read_khat),
    _Reading("Effective sample size", ("ess",), _read_ess),
    _Reading("Effective sample size, held out", ("ess_held_out",), _says("On draws that the map was not fitted on.")),
    _Reading(
        "Fall of the energy: promised, realised, held out",
        ("predicted_fall", "realised_fall", "held_out_fall"),
        _says("Nats, of the tilted energy of the retained data. The three should agree."),
    ),
    _Reading("Fall of the plain retained energy", ("untilted_fall",), _read_untilted),
    _Reading("Stationarity ν of the first fit", ("stationarity",), _read_stationarity),
    _Reading("Solver", ("solver",), _says("How the last linear solve ended.")),
    _Reading("Relative residual", ("residual",), _says("‖Ax − b‖ / ‖b‖ of the last solve.")),
    _Reading("Curvature products", ("num_products",), _says("Each costs a few gradients over the retained data.")),
    _Reading("Damping λ", ("damping",), _says("Kept in the last sweep; 0: the full step.")),
    _Reading("Passes of moment matching", ("num_passes",), _says("2 is typical, more than 20 a sign of trouble.")),
    _Reading("R-hat of the draws that came in", ("rhat_input",), _says("Below 1.01 the chains had mixed."), digits=4),
    _Reading("Effective sample size that came in", ("ess_input",), _says("400 or more is good.")),
)
