"""Taking over an existing program: what it must be for its energy to be a sum over rows, checked once.

The check runs all rows (at most one batch of them) and a third of them at the same latents and noise. Prior, log
likelihood by row, supports and scales must agree, or the posterior of fewer rows is not what the model says it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_forget.data import Batch, Data
from pyro_forget.effects.guide import Guide
from pyro_forget.effects.parameters import NeverFitted, Parametrised, fresh_copy, is_fitted
from pyro_forget.effects.plate import plate_rows
from pyro_forget.effects.program import Program, Run, quiet
from pyro_forget.effects.run import Answers, Latents

_RTOL = 1e-4


def adopt_model(
    model: Callable[..., Any],
    data: Data,
    plate: str,
    *,
    minibatch_scale: bool = False,
    freeze: tuple[str, ...] = (),
) -> Program:
    """Read a model's structure from one plain run.

    Raises:
        ValueError: its latents, plates or observed sites are of a kind that cannot be taken over; the message says
            which and what to do.
    """
    if not data.num_data:
        raise ValueError("`data` has no rows: a posterior needs the data it was fitted to.")
    batch = next(data.batches())
    traces: list[Any] = []

    def run() -> None:
        with torch.random.fork_rng(), pyro.poutine.block():
            traces.append(pyro.poutine.trace(model).get_trace(*batch.args, **batch.kwargs))

    parametrised = Parametrised.of(model, run).frozen(freeze)
    sites = [node for node in traces[0].nodes.values() if node["type"] == "sample" and not _is_bookkeeping(node)]
    _refuse_locals(sites, plate)
    _refuse_plates(sites, plate, data)
    return Program(
        parametrised, plate, data.indexed, data.template(), data.num_data if minibatch_scale else None
    )


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


def latent_shapes(program: Program, batch: Batch) -> dict[str, torch.Size]:
    """The model's latent sites, in the order of the program, and the shapes of their values."""
    with torch.random.fork_rng(), pyro.poutine.block():
        trace = pyro.poutine.trace(lambda: program.model({}, batch.args, batch.kwargs)).get_trace()
    return {
        name: node["value"].shape
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and not _is_bookkeeping(node)
    }


class _No(Mapping[str, Tensor]):
    """No local noise: the check is about rows, so auxiliary noise is zero."""

    def __getitem__(self, name: str) -> Tensor:
        return torch.zeros(())

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


def _is_bookkeeping(node: Mapping[str, Any]) -> bool:
    infer = node["infer"] or {}
    return (
        type(node["fn"]).__name__ == "_Subsample"
        or bool(infer.get("_deterministic"))
        or bool(infer.get("_do_not_trace"))
        or bool(infer.get("is_auxiliary"))
    )


def _refuse_locals(sites: list[Any], plate: str) -> None:
    for site in sites:
        if site["is_observed"]:
            continue
        inside = any(frame.name == plate for frame in site["cond_indep_stack"])
        discrete = getattr(site["fn"], "has_enumerate_support", False) or not site["value"].is_floating_point()
        if inside and discrete:
            raise ValueError(
                f"Latent '{site['name']}' is discrete and local to the data plate '{plate}'. Sum it out in the "
                "model, for example with a MixtureSameFamily distribution."
            )
        if inside:
            raise ValueError(
                f"Latent '{site['name']}' is local to the data plate '{plate}': latents of single rows are not "
                "supported yet. If it is a PyroSample of global weights, read it before the plate opens."
            )
        if discrete:
            raise ValueError(f"Latent '{site['name']}' is discrete: an energy needs continuous latents. Sum it out.")


def _refuse_plates(sites: list[Any], plate: str, data: Data) -> None:
    observed = [site for site in sites if site["is_observed"]]
    inside = [site for site in observed if _frame(site, plate)]
    if not any(_frame(site, plate) for site in sites):
        raise ValueError(_no_plate(sites, plate))
    if not inside:
        raise ValueError(
            f"No observed site lies in the plate '{plate}'; observed sites: {_names(observed)}. Pass the observed "
            "values as an argument, the way the model was fitted."
        )
    chunk = min(data.batch_size, data.num_data)
    for site in inside:
        frame = _frame(site, plate)
        size = frame.size if frame.full_size is None else frame.full_size
        if size not in (chunk, data.num_data):
            raise ValueError(
                f"The plate '{plate}' has {size} rows at site '{site['name']}', the data {chunk}. A model that drops "
                "rows should mask them instead (poutine.mask); one whose rows need the row before should be given "
                "pairs (prev, y); or name the argument's data dim with `Data.of(dims=...)`."
            )


