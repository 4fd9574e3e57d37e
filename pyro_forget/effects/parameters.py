"""A program's learned parameters: read once, substituted in every run, written back into a copy.

Pyro keeps parameters in a global store whose names win over the tensors of a module. So a module is evaluated by
`functional_call` within an empty scope of the store, a function within a scope that holds the given tensors; both
leave the store's keys, values and identities as they were.
"""

import copy
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints
from torch.func import functional_call

from pyro_forget.params import Params, clone

_MODULE_DIVIDER = "$$$"
_UNCONSTRAINED = "_unconstrained"


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
        _refuse_unfitted(program)
        found, fixed = _module_tensors(program)
        _refuse_disagreement(program, found)
        own, limits = _stored(program, run)
        if isinstance(program, nn.Module) and set(_module_tensors(program)[0]) != set(found):
            raise _never_fitted(program, sorted(set(_module_tensors(program)[0]) - set(found)))
        return Parametrised(
            program, clone(found | own | fixed), tuple(found | own), limits | _module_constraints(program), tuple(own)
        )

    @staticmethod
    def rebuilt(program: Callable[..., Any], run: Callable[[], Any], params: Params | None) -> "Parametrised":
        """Take over a program from code alone, with `params` (None: those it starts with) in place of its tensors.

        Raises:
            ValueError: its parameters have other names or shapes.
        """
        own, limits = _stored(program, run, fresh=True)
        found, fixed = _module_tensors(program)
        made = clone(found | own | fixed)
        if params is not None and {n: v.shape for n, v in params.items()} != {n: v.shape for n, v in made.items()}:
            raise ValueError(
                f"{_called(program)} has parameters {sorted(made)}, the file {sorted(params)}, or of other "
                "shapes: load it with the code it was saved from."
            )
        limits |= _module_constraints(program)
        return Parametrised(program, made | (params or {}), tuple(found | own), limits, tuple(own))

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
                return functional_call(self.program, own, args, kwargs)
            return self.program(*args, **kwargs)

    def edited(self, params: Params, drop: tuple[Any, ...] = ()) -> Callable[..., Any]:
        """A program of its own with these parameters, for the user's own workflow; the original is untouched.

        Args:
            params: unconstrained values, by name.
            drop: objects that must not travel with a copied module, such as erased rows.
        """
        full = self.tensors | params
        if isinstance(self.program, nn.Module):
            return _edited_module(self.program, full, drop)
        program, limits = self.program, self.constraints

        def edited_program(*args: Any, **kwargs: Any) -> Any:
            with filled_store(full, limits):
                return program(*args, **kwargs)

        return edited_program


@contextmanager
def filled_store(params: Params, limits: dict[str, Any]) -> Iterator[None]:
    """Within the context the store holds these unconstrained tensors and nothing else."""
    store = pyro.get_param_store()
    with store.scope():
        for name, value in params.items():
            store._params[name] = value
            store._constraints[name] = limits.get(name, constraints.real)
            store._param_to_name[value] = name
        yield


@contextmanager
def loaded_store(params: Params, limits: dict[str, Any]) -> Iterator[None]:
    """The same with trainable copies: what a further SVI does to them ends with the context."""
    trainable = {name: value.detach().clone().requires_grad_(True) for name, value in params.items()}
    with filled_store(trainable, limits):
        yield


