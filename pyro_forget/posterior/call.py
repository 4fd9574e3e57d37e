"""What a saved posterior knows of its model: the shapes of its call, and its learned parameters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_forget.data import MADE_UP, Batch, Data
from pyro_forget.effects.program import Program
from pyro_forget.params import Params

_CALL = "call/"
_FIXED = "model/"


def encode_program(program: Program) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(header, tensors) of a model, apart from its code and its free parameters."""
    call, tensors = encode_call(program.template)
    header = {
        "plate": program.plate,
        "indexed": program.indexed,
        "minibatch_of": program.minibatch_of,
        "call": call,
        "free": list(program.model.free),
    }
    return header, tensors | {_FIXED + name: value for name, value in program.model.fixed.items()}


def decode_program(
    header: dict[str, Any],
    tensors: dict[str, Tensor],
    path: str | Path,
    model: Callable[..., Any],
    data: Data | None,
    free: Params,
) -> Program:
    """The program again, with these free parameters.

    Raises:
        ValueError: the model has other parameters, or nothing says what its call looks like.
    """
    template = decode_call(header["call"], tensors, path, data)
    held = {name.removeprefix(_FIXED): value for name, value in tensors.items() if name.startswith(_FIXED)} | free
    settings = header["plate"], header["indexed"], template, header["minibatch_of"]
    return Program.rebuilt(model, *settings, header["free"], held)


def beside(tensors: dict[str, Tensor], data: Data | None) -> dict[str, Tensor]:
    """The tensors of a file where the data's batches are, on the CPU without data; ids stay on the CPU, as ever."""
    if data is None:
        return tensors
    call = data.template()
    leaves = torch.utils._pytree.tree_leaves((call.args, call.kwargs))
    devices = [data.device, *(leaf.device for leaf in leaves if isinstance(leaf, Tensor))]
    device = next((device for device in devices if device is not None), None)
    return {name: value if name == "ids" else value.to(device) for name, value in tensors.items()}


def refuse_other_ids(data: Data, ids: Tensor, path: str | Path) -> None:
    """Raise where the rows that a posterior is loaded with are not its own."""
    if not torch.equal(data.ids.sort().values, ids.sort().values):
        raise ValueError(f"`data` has other ids than the posterior in {path}: pass the rows it was fitted to.")


def encode_call(batch: Batch) -> tuple[Any, dict[str, Tensor]]:
    """(JSON, tensors) of a template batch; JSON null where an argument is of a type that no file holds."""
    tensors: dict[str, Tensor] = {}

    def encode(value: Any) -> Any:
        if isinstance(value, (Tensor, np.ndarray)):
            tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
            tensors[name := f"{_CALL}{len(tensors)}"] = tensor
            return {"tensor": name, "array": isinstance(value, np.ndarray)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {"dict": {key: encode(part) for key, part in value.items()}}
        if type(value) in (tuple, list):
            return {type(value).__name__: [encode(part) for part in value]}
        raise TypeError(type(value).__name__)

    try:
        return {"args": encode(batch.args), "kwargs": encode(batch.kwargs)}, tensors
    except TypeError:
        return None, {}


def decode_call(call: Any, tensors: dict[str, Tensor], path: str | Path, data: Data | None) -> Batch:
    """The template batch again; from `data` where the file holds none.

    Raises:
        ValueError: neither holds it.
    """
    if data is not None:
        return data.template()
    if call is None:
        raise ValueError(f"{path} does not hold the shapes of the model's arguments: pass `data` to load it.")

    def decode(value: Any) -> Any:
        ((kind, content),) = [(key, part) for key, part in value.items() if key != "array"]
        if kind == "tensor":
            return tensors[content].numpy() if value["array"] else tensors[content]
        if kind == "dict":
            return {key: decode(part) for key, part in content.items()}
        if kind in ("tuple", "list"):
            return {"tuple": tuple, "list": list}[kind](decode(part) for part in content)
        return content

    return Batch(
        decode(call["args"]),
        decode(call["kwargs"]),
        torch.tensor([MADE_UP, MADE_UP]),
        torch.zeros(2, dtype=torch.int64),
    )
