"""Modules: their tensors, the names that Pyro's store knows these by, and copies that it knows by other names."""

import copy
import uuid
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide, AutoNormalizingFlow
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_forget.params import Params

MODULE_DIVIDER = "$$$"
_UNCONSTRAINED = "_unconstrained"
_FULL_NAME = "_pyro_get_fullname"


def module_tensors(program: Any) -> tuple[Params, Params]:
    """(free, fixed) tensors of a module; a converted `AutoLaplaceApproximation` keeps loc and scale as buffers."""
    if not isinstance(program, nn.Module):
        return {}, {}
    parameters: Params = dict(program.named_parameters())
    buffers: Params = dict(program.named_buffers())
    free = {name: value for name, value in parameters.items() if value.requires_grad}
    if not parameters and isinstance(program, AutoGuide):
        free = {name: value for name, value in buffers.items() if value.is_floating_point()}
    return free, {name: value for name, value in (parameters | buffers).items() if name not in free}


def module_constraints(program: Any) -> dict[str, Any]:
    """Constraints of the `PyroParam`s of a module, by the name of their unconstrained tensor."""
    if not isinstance(program, nn.Module):
        return {}
    return {
        _joined(path, name) + _UNCONSTRAINED: constraint
        for path, module in program.named_modules()
        for name, (constraint, _) in getattr(module, "_pyro_params", {}).items()
    }


def store_names(program: Any) -> dict[str, str]:
    """By the name that Pyro's store has for it, the name of each tensor of a module."""
    found: dict[str, str] = {}
    for path, part in program.named_modules() if isinstance(program, nn.Module) else ():
        if not isinstance(part, PyroModule):
            continue
        for name, _ in part.named_parameters(recurse=False):
            found[_full_name(part, name.removesuffix(_UNCONSTRAINED))] = _joined(path, name)
        for child, module in part.named_children():
            if not isinstance(module, PyroModule):
                for name, _ in module.named_parameters():
                    found[_full_name(part, child) + MODULE_DIVIDER + name] = _joined(path, child, name)
    return found


def fresh_copy(program: Any) -> Any:
    """A module of its own that can be initialised; functions keep their parameters in the store."""
    return _deep_copy(program) if isinstance(program, nn.Module) else program


def unfitted_copy(program: Any) -> Any:
    """A program whose next run makes its parameters anew: a copy of an autoguide, a function as it is.

    Raises:
        ValueError: it is another module, whose parameters were made with it.
    """
    if not isinstance(program, nn.Module):
        return program
    if not isinstance(program, AutoGuide):
        raise ValueError(
            f"{called(program)} is a module whose parameters were made when it was, so it cannot be made anew from "
            "here. Fit a new one to the retained data: `fit_guide(model, guide, retained)`."
        )
    copied = _deep_copy(program)
    for part in [part for part in copied.modules() if isinstance(part, AutoGuide)]:
        part.prototype_trace = None
        if isinstance(part, AutoNormalizingFlow):
            part.transform = None
            # The old flow's first weight would go for one of the new; `del` would take it out of the store as well.
            part._parameters.pop("_prototype_tensor", None)
            part._prototype_tensor = torch.tensor(0.0)
    return copied


def without_rows(program: Any) -> Any:
    """A copy of an autoguide that has forgotten the arguments of its first call; other programs as they are."""
    is_autoguide = isinstance(program, nn.Module) and any(isinstance(part, AutoGuide) for part in program.modules())
    return _deep_copy(program) if is_autoguide else program


def edited_module(module: nn.Module, params: Params) -> nn.Module:
    """A deep copy with new tensors, which the store knows by new names: it would answer the old ones for itself."""
    edited = _deep_copy(module)
    suffix = uuid.uuid4().hex[:8]
    for part in edited.modules():
        if isinstance(part, PyroModule):
            part.__dict__[_FULL_NAME] = _OwnNames(part, suffix)
    with torch.no_grad():
        for name, value in [*edited.named_parameters(), *edited.named_buffers()]:
            value.copy_(params[name])
    return edited


@dataclass(frozen=True, eq=False)
class _OwnNames:
    """Stands in for a PyroModule's method that names its parts in full: parameters get a suffix, samples do not.

    The names of sample sites must stay, or a guide would draw other latents than its model has.
    """

    part: PyroModule
    suffix: str

    def __call__(self, name: str) -> str:
        full = _joined(self.part._pyro_name, name)
        part = self.part.__dict__
        owned = any(name in part[kind] for kind in ("_pyro_params", "_parameters", "_modules"))
        return f"{full}-{self.suffix}" if owned else full


def _full_name(part: PyroModule, name: str) -> str:
    """What the store calls a part of a module, also before the module's first run."""
    return part.__dict__[_FULL_NAME](name) if _FULL_NAME in part.__dict__ else _joined(part._pyro_name, name)


def _deep_copy(module: nn.Module) -> Any:
    """A deep copy without the rows that autoguides remember of their first call.

    Autoguides share their model, and forget it, and the list they are part of, when they are copied.
    """
    guides = [part for part in module.modules() if isinstance(part, AutoGuide)]
    kept = [(guide._model, guide.master) for guide in guides]
    try:
        with _WithoutGraphs():
            edited = copy.deepcopy(module, _shapes_of_rows(guides))
    finally:
        for guide, (model, master) in zip(guides, kept, strict=True):
            guide._model, guide.master = model, master
    twins = [part for part in edited.modules() if isinstance(part, AutoGuide)]
    for twin, (model, _) in zip(twins, kept, strict=True):
        twin._model = model
    return edited


class _WithoutGraphs(TorchFunctionMode):
    """Lets results be deep-copied as numbers: traces of learned priors and caches of flows hold them, with graphs.

    A cache that is left from a run under `vmap` is empty: flows look whether it belongs to what they are given.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                return memo.setdefault(id(tensor), torch.empty(0))
            if not tensor.is_leaf:
                return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def _shapes_of_rows(guides: list[AutoGuide]) -> dict[int, Any]:
    """For `copy.deepcopy`: what stands in for each call and result in the guides' prototype traces."""
    memo: dict[int, Any] = {}
    for guide in guides:
        nodes = {} if guide.prototype_trace is None else guide.prototype_trace.nodes
        for name in ("_INPUT", "_RETURN"):
            if name in nodes:
                node = nodes[name]
                memo[id(node)] = {key: _shape_of(value) for key, value in node.items()}
    return memo


def _shape_of(value: Any) -> Any:
    """Tensors without their numbers; of anything else that is no plain setting, nothing."""
    if isinstance(value, dict):
        return {key: _shape_of(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_shape_of(part) for part in value)
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return value if isinstance(value, (str, bool)) else None


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


def called(program: Any) -> str:
    """What to call a program in a message."""
    return type(program).__name__ if isinstance(program, nn.Module) else getattr(program, "__name__", "The program")


def store_wins(program: Any) -> bool:
    """Whether Pyro's store overwrites the tensors of this module."""
    return isinstance(program, nn.Module) and not pyro.settings.get("module_local_params")
