"""Files that are written whole or not at all, and that say when they were damaged.

Tensors travel as safetensors, everything else as JSON; nothing here can run code that a file brings along.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "pyro-forget 1"


def atomic_write(path: str | Path, writer: Callable[[Path], object]) -> Path:
    """Write a file so that a reader finds the old one or the new one, never a part of it.

    Args:
        path: the file to be; its folder must exist.
        writer: writes the whole file at the path it is given, which lies in the same folder and has the same suffix.

    Returns:
        `path`.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder of {path} does not exist: create {path.parent} first.")
    beside = path.with_name(f".{path.stem}-{uuid4().hex}{path.suffix}")
    try:
        writer(beside)
        _flush(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _flush(path.parent)
    return path


def save_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON.

    Raises:
        ValueError: a number in it is NaN or infinite, for which JSON has no word.
        TypeError: something in it is no JSON type.
    """
    text = json.dumps(_checked(value), indent=2, ensure_ascii=False) + "\n"
    return atomic_write(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def load_json(path: str | Path) -> Any:
    """Read what `save_json` wrote.

    Raises:
        ValueError: the file is no JSON, or holds NaN or an infinity.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_reject_constant)
    except ValueError as error:
        raise ValueError(
            f"{path} is not the JSON it should be ({error}): write it again, or restore a copy."
        ) from error


def save_tensors(path: str | Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> Path:
    """Write named tensors and a JSON header as one safetensors file that carries their `digest`."""
    whole = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    metadata = {"format": FORMAT, "header": _canonical(header), "sha256": digest(whole, header)}
    return atomic_write(path, lambda beside: save_file(whole, beside, metadata=metadata))


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: the tensors, on the CPU, and the header.

    Raises:
        ValueError: the file was cut off, was changed since it was written, or comes from another program.
    """
    tensors, metadata = _read_safetensors(Path(path))
    written = metadata.get("format", "")
    if written != FORMAT:
        raise ValueError(
            f"{path} was not written by this version of pyro-forget: its format is {written or 'not given'!r}, "
            f"{FORMAT!r} was expected. Load it with the program that wrote it."
        )
    header = _parsed(metadata.get("header", ""))
    found, recorded = digest(tensors, header), metadata.get("sha256", "")
    if found != recorded:
        raise ValueError(
            f"{path} was damaged or changed after it was written: its SHA-256 is {found[:12]}…, {recorded[:12]}… was "
            "recorded. Restore a copy, or save the posterior again."
        )
    return tensors, header


def digest(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    """SHA-256, in hex, over the header and over the tensors' names, types, shapes and bytes.

    It depends on neither the order of the names, nor the device, nor the machine's byte order.
    """
    names = sorted(tensors)
    shapes = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    # The shapes say how many bytes each tensor has, so two different inputs never give the same stream.
    hasher = hashlib.sha256(_canonical({"header": header, "tensors": shapes}).encode())
    for name in names:
        hasher.update(_little_endian_bytes(tensors[name]))
    return hasher.hexdigest()


def _flush(path: Path) -> None:
    """Wait until the file or folder is on the disk, not only in the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _canonical(value: Any) -> str:
    return json.dumps(_checked(value), sort_keys=True, separators=(",", ":"))


def _checked(value: Any) -> Any:
    """`value`, if JSON can say all of it."""
    for where, offender, advice in _offenders(value, ""):
        kind = ValueError if isinstance(offender, float) else TypeError
        raise kind(f"{where or 'The value'} cannot be written as JSON: it is {offender!r:.60}. {advice}")
    return value


def _offenders(value: Any, where: str) -> Iterator[tuple[str, Any, str]]:
    """The parts of `value` that JSON cannot say: where, what, and what to do."""
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                yield f"The key {key!r} of {where or 'the value'}", key, "Use a string."
            yield from _offenders(part, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _offenders(part, f"{where}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield where, value, "Write None where there is no number."
    elif not (value is None or isinstance(value, str | int)):
        yield where, value, "Turn tensors and arrays into numbers or lists first."


def _parsed(header: str) -> Any:
    """The header, or None where it is no JSON: its digest then tells that the file was damaged."""
    try:
        return json.loads(header, parse_constant=_reject_constant)
    except ValueError:
        return None


def _reject_constant(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which JSON does not have")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            # A copy: what safe_open gives is a view of the file, which another program may shorten.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as a safetensors file of {path.stat().st_size} bytes ({error}): it was cut off, "
            "or another program wrote it. Restore a copy, or save the posterior again."
        ) from error


def _little_endian_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    octets = flat.view(torch.uint8)
    if sys.byteorder == "big":
        octets = octets.reshape(-1, flat.element_size()).flip(1).reshape(-1)
    return octets.numpy().data
