"""What a model must look like to be taken over: its latents, its data plate, its observed sites."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch

from pyro_forget.data import Batch, Data
from pyro_forget.effects.parameters import Parametrised
from pyro_forget.effects.program import Program


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
    return Program(parametrised, plate, data.indexed, data.template(), data.num_data if minibatch_scale else None)


def latent_shapes(program: Program, batch: Batch) -> dict[str, torch.Size]:
    """The model's latent sites, in the order of the program, and the shapes of their values."""
    with torch.random.fork_rng(), pyro.poutine.block():
        trace = pyro.poutine.trace(lambda: program.model({}, batch.args, batch.kwargs)).get_trace()
    nodes: dict[str, Any] = trace.nodes
    return {
        name: node["value"].shape
        for name, node in nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and not _is_bookkeeping(node)
    }


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


def _frame(site: Any, plate: str) -> Any:
    return next((frame for frame in site["cond_indep_stack"] if frame.name == plate), None)


def _names(sites: list[Any]) -> list[str]:
    return [site["name"] for site in sites]
