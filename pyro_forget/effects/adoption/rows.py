"""What a model must do to be a sum over rows.

The check runs all rows (at most one batch of them) and a third of them at the same latents and noise. Prior, log
likelihood by row and scales must agree, or the posterior of fewer rows is not what the model says it is.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_forget.data import Batch, Data
from pyro_forget.effects.program import Program, Run, quiet
from pyro_forget.effects.run import Answers, Latents

RTOL = 1e-4


def check_rows(program: Program, data: Data, latents: Latents, params: Any = None) -> None:
    """Demand that the model is a sum over rows at these latents.

    Raises:
        ValueError: prior, log likelihoods or scales depend on which rows come along, or are not finite.
    """
    batch = next(data.batches())
    third = next(data.split(batch.ids[::3])[0].with_batch_size(len(batch)).batches())
    answers = Answers(latents, noise=_No())
    with quiet(), torch.no_grad():
        whole = program.run(batch, answers, params)
        part = _run_part(program, third, answers, params)
        _same_scales(whole, part)
        _same_prior(whole, part, "all rows", "a third of them")
        _same_prior(whole, _run_part(program, program.template, answers, params), "the data", "made-up rows")
        _same_rows(whole.log_likelihood()[::3], part.log_likelihood())
        _finite(program, data, answers, params)


class _No(Mapping[str, Tensor]):
    """No local noise: the check is about rows, so auxiliary noise is zero."""

    def __getitem__(self, name: str) -> Tensor:
        return torch.zeros(())

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


def _run_part(program: Program, batch: Batch, answers: Answers, params: Any) -> Run:
    try:
        run = program.run(batch, answers, params)
        run.log_likelihood()
    except (ValueError, RuntimeError, IndexError, AssertionError, TypeError) as error:
        raise ValueError(
            f"The model does not run on {len(batch)} of its rows: {error} — Pass all data as arguments of the call "
            "(also what `poutine.condition` or a closure holds now), or read closed-over data with the plate's index; "
            "the plate's dim is that of the rows."
        ) from error
    return run


def _same_scales(whole: Run, part: Run) -> None:
    ratio = whole.num_rows / part.num_rows
    for mine, theirs in _pairs(whole, part):
        if not mine.is_data or (torch.is_tensor(mine.scale) and torch.as_tensor(mine.scale).ndim):
            continue
        first, second = float(mine.scale), float(theirs.scale)
        if ratio != 1 and abs(second - ratio * first) <= RTOL * abs(second) and first != second:
            raise ValueError(
                f"Site '{mine.name}' is scaled by {second:g} on {part.num_rows} rows and {first:g} on "
                f"{whole.num_rows}: a mini-batch scale N/B inside the model (poutine.scale). Remove it, since the "
                "plate is scaled here, or pass `minibatch_scale=True` to have it taken out."
            )


def _same_prior(whole: Run, part: Run, first: str, second: str) -> None:
    for mine, theirs in _pairs(whole, part):
        if mine.is_data:
            continue
        values = float(mine.log_prob().sum()), float(theirs.log_prob().sum())
        if not math.isfinite(values[0]):
            raise ValueError(
                f"Site '{mine.name}' has log density {values[0]} with {first}: its value lies outside its support."
            )
        if not abs(values[0] - values[1]) <= RTOL * max(1.0, abs(values[0])):
            raise ValueError(
                f"The prior depends on the data: site '{mine.name}', outside the data plate, has log density "
                f"{values[0]:.6g} with {first} and {values[1]:.6g} with {second}. Compute such quantities beforehand "
                "and pass them as fixed arguments, or move the term into the plate."
            )


def _same_rows(whole: Tensor, part: Tensor) -> None:
    gap = (whole - part).abs()
    apart = ~(gap <= RTOL * whole.abs().clamp(min=1.0)) & whole.isfinite()
    if bool(apart.any()):
        worst = int(torch.where(apart, gap.nan_to_num(nan=torch.inf), 0.0).argmax())
        raise ValueError(
            f"A row's log likelihood depends on which other rows come along ({float(whole[worst]):.6g} with all rows, "
            f"{float(part[worst]):.6g} with a third of them). Look for centring or scaling inside the model, batch "
            "norm in train mode, a length taken from a shape, or a mean of shape (N, 1) against data of shape (N,)."
        )


def _finite(program: Program, data: Data, answers: Answers, params: Any) -> None:
    rows = data.gather(lambda batch: program.run(batch, answers, params).log_likelihood())
    bad = data.ids[~torch.isfinite(rows).cpu()]
    if len(bad):
        raise ValueError(
            f"The log likelihood is not finite for {len(bad)} rows, ids {bad[:5].tolist()}: NaN or Inf in the data "
            "that no mask covers, or values outside the likelihood's support. Mask them (poutine.mask) or leave them "
            "out."
        )


def _pairs(whole: Run, part: Run) -> Any:
    others = {site.name: site for site in part.sites}
    mine = {site.name: site for site in whole.sites if site.frame is None or site.frame.dim is not None}
    if set(mine) - set(others):
        raise ValueError(f"The sites {sorted(set(mine) - set(others))} are there with all rows but not with some.")
    return [(site, others[name]) for name, site in mine.items()]
