"""The shapes of a model's call, for a saved posterior: made-up rows and the arguments that are not per datum."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_forget.data import MADE_UP, Batch, Data

_PREFIX = "call/"


def encode_call(batch: Batch) -> tuple[Any, dict[str, Tensor]]:
    """(JSON, tensors) of a template batch; JSON null where an argument is of a type that no file holds."""
    tensors: dict[str, Tensor] = {}

    def encode(value: Any) -> Any:
        if isinstance(value, (Tensor, np.ndarray)):
            tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
            tensors[name := f"{_PREFIX}{len(tensors)}"] = tensor
            return {"tensor": name, "array": isinstance(value, np.ndarray)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        if isinstance(value, dict):
            return {"dict": {str(key): encode(part) for key, part in value.items()}}
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
