"""Settings and the command line: comma lists of a type, what `--help` says, and choices."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer

PARSERS: dict[type, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: lambda word: _finite(float(word)),
    Path: Path,
    bool: {"true": True, "false": False}.__getitem__,
}


def list_of(name: str, kind: Any) -> Callable[[str], list[Any]]:
    """A parser of comma lists of a type."""

    def parse(text: str) -> list[Any]:
        values = [_parse(word.strip(), kind) for word in text.split(",")]
        repeated = {str(value) for value in values if values.count(value) > 1}
        if repeated:
            raise typer.BadParameter(f"{', '.join(sorted(repeated))} stands twice in {text!r}: name each value once.")
        return values

    parse.__name__ = name
    return parse


def _parse(word: str, kind: Any) -> Any:
    for member in _members(kind):
        for choice in _choices(member):
            if word == _word(choice):
                return choice
    for member in _members(kind):
        try:
            return PARSERS[member](word)
        except (ValueError, KeyError):
            continue
    raise typer.BadParameter(f"{word!r} is none of {describe(kind)}.")


def _finite(number: float) -> float:
    """The number; the settings are kept as JSON, which has no NaN and no infinity."""
    if not math.isfinite(number):
        raise ValueError
    return number


def _members(kind: Any) -> tuple[Any, ...]:
    """The types of a union."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _choices(member: Any) -> tuple[Any, ...]:
    """The values that a type lists."""
    if member is NoneType:
        return (None,)
    return get_args(member) if get_origin(member) is Literal else ()


def describe(kind: Any) -> str:
    """The type in the words that `list_of` takes, such as int|none."""
    return "|".join("|".join(map(_word, _choices(member))) or member.__name__.lower() for member in _members(kind))


def _word(choice: Any) -> str:
    return "none" if choice is None else str(choice)


def check_type(field: str, kind: Any) -> None:
    """Raise TypeError for a type that has no words on a command line."""
    if not all(member in PARSERS or _choices(member) for member in _members(kind)):
        raise TypeError(
            f"The setting {field} has type {kind}, which has no words on a command line: use str, int, float, bool, "
            "Path, Literal, or a union of them with None."
        )


def option(default: Any, text: str) -> Any:
    """A setting with its default and what `--help` says of it."""
    return field(default=default, metadata={"help": text})


def check_choices(settings: Any, allowed: Mapping[str, Sequence[str]]) -> None:
    """Refuse a value that only the run would fail on.

    Raises:
        ValueError: which setting, its value, and those there are.
    """
    for name, choices in allowed.items():
        if getattr(settings, name) not in choices:
            raise ValueError(f"`{name}` is {getattr(settings, name)!r}: choose from {', '.join(choices)}.")
