"""What a guide must be to be taken over."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pyro_forget.data import Batch, Data
from pyro_forget.effects.adoption.rows import RTOL
from pyro_forget.effects.adoption.structure import latent_shapes
from pyro_forget.effects.guide import Guide
from pyro_forget.effects.parameters import NeverFitted, Parametrised, fresh_copy, is_fitted, unfitted_copy
from pyro_forget.effects.plate import plate_rows
from pyro_forget.effects.program import Program, quiet
from pyro_forget.effects.random import forked_rng
from pyro_forget.effects.run import Latents
from pyro_forget.params import Params


def adopt_guide(guide: Callable[..., Any], data: Data, program: Program) -> Guide:
    """Take over a fitted guide.

    Raises:
        ValueError: it was never fitted, draws other latents than the model has, or draws other values for other rows.
    """
    batch = next(data.batches())

    def run() -> None:
        with forked_rng(), plate_rows(program.plate, torch.arange(len(batch))):
            guide(*batch.args, **batch.kwargs)

    parametrised = Parametrised.of(guide, run)
    adopted = Guide.of(parametrised, program.plate, program.template)
    with quiet(), torch.no_grad():
        _same_latents(adopted, program, batch)
        _refuse_amortised(adopted, data, batch)
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


def first_params(guide: Guide, data: Data, seed: int = 0) -> Params:
    """The parameters that a fitted guide starts from when it is made anew and first run on `data`.

    Raises:
        ValueError: it cannot be made anew, or then has other parameters.
    """
    program, batch = unfitted_copy(guide.guide.program), next(data.batches())
    made = Guide.rebuilt(program, guide.plate, batch, None, seed).guide.params
    mine = guide.guide.params
    if {name: value.shape for name, value in made.items()} != {name: value.shape for name, value in mine.items()}:
        raise ValueError(
            f"Made anew, the guide has the parameters {sorted(made)}, and not {sorted(mine)} or not in their shapes. "
            "Fit a new one to the retained data: `fit_guide(model, guide, retained)`."
        )
    return {name: made[name].to(value) for name, value in mine.items()}


def _same_latents(guide: Guide, program: Program, batch: Batch) -> None:
    with forked_rng():
        run = guide.run({}, None)
    mine = {name: tuple(value.shape) for name, value in run.latents.items()}
    theirs = {name: tuple(shape) for name, shape in latent_shapes(program, batch).items()}
    if mine != theirs:
        raise ValueError(
            "Guide and model differ in their latents: only in the guide "
            f"{dict(sorted(mine.items() - theirs.items()))}, only in the model "
            f"{dict(sorted(theirs.items() - mine.items()))}. Pass the pair that was fitted together (the same "
            "reparametrised model)."
        )
    for site in run.sites:
        if not site.fn.has_rsample:
            raise ValueError(
                f"The guide draws latent '{site.name}' from a {type(site.fn).__name__}, which has no reparametrised "
                "sample: the gradient of an energy does not pass through it. Use a distribution with `rsample`."
            )


def _refuse_amortised(guide: Guide, data: Data, batch: Batch) -> None:
    third = next(data.split(batch.ids[::3])[0].batches())

    def draw(rows: Batch | None) -> Latents:
        with forked_rng(0):
            return guide.run({}, None, rows).latents

    runs = [draw(rows) for rows in (batch, third, None)]
    for name, value in runs[0].items():
        for other in runs[1:]:
            if other[name].shape != value.shape or not torch.allclose(other[name], value, rtol=RTOL, atol=1e-6):
                raise ValueError(
                    f"The guide draws latent '{name}' from the data: an amortised guide has no parameters of its own "
                    "to edit. Use a guide whose global latents do not read the rows."
                )
