"""The data plate has exactly the rows of the batch, whatever size or subsampling the program asks for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor


@contextmanager
def plate_rows(name: str, indices: Tensor) -> Iterator[list[int | None]]:
    """Within the context, every plate called `name` holds `indices`, unscaled.

    A messenger that answers the plate's own sample site is not enough: a hard-coded `subsample_size` then
    contradicts it. So the plate's size is answered where Pyro decides it.

    Yields:
        The sizes that the program asked for, one for each plate made; None where it gave none.

    Raises:
        ValueError: a plate is open around the call: every site within would be broadcast over it.
    """
    for handler in _PYRO_STACK:
        if isinstance(handler, IndepMessenger):
            raise ValueError(
                f"The plate {handler.name!r} is open around this call and would be taken for part of the model: "
                "call from outside of it."
            )
    original = SubsampleMessenger._subsample
    asked: list[int | None] = []

    def subsample(plate: str, size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        if plate != name:
            return original(plate, size, *args, **kwargs)
        asked.append(None if size is None else int(size))
        return len(indices), len(indices), indices

    SubsampleMessenger._subsample = staticmethod(subsample)  # type: ignore[method-assign, assignment]
    try:
        yield asked
    finally:
        SubsampleMessenger._subsample = staticmethod(original)  # type: ignore[method-assign]
