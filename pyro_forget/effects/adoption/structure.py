"""What a model must look like to be taken over: its latents, its data plate, its observed sites."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch

from pyro_forget.data import Batch, Data
from pyro_forget.effects.parameters import NeverFitted, Parametrised
from pyro_forget.effects.plate import plate_rows
from pyro_forget.effects.program import Program
from pyro_forget.effects.random import forked_rng
from pyro_forget.effects.run import Latents


def adopt_model(
    model: Callable[..., Any],
    data: Data,
    plate: str,
    *,
    minibatch_scale: bool = False,
    freeze: tuple[str, ...] = (),
    unfitted: bool = False,
) -> Program:
    """Read a model's structure from one plain run; `unfitted`: with learned parameters as they are first made.

    Raises:
        ValueError: its latents, plates or observed sites are of a kind that cannot be taken over; the message says
            which and what to do.
    """
    if not data.num_data:
        raise ValueError("`data` has no rows: a posterior needs the data it was fitted to.")
    batch = next(data.batches())
    indices = batch.rows if data.indexed else torch.arange(len(batch))
    traces: list[Any] = []
    sizes: list[int | None] = []

    def run() -> None:
        # With the plate as it will be: a hard-coded number of data does not fit one batch of them.
        with forked_rng(), plate_rows(plate, indices) as asked:
            try:
                traces.append(pyro.poutine.trace(model).get_trace(*batch.args, **batch.kwargs))
            finally:
                sizes.extend(asked)

    try:
        found = Parametrised.rebuilt(model, run, None) if unfitted else Parametrised.of(model, run)
    finally:
        # Of a split, the model may still ask for the number of rows that there were.
        _refuse_sizes(sizes, plate, (len(batch), data.num_data, data.num_whole))
    sites = [node for node in traces[0].nodes.values() if node["type"] == "sample" and not _is_bookkeeping(node)]
    if not any(_frame(site, plate) for site in sites):
        raise ValueError(_no_plate(sites, plate))
    _refuse_locals(sites, plate)
    return Program(
        found.frozen(freeze), plate, data.indexed, data.template(), data.num_data if minibatch_scale else None
    )


def start_model(model: Callable[..., Any], data: Data, plate: str, seed: int = 0) -> Program:
    """Read a model that is to be fitted: parameters of its own that were never made are as they are first made."""
    try:
        return adopt_model(model, data, plate)
    except NeverFitted:
        with forked_rng(seed):
            return adopt_model(model, data, plate, unfitted=True)


def latent_shapes(program: Program, batch: Batch) -> dict[str, torch.Size]:
    """The model's latent sites, in the order of the program, and the shapes of their values."""
    return {name: value.shape for name, value in prior_latents(program, batch).items()}


def prior_latents(program: Program, batch: Batch, seed: int | None = None) -> Latents:
    """One draw of the latents from their prior, in the order of the program; constrained."""
    indices = batch.rows if program.indexed else torch.arange(len(batch))
    with forked_rng(seed), pyro.poutine.block(), plate_rows(program.plate, indices), torch.no_grad():
        trace = pyro.poutine.trace(lambda: program.model({}, batch.args, batch.kwargs)).get_trace()
    nodes: dict[str, Any] = trace.nodes
    return {
        name: node["value"]
        for name, node in nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and not _is_bookkeeping(node)
    }


def _is_bookkeeping(node: Mapping[str, Any]) -> bool:
    infer = node["infer"] or {}
    return (
        type(node["fn"]).__name__ == "_Subsample"
        or bool(infer.get("_deterministic"))
        or bool(infer.get("_do_not_trace"))
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
                "supported yet. If it was observed in the fit, pass its values too; if it is a PyroSample of global "
                "weights, read it before the plate opens."
            )
        if discrete:
            raise ValueError(f"Latent '{site['name']}' is discrete: an energy needs continuous latents. Sum it out.")


def _refuse_sizes(sizes: list[int | None], plate: str, allowed: tuple[int, int, int]) -> None:
    for size in sizes:
        if size not in (None, *allowed):
            raise ValueError(
                f"The plate '{plate}' asks for {size} rows, the data have {allowed[1]}. A model that drops rows should "
                "mask them instead (poutine.mask); one whose rows need the row before should be given pairs "
                "(prev, y); if the data have another number of rows, say so with `Data.of(dims=...)` or "
                "`Data.of(fixed=...)`."
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


def _frame(site: Any, plate: str) -> Any:
    return next((frame for frame in site["cond_indep_stack"] if frame.name == plate), None)


def _names(sites: list[Any]) -> list[str]:
    return [site["name"] for site in sites]
