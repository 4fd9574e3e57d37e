"""Whether a program's parameters are those of a fit."""

from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide

from pyro_forget.effects.parameters.module import MODULE_DIVIDER, called, store_names, store_wins
from pyro_forget.params import Params


class NeverFitted(ValueError):
    """A program whose parameters were never made."""


def is_fitted(program: Any) -> bool:
    """Whether an autoguide has parameters; of other programs only a run can tell."""
    return not isinstance(program, AutoGuide) or program.prototype_trace is not None or bool(list(program.parameters()))


def refuse_unfitted(program: Any) -> None:
    """Raise where there is nothing to take over yet."""
    if not is_fitted(program):
        raise never_fitted(program, [])


def never_fitted(program: Any, new: list[str]) -> NeverFitted:
    """The error for a program that made its parameters only now."""
    made = f": its first run made the parameters {new}" if new else ": it has no parameters yet"
    return NeverFitted(
        f"{called(program)} was never fitted{made}. Fit it first (Pyro's SVI, or `fit_guide`), in the same process "
        "and without clearing the parameter store in between."
    )


def refuse_modules(params: Params) -> None:
    """Raise where a function registers a module: its tensors are its own, whatever the store says."""
    modules = sorted({name.split(MODULE_DIVIDER)[0] for name in params if MODULE_DIVIDER in name})
    if modules:
        raise ValueError(
            f"`pyro.module` registered {modules} inside a function; its tensors cannot be substituted from outside. "
            "Make the program a PyroModule that holds them."
        )


def refuse_disagreement(program: Any, found: Params) -> None:
    """Raise where the store holds other values than the module: at the next run Pyro would overwrite the module's."""
    if not store_wins(program):
        return
    stored = pyro.get_param_store()._params
    for known, name in store_names(program).items():
        other, value = stored.get(known), found.get(name)
        if other is None or value is None or other is value:
            continue
        if other.shape != value.shape or not torch.equal(other, value):
            raise ValueError(
                f"The parameter store and {called(program)} disagree about '{name}': another program of the same "
                "name was fitted since, and Pyro would overwrite this one at its next run. Take a posterior over "
                "before fitting the next guide, or use pyro.settings.set(module_local_params=True)."
            )
