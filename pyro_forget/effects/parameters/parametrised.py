"""A program as a function of its parameters."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import nn
from torch.func import functional_call

from pyro_forget.effects.parameters.fitted import (
    never_fitted,
    refuse_disagreement,
    refuse_modules,
    refuse_unfitted,
)
from pyro_forget.effects.parameters.module import (
    called,
    edited_module,
    module_constraints,
    module_tensors,
    store_names,
    without_rows,
)
from pyro_forget.effects.parameters.scope import filled_store, modules_as_they_are, read_store
from pyro_forget.params import Params, clone


@dataclass(frozen=True)
class Parametrised:
    """A model or guide as a function of its parameters.

    Attributes:
        program: the user's callable, never changed.
        tensors: a detached copy of its unconstrained parameters (and a module's buffers) by name.
        free: the names that are parameters; the rest stays as it is.
        constraints: of the parameters that live in the store or are `PyroParam`s.
        stored: the names that live in the store, not in a module.
    """

    program: Callable[..., Any]
    tensors: Params
    free: tuple[str, ...]
    constraints: dict[str, Any]
    stored: tuple[str, ...]

    @staticmethod
    def of(program: Callable[..., Any], run: Callable[[], Any]) -> "Parametrised":
        """Take over the parameters that `run` touches (it calls `program` once); the store is left as it was.

        Raises:
            ValueError: they were never initialised, belong to a `pyro.module`, or the store disagrees with the
                module's own tensors.
        """
        refuse_unfitted(program)
        found, _ = module_tensors(program)
        refuse_disagreement(program, found)
        own, limits, new = read_store(run, fresh=False)
        of_modules = store_names(program)
        own = {name: value for name, value in own.items() if name not in of_modules}
        refuse_modules(own)
        made = {*(set(module_tensors(program)[0]) - set(found)), *(new & set(own))}
        if made:
            raise never_fitted(program, sorted(made))
        return _taken(without_rows(program), own, limits)

    @staticmethod
    def rebuilt(program: Callable[..., Any], run: Callable[[], Any], params: Params | None) -> "Parametrised":
        """Take over a program from code alone, with `params` (None: those it starts with) in place of its tensors.

        Raises:
            ValueError: its parameters have other names or shapes.
        """
        own, limits, _ = read_store(run, fresh=True)
        of_modules = store_names(program)
        made = _taken(program, {name: value for name, value in own.items() if name not in of_modules}, limits)
        shapes = {name: value.shape for name, value in made.tensors.items()}
        if params is not None and {name: value.shape for name, value in params.items()} != shapes:
            raise ValueError(
                f"{called(program)} has parameters {sorted(shapes)}, the file {sorted(params)}, or of other "
                "shapes: load it with the code it was saved from. Where shapes follow the number of data, first run it "
                "on as many rows as it was fitted to."
            )
        return replace(made, program=without_rows(program), tensors=made.tensors | (params or {}))

    @property
    def params(self) -> Params:
        """The free parameters."""
        return {name: self.tensors[name] for name in self.free}

    @property
    def fixed(self) -> Params:
        """The tensors that are not free."""
        return {name: value for name, value in self.tensors.items() if name not in self.free}

    def frozen(self, names: Collection[str]) -> "Parametrised":
        """The same with these names no longer free."""
        return replace(self, free=tuple(name for name in self.free if name not in names))

    def to(self, device: torch.device) -> "Parametrised":
        """The same with its tensors on `device`."""
        return replace(self, tensors={name: value.to(device) for name, value in self.tensors.items()})

    @property
    def is_module(self) -> bool:
        """Whether the program is a module, so that its parameters are its own tensors."""
        return isinstance(self.program, nn.Module)

    def __call__(self, params: Params, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the program with these parameters (a subset of the names keeps the rest)."""
        if not self.tensors:
            return self.program(*args, **kwargs)
        full = self.tensors | params
        with filled_store({name: full[name] for name in self.stored}, self.constraints):
            if isinstance(self.program, nn.Module):
                own = {name: value for name, value in full.items() if name not in self.stored}
                with modules_as_they_are():
                    return functional_call(self.program, own, args, kwargs)
            return self.program(*args, **kwargs)

    def edited(self, params: Params) -> Callable[..., Any]:
        """A program of its own with these unconstrained parameters; the original is untouched.

        A module is copied, without the rows an autoguide remembers; a function is wrapped in its own store, and so is
        a module that keeps parameters there.
        """
        full = self.tensors | params
        if isinstance(self.program, nn.Module) and not self.stored:
            return edited_module(self.program, full)

        def edited_program(*args: Any, **kwargs: Any) -> Any:
            return self(full, args, kwargs)

        return edited_program


def unconditioned(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with its observed sites drawn: `Predictive` would hand back the observed values it is given."""
    return pyro.poutine.uncondition(model)


def _taken(program: Callable[..., Any], own: Params, limits: dict[str, Any]) -> Parametrised:
    """The program with a copy of its module's tensors and of those that it has in the store."""
    found, fixed = module_tensors(program)
    limits = {name: limits[name] for name in own} | module_constraints(program)
    return Parametrised(program, clone(found | own | fixed), tuple(found | own), limits, tuple(own))
