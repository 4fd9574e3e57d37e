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
from pyro_forget.params import Params


def adopt_guide(guide: Callable[..., Any], data: Data, program: Program) -> Guide:
    """Take over a fitted guide.

    Raises:
        ValueError: it was never fitted, draws other latents than the model has, or draws other values for other rows.
    """
    batch = next(data.batches())

    def run() -> None:
        with torch.random.fork_rng(), plate_rows(program.plate, torch.arange(len(batch))):
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
            if other[name].shape != value.shape or not torch.allclose(other[name], value, rtol=RTOL, atol=1e-6):
                raise ValueError(
                    f"The guide draws latent '{name}' from the data: an amortised guide has no parameters of its own "
                    "to edit. Use a guide whose global latents do not read the rows."
                )
