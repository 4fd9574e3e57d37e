"""Maps from a guide's parameters to a Gaussian's loc and scale, and back, found by looking at what probes show."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import transform_to
from torch.nn.functional import softplus

from pyro_forget.gaussian.probe import Probe, close
from pyro_forget.params import Params

_NEWTON_STEPS = 60


@dataclass(frozen=True)
class Map:
    """An elementwise map of one parameter, and back.

    Attributes:
        forward, inverse: the map and the way back.
        is_exp: whether the parameter is the logarithm of its image.
    """

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    is_exp: bool = False


@dataclass(frozen=True)
class FactorMap:
    """Parameters to a Cholesky factor, and back."""

    forward: Callable[[Params], Tensor]
    inverse: Callable[[Any], Params]


IDENTITY = Map(lambda x: x, lambda y: y)
_COMMON_SCALES = (
    Map(torch.exp, torch.log, is_exp=True),
    Map(softplus, lambda y: y + torch.log(-torch.expm1(-y))),
    Map(lambda x: torch.exp(0.5 * x), lambda y: 2 * y.log()),
    IDENTITY,
)


def find_loc(probe: Probe, normal: str) -> tuple[str, Map] | None:
    """The parameter that is a Normal's loc at all probed parameters."""
    return _find(probe, probe.targets(normal, 0), lambda name: (IDENTITY,))


def find_scale(probe: Probe, normal: str) -> tuple[str, Map] | None:
    """The parameter and the map that give a Normal's scale at all probed parameters."""
    limits = probe.guide.guide.constraints

    def maps(name: str) -> tuple[Map, ...]:
        return (_constraint_map(limits[name]), *_COMMON_SCALES) if name in limits else _COMMON_SCALES

    return _find(probe, probe.targets(normal, 1), maps) or _by_root(probe, normal)


def factor_map(probe: Probe, normal: str) -> FactorMap | None:
    """L as one lower-triangular parameter, or as AutoMultivariateNormal's diagonal times a unit factor."""
    targets = probe.targets(normal, 1)
    size, own, limits = targets[0].shape[-1], probe.params[0], probe.guide.guide.constraints
    maps = {name: _constraint_map(limits[name]) if name in limits else IDENTITY for name in own}
    vectors = [name for name, value in own.items() if value.shape == (size,)]
    for square in (name for name, value in own.items() if value.shape == (size, size)):
        whole = maps[square]
        if _all_close([whole.forward(params[square]) for params in probe.params], targets):
            return _whole_map(square, whole)
        for vector in vectors:
            product = _product_map(vector, maps[vector], square, whole)
            if _all_close([product.forward(params) for params in probe.params], targets):
                return product
    return None


def _find(probe: Probe, targets: Sequence[Tensor], maps: Callable[[str], tuple[Map, ...]]) -> tuple[str, Map] | None:
    for name in _of_size(probe, targets[0].numel()):
        for candidate in maps(name):
            if _all_close([candidate.forward(params[name]).reshape(-1) for params in probe.params], targets):
                return name, candidate
    return None


def _by_root(probe: Probe, normal: str) -> tuple[str, Map] | None:
    """A scale that is some other elementwise map of one parameter: inverted by Newton's method in log scale."""
    own, targets = probe.params[0], probe.targets(normal, 1)
    for name in _of_size(probe, targets[0].numel()):

        def forward(value: Tensor, name: str = name) -> Tensor:
            return probe.normals(own | {name: value.reshape(own[name].shape)})[normal][1]

        made = [forward(params[name]) for params in probe.params]
        if not _all_close(made, targets) or close(made[0], made[1]):
            continue
        found = Map(forward, _newton_inverse(forward, own[name].reshape(-1)))
        # Only a map of each entry alone leads back to the parameter: the check refuses all others.
        try:
            if close(found.inverse(targets[1]), probe.params[1][name].reshape(-1), 1e-3):
                return name, found
        except ValueError:
            continue
    return None


def _newton_inverse(forward: Callable[[Tensor], Tensor], start: Tensor) -> Callable[[Tensor], Tensor]:
    def inverse(target: Tensor) -> Tensor:
        value = start.detach().clone().to(target)
        for _ in range(_NEWTON_STEPS):
            with torch.enable_grad():
                log_scale = forward(value.requires_grad_(True)).log()
                (slope,) = torch.autograd.grad(log_scale.sum(), value)
            gap = (target.log() - log_scale).detach()
            value = value.detach() + (gap / slope).clamp(-1.0, 1.0)
            if float(gap.abs().max()) < 4 * torch.finfo(gap.dtype).eps:
                break
        if not float(gap.abs().max()) < 1e-4:
            raise ValueError(
                f"The guide cannot have standard deviations down to {float(target.min()):g}: its map from parameters "
                "to scales does not reach them. Use exp or softplus without a floor."
            )
        return value.detach()

    return inverse


def _constraint_map(constraint: Any) -> Map:
    transform = transform_to(constraint)
    return Map(transform, transform.inv)


def _whole_map(square: str, whole: Map) -> FactorMap:
    return FactorMap(lambda params: whole.forward(params[square]), lambda factor: {square: whole.inverse(factor)})


def _product_map(vector: str, diagonal: Map, square: str, unit: Map) -> FactorMap:
    return FactorMap(
        lambda params: diagonal.forward(params[vector])[:, None] * unit.forward(params[square]),
        lambda factor: {
            vector: diagonal.inverse(factor.diagonal()),
            square: unit.inverse(factor / factor.diagonal()[:, None]),
        },
    )


def _of_size(probe: Probe, size: int) -> list[str]:
    return [name for name, value in probe.params[0].items() if value.numel() == size]


def _all_close(made: Sequence[Tensor], targets: Sequence[Tensor]) -> bool:
    return all(close(value, target) for value, target in zip(made, targets, strict=True))
