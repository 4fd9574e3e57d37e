"""Runs of a guide that show what it draws from, and how that follows from its parameters."""

from typing import Any

import torch
from torch import Tensor

from pyro_forget.effects.guide import Guide, GuideRun
from pyro_forget.effects.noise import seeded
from pyro_forget.params import Params

Normals = dict[str, tuple[Tensor, Tensor]]


class Probe:
    """Runs of a guide at its own parameters and at changed ones, with two noises each."""

    def __init__(self, guide: Guide) -> None:
        generator = seeded(torch.device("cpu"), 0)
        self.guide, own = guide, guide.guide.params

        def changed() -> Params:
            noise = {k: torch.randn(v.shape, generator=generator, dtype=torch.float64) for k, v in own.items()}
            return {k: v + 0.1 * noise[k].to(v) for k, v in own.items()}

        self.params = [own, changed(), changed()]
        size = guide.num_normals or 0
        device = next(iter(own.values())).device
        noises = [torch.randn(size, generator=generator).to(device) for _ in range(2)]
        with torch.no_grad():
            self.runs = [guide.run(params, noise) for params in self.params for noise in noises]

    def targets(self, normal: str, part: int) -> list[Tensor]:
        """Loc (part 0) or scale (part 1) of a Normal at each of the probed parameters."""
        return [(normals_of(run) or {})[normal][part] for run in self.runs[::2]]

    def normals(self, params: Params) -> Normals:
        """(loc, scale or L) of each Normal; differentiable."""
        noise = torch.zeros(self.guide.num_normals or 0, device=next(iter(params.values())).device)
        return normals_of(self.guide.run(params, noise)) or {}

    def is_gaussian(self) -> bool:
        """Whether all draws are from Normals whose loc and scale are the same whatever was drawn."""
        found = [normals_of(run) for run in self.runs]
        return all(_same(first, second) for first, second in zip(found[::2], found[1::2], strict=True))


def normals_of(run: GuideRun) -> Normals | None:
    """(loc, scale or L) of every Normal that a guide draws from, flattened; None if it draws from anything else."""
    found: Normals = {}
    for site in run.sites:
        fn = _unwrapped(site.fn)
        if type(fn).__name__ == "Delta":
            continue
        if hasattr(fn, "base_dist"):
            fn = _unwrapped(fn.base_dist)
        kind = type(fn).__name__
        if kind == "MultivariateNormal" and fn.loc.ndim == 1:
            found[site.name] = (fn.loc, fn.scale_tril)
        elif kind == "Normal":
            loc, scale = torch.broadcast_tensors(fn.loc, fn.scale)
            shape = base_value(site.fn, site.value).shape
            shape = shape if loc.numel() < shape.numel() else loc.shape
            found[site.name] = (loc.expand(shape).reshape(-1), scale.expand(shape).reshape(-1))
        else:
            return None
    if any(scale.ndim == 2 for _, scale in found.values()) and len(found) > 1:
        return None
    return found


def base_value(fn: Any, value: Tensor) -> Tensor:
    """What the Normal at the bottom of a transformed distribution drew."""
    for transform in reversed(getattr(_unwrapped(fn), "transforms", ())):
        value = transform.inv(value)
    return value


def close(left: Tensor, right: Tensor, rtol: float | None = None) -> bool:
    """Whether they agree to what their type can tell apart, 1e-5 or 1e-10, relatively."""
    precise = torch.float64 in (left.dtype, right.dtype) and left.dtype == right.dtype
    tolerance = rtol or (1e-10 if precise else 1e-5)
    same_shape = left.shape == right.shape
    return same_shape and bool(torch.allclose(left, right.to(left), rtol=tolerance, atol=1e-2 * tolerance))


def _same(first: Normals | None, second: Normals | None) -> bool:
    if first is None or second is None or first.keys() != second.keys():
        return False
    return all(close(mine, theirs) for name in first for mine, theirs in zip(first[name], second[name], strict=True))


def _unwrapped(fn: Any) -> Any:
    while type(fn).__name__ in ("Independent", "ExpandedDistribution", "MaskedDistribution"):
        fn = fn.base_dist
    return fn
