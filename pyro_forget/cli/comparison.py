"""Methods of forgetting beside each other and beside a refit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from xarray import DataTree

from pyro_forget.cli.progress import Progress
from pyro_forget.data import Data
from pyro_forget.evaluation.distance import RemainingFraction, remaining_fraction
from pyro_forget.export import to_datatree
from pyro_forget.forgetting import divergence, forget
from pyro_forget.outcome import Forgetter, Report
from pyro_forget.posterior import Posterior

METHOD_UNITS = 50  # of the progress bar, for each method
_QUICK = 1.0  # seconds; a method that takes less is timed when it runs for the second time

# (posterior, x) to the log predictive probability of each class, shape (rows, classes).
LogProbabilities = Callable[[Posterior, Tensor], Tensor]


@dataclass(frozen=True)
class Fitted:
    """A posterior and what its fit took.

    Attributes:
        seconds: wall time of the fit.
        gradient_norm: Euclidean norm of the energy's gradient where the fit ended; None where nothing was minimised.
    """

    posterior: Posterior
    seconds: float
    gradient_norm: float | None = None


@dataclass(frozen=True)
class Request:
    """A request and all that its answers are judged by.

    Attributes:
        before, refit, refit_again: fits to all data and, twice, to the retained data, from different initial values
            and noise.
        erased, retained, test: calls (x, y) with classes y.
    """

    before: Fitted
    refit: Fitted
    refit_again: Fitted
    erased: Data
    retained: Data
    test: Data
    log_probabilities: LogProbabilities


@dataclass(frozen=True)
class Score:
    """Share of wrong classes and mean log predictive probability of the right one, nats."""

    error: float
    log_likelihood: float


@dataclass(frozen=True)
class Row:
    """One method: what is left of the way to the refit, what it took, and how well the result predicts.

    `gradient_norm` is that of a fit, `report` that of a request.
    """

    method: str
    label: str
    posterior: Posterior
    distance: RemainingFraction
    seconds: float
    erased: Score
    retained: Score
    test: Score
    gradient_norm: float | None = None
    report: Report | None = None


def compare(
    request: Request, forgetters: Mapping[str, Mapping[str, Forgetter | None]], progress: Progress
) -> dict[str, Row]:
    """A row for each method, between that of the posterior before and those of the two refits.

    Args:
        request: what is asked.
        forgetters: by method, the settings to try by their label; None is the default forgetter. Of several the one
            that comes closest to the refit is kept, a choice that nobody could make without the refit.
        progress: told of each method.
    """
    rows = {"before": _fit_row(request, "before", "before forgetting", request.before)}
    for method, settings in forgetters.items():
        progress.say(next(iter(settings)).partition(",")[0])
        tried = [_forgotten_row(request, method, label, forgetter) for label, forgetter in settings.items()]
        best = min(tried, key=lambda row: row.distance.value)
        rows[method] = replace(best, label=f"{best.label}, best of {len(tried)}") if len(tried) > 1 else best
        progress.advance(METHOD_UNITS)
    rows["refit"] = _fit_row(request, "refit", "refit", request.refit)
    rows["refit_again"] = _fit_row(request, "refit_again", "another refit", request.refit_again)
    return rows


def export(
    request: Request, rows: Mapping[str, Row], labels: Mapping[str, Sequence[str]], num_draws: int, seed: int
) -> DataTree:
    """What the default forgetter left, beside the posterior before and the refit, evaluated on the retained data.

    `labels` name the entries along the dims of a site.
    """
    tree = to_datatree(
        rows["default"].posterior,
        request.retained,
        before=request.before.posterior,
        refit=request.refit.posterior,
        report=rows["default"].report,
        num_draws=num_draws,
        seed=seed,
    )
    for name, group in tree.children.items():
        found = {dim: list(values) for dim, values in labels.items() if dim in group.dims}
        tree[name] = DataTree(group.to_dataset().assign_coords(found))
    return tree


def score(posterior: Posterior, data: Data, log_probabilities: LogProbabilities) -> Score:
    """How well the mean prediction of a posterior tells the classes of these rows."""

    def each(x: Tensor, y: Tensor) -> Tensor:
        found = log_probabilities(posterior, x)
        right = found.gather(-1, y.long()[:, None])[:, 0]
        return torch.stack([(found.argmax(-1) != y).to(right), right])

    with torch.no_grad():
        error, log_likelihood = data.gather(lambda batch: each(*batch.args)).mean(-1).tolist()
    return Score(error, log_likelihood)


def _forgotten_row(request: Request, method: str, label: str, forgetter: Forgetter | None) -> Row:
    asked = request.before.posterior, request.erased, request.retained, forgetter
    after, report = forget(*asked, throw=False)
    if report.seconds < _QUICK:
        after, report = forget(*asked, throw=False)
    label = f"{label} (refused)" if report.refused else label
    return replace(_row(request, method, label, after, report.seconds), report=report)


def _fit_row(request: Request, method: str, label: str, fit: Fitted) -> Row:
    row = _row(request, method, label, fit.posterior, fit.seconds)
    return replace(row, gradient_norm=fit.gradient_norm)


def _row(request: Request, method: str, label: str, posterior: Posterior, seconds: float) -> Row:
    fits = request.before.posterior, posterior, request.refit.posterior, request.refit_again.posterior
    distance = remaining_fraction(*fits, distance=_distance)
    erased, retained, test = (
        score(posterior, data, request.log_probabilities) for data in (request.erased, request.retained, request.test)
    )
    return Row(method, label, posterior, distance, seconds, erased, retained, test)


def _distance(posterior: Posterior, refit: Posterior) -> float:
    """KL(posterior ‖ refit), nats: of the guides' Gaussians, or of Gaussians with the moments of the draws."""
    found = divergence(posterior, refit)
    if found is None:
        raise ValueError("The posteriors have neither Gaussian guides nor draws enough for their moments.")
    return found