def _no_plate(sites: list[Any], plate: str) -> str:
    plates: dict[str, list[Any]] = {}
    for site in sites:
        for frame in site["cond_indep_stack"]:
            plates.setdefault(frame.name, []).append(site)
    observed = _names([site for site in sites if site["is_observed"]])
    likely = [name for name, held in plates.items() if held and all(site["is_observed"] for site in held)]
    text = (
        f"The model has no plate '{plate}' around a sample site. Plates: {sorted(plates) or 'none'}; observed sites: "
        f"{observed}."
    )
    if len(likely) == 1:
        return f'{text} The data plate is probably plate="{likely[0]}".'
    return f"{text} Put the observed sites in `with pyro.plate('{plate}', len(y)):`, one row an entry."


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
        if ratio != 1 and abs(second - ratio * first) <= _RTOL * abs(second) and first != second:
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
        if abs(values[0] - values[1]) > _RTOL * max(1.0, abs(values[0])) or values[0] != values[0]:
            raise ValueError(
                f"The prior depends on the data: site '{mine.name}', outside the data plate, has log density "
                f"{values[0]:.6g} with {first} and {values[1]:.6g} with {second}. Compute such quantities beforehand "
                "and pass them as fixed arguments, or move the term into the plate."
            )


def _same_rows(whole: Tensor, part: Tensor) -> None:
    gap = (whole - part).abs()
    if bool((gap > _RTOL * whole.abs().clamp(min=1.0)).any()):
        worst = int(gap.argmax())
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


def _frame(site: Any, plate: str) -> Any:
    return next((frame for frame in site["cond_indep_stack"] if frame.name == plate), None)


def _names(sites: list[Any]) -> list[str]:
    return [site["name"] for site in sites]


def adopt_guide(guide: Callable[..., Any], data: Data, program: Program) -> Guide:
    """Take over a fitted guide.

    Raises:
        ValueError: it was never fitted, draws other latents than the model has, or draws other values for other rows.
    """
    batch = next(data.batches())

    def run() -> None:
        with torch.random.fork_rng(), pyro.poutine.block(), plate_rows(program.plate, torch.arange(len(batch))):
            guide(*batch.args, **batch.kwargs)

    parametrised = Parametrised.of(guide, run)
    adopted = Guide.of(parametrised, program.plate, program.template)
    with quiet(), torch.no_grad():
        _same_latents(adopted, program, batch)
        if adopted.num_normals is not None:
            _not_amortised(adopted, data, batch)
    return adopted


def start_guide(guide: Callable[..., Any], data: Data, program: Program, seed: int = 0) -> Guide:
    """Take over a guide to fit it further, or, when it was never fitted, a copy in its first state.

    Raises:
        ValueError: it draws other latents than the model has.
    """
    batch = next(data.batches())
    if is_fitted(guide):
        try:
            return adopt_guide(guide, data, program)
        except NeverFitted:
            pass
    adopted = Guide.rebuilt(fresh_copy(guide), program.plate, batch, None, seed)
    adopted = replace(adopted, template=program.template)
    with quiet(), torch.no_grad():
        _same_latents(adopted, program, batch)
    return adopted


def _same_latents(guide: Guide, program: Program, batch: Batch) -> None:
    with torch.random.fork_rng():
        mine = set(guide.run({}, None).latents)
    theirs = set(latent_shapes(program, batch))
    if mine != theirs:
        raise ValueError(
            f"Guide and model differ in their latents: only in the guide {sorted(mine - theirs)}, only in the model "
            f"{sorted(theirs - mine)}. Pass the pair that was fitted together (the same reparametrised model)."
        )


def _not_amortised(guide: Guide, data: Data, batch: Batch) -> None:
    third = next(data.split(batch.ids[::3])[0].batches())
    noise = torch.linspace(-1.0, 1.0, guide.num_normals or 0)
    runs = [guide.run({}, noise, rows).latents for rows in (batch, third, None)]
    for name, value in runs[0].items():
        for other in runs[1:]:
            if other[name].shape != value.shape or not torch.allclose(other[name], value, rtol=_RTOL, atol=1e-6):
                raise ValueError(
                    f"The guide draws latent '{name}' from the data: an amortised guide has no parameters of its own "
                    "to edit. Use a guide whose global latents do not read the rows."
                )