def unconditioned(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with its observed sites drawn: `Predictive` would hand back the observed values it is given."""
    return pyro.poutine.uncondition(model)


def _module_tensors(program: Any) -> tuple[Params, Params]:
    """(free, fixed) tensors of a module; a converted `AutoLaplaceApproximation` keeps loc and scale as buffers."""
    if not isinstance(program, nn.Module):
        return {}, {}
    parameters: Params = dict(program.named_parameters())
    buffers: Params = dict(program.named_buffers())
    free = {name: value for name, value in parameters.items() if value.requires_grad}
    if not parameters and isinstance(program, AutoGuide):
        free = {name: value for name, value in buffers.items() if value.is_floating_point()}
    return free, {name: value for name, value in (parameters | buffers).items() if name not in free}


def _module_constraints(program: Any) -> dict[str, Any]:
    """Constraints of the `PyroParam`s of a module, by the name of their unconstrained tensor."""
    if not isinstance(program, nn.Module):
        return {}
    return {
        ".".join(filter(None, (path, name))) + _UNCONSTRAINED: constraint
        for path, module in program.named_modules()
        for name, (constraint, _) in getattr(module, "_pyro_params", {}).items()
    }


def _stored(program: Any, run: Callable[[], Any], fresh: bool = False) -> tuple[Params, dict[str, Any]]:
    """The store's tensors and constraints that a run touches, apart from those of the program's own modules."""
    store = pyro.get_param_store()
    before = set(store.keys())
    own = f"{program._pyro_name}." if isinstance(program, PyroModule) and program._pyro_name else None
    with store.scope(None if fresh else store.get_state()), pyro.poutine.trace(param_only=True) as trace:
        run()
        touched = [name for name in trace.trace.nodes if not (own and name.startswith(own))]
        touched = [name for name in touched if name in store._params]
        params = {name: store._params[name] for name in touched}
        limits = {name: store._constraints[name] for name in touched}
    _refuse_modules(params)
    if not fresh and (new := sorted(set(touched) - before)):
        raise _never_fitted(program, new)
    return params, limits


def _refuse_unfitted(program: Any) -> None:
    if not is_fitted(program):
        raise _never_fitted(program, [])


class NeverFitted(ValueError):
    """A program whose parameters were never made."""


def is_fitted(program: Any) -> bool:
    """Whether an autoguide has parameters; of other programs only a run can tell."""
    return not isinstance(program, AutoGuide) or program.prototype_trace is not None or bool(list(program.parameters()))


def fresh_copy(program: Callable[..., Any]) -> Callable[..., Any]:
    """A module of its own that can be initialised; functions keep their parameters in the store."""
    return _deep_copy(program, ()) if isinstance(program, nn.Module) else program


def _never_fitted(program: Any, new: list[str]) -> NeverFitted:
    made = f": its first run made the parameters {new}" if new else ": it has no parameters yet"
    return NeverFitted(
        f"{_called(program)} was never fitted{made}. Fit it first (Pyro's SVI, or `fit_guide`), in the same process "
        "and without clearing the parameter store in between."
    )


def _refuse_modules(params: Params) -> None:
    modules = sorted({name.split(_MODULE_DIVIDER)[0] for name in params if _MODULE_DIVIDER in name})
    if modules:
        raise ValueError(
            f"`pyro.module` registered {modules} inside a function; its tensors cannot be substituted from outside. "
            "Make the program a PyroModule that holds them."
        )


def _refuse_disagreement(program: Any, found: Params) -> None:
    """Under Pyro's defaults the store's tensors are about to overwrite the module's."""
    if not isinstance(program, PyroModule) or pyro.settings.get("module_local_params"):
        return
    stored = pyro.get_param_store()._params
    for name, value in found.items():
        other = stored.get(f"{program._pyro_name}.{name.removesuffix(_UNCONSTRAINED)}")
        if other is not None and other is not value and not torch.equal(other, value):
            raise ValueError(
                f"The parameter store and {_called(program)} disagree about '{name}': another program of the same "
                "name was fitted since, and Pyro would overwrite this one at its next run. Take a posterior over "
                "before fitting the next guide, or use pyro.settings.set(module_local_params=True)."
            )


def _edited_module(module: nn.Module, params: Params, drop: tuple[Any, ...]) -> nn.Module:
    """A deep copy with new parameters and names of its own, so that the store never answers for it."""
    edited = _deep_copy(module, drop)
    suffix = uuid.uuid4().hex[:8]
    for part in edited.modules():
        if isinstance(part, PyroModule) and part._pyro_name:
            root, *rest = part._pyro_name.split(".", 1)
            part._pyro_name = ".".join([f"{root}-{suffix}", *rest])
    with torch.no_grad():
        for name, value in [*edited.named_parameters(), *edited.named_buffers()]:
            value.copy_(params[name])
    return edited


def _deep_copy(module: nn.Module, drop: tuple[Any, ...]) -> Any:
    """A deep copy without `drop`; autoguides share their model, and forget it when they are copied."""
    guides = [part for part in module.modules() if isinstance(part, AutoGuide)]
    kept = [(guide._model, guide.master) for guide in guides]
    memo: dict[int, Any] = {id(thing): _placeholder(thing) for thing in drop}
    try:
        edited = copy.deepcopy(module, memo)
    finally:
        for guide, (model, master) in zip(guides, kept, strict=True):
            guide._model, guide.master = model, master
    twins = [part for part in edited.modules() if isinstance(part, AutoGuide)]
    for twin, (model, _) in zip(twins, kept, strict=True):
        twin._model = model
    return edited


def _placeholder(thing: Any) -> Any:
    return torch.empty(thing.shape, device="meta", dtype=thing.dtype) if isinstance(thing, Tensor) else None


def _called(program: Any) -> str:
    return type(program).__name__ if isinstance(program, nn.Module) else getattr(program, "__name__", "The program")
