"""The verb."""

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from pyro_forget.data import Data
from pyro_forget.evaluation.distance import gaussian_kl, moment_kl
from pyro_forget.forgetters.default import default_forgetter
from pyro_forget.outcome import Edit, Forgetter, Report
from pyro_forget.posterior import Posterior, SampledPosterior, VariationalPosterior

NUM_DRAWS = 200


class Refused(ValueError):
    """A request that no edit could serve; the input posterior stands as it was.

    Attributes:
        report: the account of what was tried.
    """

    def __init__(self, report: Report) -> None:
        super().__init__(f"Nothing was forgotten: {(report.refused or '').rstrip('.')}.")
        self.report = report


def forget(
    posterior: Posterior, erased: Data, retained: Data, forgetter: Forgetter | None = None, *, throw: bool = True
) -> tuple[Posterior, Report]:
    """The posterior that a refit without `erased` would have given, without the refit.

    Args:
        posterior: the posterior of `erased` and `retained` together; it is not changed.
        erased: the rows that must go.
        retained: all the others: `forget(posterior, *data.split(ids))`.
        forgetter: the method; by default `Influence` for guides, `Transport` for draws, `PairedDescent` for networks.
        throw: raise where the method refuses; False gives back the input posterior with its old ids, and
            `report.refused` says why.

    Returns:
        (the posterior of `retained`, the account of the request).

    Raises:
        ValueError: erased and retained overlap, or are not together exactly the posterior's rows, or nothing would
            be left.
        Refused: the method refused; its `report` is attached.
    """
    _check(posterior, erased, retained)
    method = default_forgetter(posterior) if forgetter is None else forgetter
    start = time.perf_counter()
    edit = method.edit(posterior, erased, retained)
    report = _report(posterior, edit, erased, retained, time.perf_counter() - start)
    if report.refused and throw:
        raise Refused(report)
    return edit.posterior, report


def _check(posterior: Posterior, erased: Data, retained: Data) -> None:
    given, known = torch.cat([erased.ids, retained.ids]), posterior.ids
    both = erased.ids[torch.isin(erased.ids, retained.ids)]
    if len(both):
        raise ValueError(f"Erased and retained share {len(both)} ids, such as {_some(both)}: use `data.split(ids)`.")
    if not retained.num_data:
        raise ValueError("Everything would be erased: what is left is the prior, which needs no forgetting.")
    missing, unknown = known[~torch.isin(known, given)], given[~torch.isin(given, known)]
    if len(unknown):
        raise ValueError(
            f"{len(unknown)} ids are not the posterior's, such as {_some(unknown)}: erased before, or never there."
        )
    if len(missing):
        raise ValueError(
            f"Erased and retained together lack {len(missing)} of the posterior's ids, such as {_some(missing)}: "
            "pass all the data that it was fitted to, `forget(posterior, *data.split(ids))`."
        )


def _some(ids: Tensor) -> list[int]:
    """The first few, to show."""
    return ids.sort().values[:5].tolist()


def _report(posterior: Posterior, edit: Edit, erased: Data, retained: Data, seconds: float) -> Report:
    report = Report(
        num_data=posterior.num_data,
        num_erased=erased.num_data,
        num_retained=retained.num_data,
        seconds=seconds,
        evidence=edit.evidence,
        warnings=edit.evidence.warnings,
    )
    if not erased.num_data or edit.evidence.refused:
        return report
    return replace(
        report,
        log_likelihood_before=mean_log_density(posterior, erased),
        log_likelihood_after=mean_log_density(edit.posterior, erased),
        kl=divergence(edit.posterior, posterior),
    )


def mean_log_density(posterior: Posterior, data: Data) -> float | None:
    """Mean over the rows of log E[p(z | θ)], nats; None for a posterior without a model."""
    if isinstance(posterior, VariationalPosterior):
        rows = posterior.log_likelihood(data, NUM_DRAWS)[0]
        weights = torch.full((len(rows), 1), -math.log(len(rows)), dtype=rows.dtype, device=rows.device)
    elif isinstance(posterior, SampledPosterior):
        rows = posterior.log_likelihood(data).flatten(0, 1)
        flat = posterior.log_weights
        weights = (torch.full((len(rows),), -math.log(len(rows))) if flat is None else flat.flatten()).to(rows)[:, None]
    else:
        return None
    return float((rows + weights).logsumexp(0).mean())


def divergence(after: Posterior, before: Posterior) -> float | None:
    """KL(after ‖ before), nats: closed-form for Gaussian guides, of Gaussian moments for draws; None for others."""
    if isinstance(after, VariationalPosterior) and isinstance(before, VariationalPosterior):
        if after.gaussian is None or before.gaussian is None:
            return None
        return float(gaussian_kl(*after.gaussian.flat(), *before.gaussian.flat()))
    if isinstance(after, SampledPosterior) and isinstance(before, SampledPosterior):
        return _moment_divergence(after, before)
    return None


def _moment_divergence(after: SampledPosterior, before: SampledPosterior) -> float | None:
    dim = sum(value[0, 0].numel() for value in after.params.values())
    if min(after.num_draws, before.num_draws) <= 2 * dim:
        return None
    clouds = [
        torch.cat([value.reshape(posterior.num_draws, -1) for value in posterior.params.values()], -1)
        for posterior in (after, before)
    ]
    weights = [None if p.log_weights is None else p.log_weights.flatten() for p in (after, before)]
    try:
        return float(moment_kl(clouds[0], clouds[1], weights[0], weights[1]))
    except ValueError:  # chains that never moved have no covariance: no reason to lose an edit over a figure
        return None
