"""Running times beside a rival's: interleaved, on one thread, compared round by round."""

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch

ROUNDS = 7


@dataclass(frozen=True)
class Race:
    """Seconds of each contender, one entry a round.

    Attributes:
        seconds: by contender. CPU seconds of this process on the CPU, which with one thread are wall time on a
            machine left alone; wall time on a device.
    """

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Median seconds."""
        return median(self.seconds[name])

    def ratio(self, name: str, rival: str) -> float:
        """Median over the rounds of seconds / the rival's seconds of the same round."""
        return median(mine / theirs for mine, theirs in zip(self.seconds[name], self.seconds[rival], strict=True))


def race(contenders: Mapping[str, Callable[[], object]], device: str = "cpu", rounds: int = ROUNDS) -> Race:
    """Run all once to warm up, then one after another in every round, so that a busy minute hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for function in contenders.values():
        function()
    for _ in range(rounds):
        for name, function in contenders.items():
            seconds[name].append(_timed(function, device))
    return Race({name: tuple(found) for name, found in seconds.items()})


def _timed(function: Callable[[], object], device: str) -> float:
    if device == "cpu":
        begun = time.process_time()
        function()
        return time.process_time() - begun
    torch.cuda.synchronize()
    begun = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for everyone: what threads gain depends on who else uses the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def devices() -> tuple[str, ...]:
    """The CPU, and a GPU where there is one."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def machine(device: str = "cpu", dtype: str = "float32") -> str:
    """What the numbers were measured on, in one line."""
    python, processor = platform.python_version(), torch.cuda.get_device_name() if device == "cuda" else _processor()
    threads = "" if device == "cuda" else f", {os.cpu_count()} cores, 1 thread"
    return f"{processor}{threads}; torch {torch.__version__}, Python {python}, {dtype}."


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
