"""Torch's random state, left as it was found."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def forked_rng(seed: int | None = None) -> Iterator[None]:
    """Whatever is drawn within leaves no trace outside, on any device; `seed` starts it anew.

    Devices are named, for `fork_rng` warns where it has to guess among several; none is woken up.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield
