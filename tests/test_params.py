"""Inner products of parameters, those of many draws of a network among them."""

from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pyro_forget import params as module
from pyro_forget.params import dot, norm


def made(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"long": (7, 11, 3), "turned": (50, 4), "short": (5,), "number": (), "none": (0, 3)}
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return values | {"turned": values["turned"].T}


@pytest.mark.parametrize("longest", [1, 13, 10_000])
def test_parts_add_up(longest, monkeypatch):
    monkeypatch.setattr(module, "_LONG", longest)
    left, right = made(0), made(1)
    right["turned"] = right["turned"].contiguous()
    expected = sum(float((left[name] * right[name]).sum()) for name in left)
    assert float(dot(left, right)) == pytest.approx(expected, rel=1e-12)
    assert norm(left) == pytest.approx(float(torch.cat([value.reshape(-1) for value in left.values()]).norm()))


def test_a_long_inner_product_takes_no_copy_of_what_it_is_of():
    long = torch.ones(1 << 24, dtype=torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        assert norm({"w": long}) == 2**12
    events = watch.profiler.kineto_results.events()
    moves = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    assert max(accumulate(size for _, size in moves)) < 0.5 * long.nbytes
