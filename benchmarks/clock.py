"""Time on a machine that others use too."""

import time
from collections.abc import Callable
from statistics import median
from typing import TypeVar

Value = TypeVar("Value")


def timed(function: Callable[[], Value]) -> tuple[Value, float]:
    """(what it returns, CPU seconds of this process): with one thread, wall time on a machine left alone."""
    begun = time.process_time()
    value = function()
    return value, time.process_time() - begun


def interleaved(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, one after another in every round, so that a busy minute hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(timed(function)[1])
    return {name: median(values) for name, values in seconds.items()}
