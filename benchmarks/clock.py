"""Time on a machine that others use too."""

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def timed(function: Callable[[], Value]) -> tuple[Value, float]:
    """(what it returns, CPU seconds of this process): with one thread, wall time on a machine left alone."""
    begun = time.process_time()
    value = function()
    return value, time.process_time() - begun
