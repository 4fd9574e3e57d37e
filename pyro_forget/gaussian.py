"""A guide seen as one Gaussian over the unconstrained latents, and written back.

Forgetting works on the Gaussian's own coordinates, location and scale; the guide's parameters are only a map to them
(softplus or exp, one vector or many sites). The map is found from the guide's trace by changing the parameters and
looking at what the trace's Normals do.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_forget.effects.guide import Guide, GuideRun
from pyro_forget.effects.noise import seeded
from pyro_forget.effects.run import Latents
from pyro_forget.params import Params, flatten, unflatten

_RTOL = 1e-5


@dataclass(frozen=True)
class Gaussian:
    """N(loc, LLᵀ) over the unconstrained latents.

    Attributes:
        loc: by site, of the site's unconstrained shape.
        scale: standard deviations by site, or the Cholesky factor L of shape (d, d) over the flattened sites.
    """

    loc: Params
    scale: Params | Tensor

    @property
    def is_diagonal(self) -> bool:
        """Whether the sites' entries are independent."""
        return not isinstance(self.scale, Tensor)

    @property
    def variance(self) -> Params:
        """Marginal variances by site."""
        if isinstance(self.scale, Tensor):
            return unflatten(self.scale.square().sum(-1), self.loc)
        return {name: value.square() for name, value in self.scale.items()}

    def deviation(self, site: str) -> Tensor:
        """Marginal standard deviations of one site."""
        return self.variance[site].sqrt() if isinstance(self.scale, Tensor) else self.scale[site]

    def log_det(self) -> Tensor:
        """log |L|, scalar."""
        if isinstance(self.scale, Tensor):
            return self.scale.diagonal().log().sum()
        return torch.stack([value.log().sum() for value in self.scale.values()]).sum()

    def entropy(self) -> Tensor:
        """In nats, scalar."""
        size = sum(value.numel() for value in self.loc.values())
        return self.log_det() + 0.5 * size * (1 + math.log(2 * math.pi))

    def at(self, noise: Tensor) -> Params:
        """loc + L·noise by site, for noise of shape (draws, d); each of shape (draws, *site)."""
        if isinstance(self.scale, Tensor):
            return _split_rows(flatten(self.loc) + noise @ self.scale.mT, self.loc)
        steps = _split_rows(noise, self.loc)
        return {name: torch.addcmul(self.loc[name], steps[name], self.scale[name]) for name in self.loc}

    def root(self, vector: Params) -> Params:
        """L·vector."""
        if isinstance(self.scale, Tensor):
            return unflatten(self.scale @ flatten(vector), self.loc)
        return {name: value * vector[name] for name, value in self.scale.items()}

    def root_transposed(self, vector: Params) -> Params:
        """Lᵀ·vector."""
        if isinstance(self.scale, Tensor):
            return unflatten(self.scale.mT @ flatten(vector), self.loc)
        return self.root(vector)

    def detach(self) -> "Gaussian":
        """The same numbers without their graph."""
        scale = self.scale.detach() if isinstance(self.scale, Tensor) else _detached(self.scale)
        return Gaussian(_detached(self.loc), scale)

    def flat(self) -> tuple[Tensor, Tensor]:
        """(loc of shape (d,), scale of shape (d,) or (d, d)), float64."""
        scale = self.scale if isinstance(self.scale, Tensor) else flatten(self.scale)
        return flatten(self.loc).double(), scale.double()


@dataclass(frozen=True)
class GaussianGuide:
    """The map between a guide's parameters and its Gaussian.

    Attributes:
        transforms: from each site's unconstrained value to its support, in the order of the coordinates.
        read_loc, read_scale: parameters to coordinates.
        write_loc, write_scale: coordinates to the parameters that hold them.
        at_site: sites that the guide samples directly, which local reparametrisation can see.
    """

    transforms: Mapping[str, Any]
    read_loc: Callable[[Params], Params]
    read_scale: Callable[[Params], Params | Tensor]
    write_loc: Callable[[Params], Params]
    write_scale: Callable[[Params | Tensor], Params]
    at_site: frozenset[str]

    def read(self, params: Params) -> Gaussian:
        """The Gaussian that these parameters stand for; differentiable."""
        return Gaussian(self.read_loc(params), self.read_scale(params))

    def write(self, params: Params, gaussian: Gaussian) -> Params:
        """`params` with the entries that hold `gaussian` replaced."""
        written = params | self.write_loc(gaussian.loc) | self.write_scale(gaussian.scale)
        return {name: written[name].to(value.dtype).reshape(value.shape) for name, value in params.items()}

    def constrain(self, values: Params) -> tuple[Latents, Tensor]:
        """One draw's latents in their supports and Σ log |dθ/du|, scalar."""
        latents = dict(values)
        log_det = next(iter(values.values())).new_zeros(())
        for name, transform in self.transforms.items():
            if not _is_identity(transform):
                latents[name] = transform(values[name])
                log_det = log_det + transform.log_abs_det_jacobian(values[name], latents[name]).sum()
        return latents, log_det

    def is_real(self, site: str) -> bool:
        """Whether the site's coordinates are its values."""
        return _is_identity(self.transforms[site])


def gaussian_guide(guide: Guide, transforms: Mapping[str, Any]) -> GaussianGuide | None:
    """See a guide as a Gaussian; None where it is not one.

    Args:
        guide: the guide.
        transforms: `biject_to` each latent's support, as the model has it.
    """
    if guide.num_normals is None or not guide.num_normals:
        return None
    probe = _Probe(guide)
    normals = _normals(probe.runs[0])
    if normals is None or any(_normals(run) is None for run in probe.runs):
        return None
    layout = _layout(probe.runs[0], normals, transforms)
    if layout is None or not _noise_free(probe):
        return None
    return _full(probe, layout) if _is_full(normals) else _diagonal(probe, layout)


@dataclass(frozen=True)
class _Layout:
    """Where each site's coordinates stand: (Normal's name, start, unconstrained shape) by site."""

    places: dict[str, tuple[str, int, torch.Size]]
    transforms: dict[str, Any]
    at_site: frozenset[str]

    def split(self, flat: Mapping[str, Tensor]) -> Params:
        """Coordinates by site from the flattened loc or scale of each Normal."""
        return {
            site: flat[normal].reshape(-1)[start : start + shape.numel()].reshape(shape)
            for site, (normal, start, shape) in self.places.items()
        }

    def join(self, values: Params) -> dict[str, Tensor]:
        """The inverse of `split`."""
        pieces: dict[str, list[Tensor]] = {}
        for site, (normal, _, _) in self.places.items():
            pieces.setdefault(normal, []).append(values[site].reshape(-1))
        return {normal: torch.cat(parts) if len(parts) > 1 else parts[0] for normal, parts in pieces.items()}


class _Probe:
    """Runs of a guide at its own parameters and at changed ones, with two noises each."""

    def __init__(self, guide: Guide) -> None:
        generator = seeded(torch.device("cpu"), 0)
        self.guide, own = guide, guide.guide.params

        def changed() -> Params:
            noise = {k: torch.randn(v.shape, generator=generator, dtype=torch.float64) for k, v in own.items()}
            return {k: v + 0.1 * noise[k].to(v) for k, v in own.items()}

        self.params = [own, changed(), changed()]
        size = guide.num_normals or 0
        noises = [torch.randn(size, generator=generator), torch.randn(size, generator=generator)]
        with torch.no_grad():
            self.runs = [guide.run(params, noise) for params in self.params for noise in noises]

    def read(self, params: Params) -> dict[str, tuple[Tensor, Tensor]]:
        """(loc, scale or L) of each Normal."""
        device = next(iter(params.values())).device
        run = self.guide.run(params, torch.zeros(self.guide.num_normals or 0, device=device))
        return _normals(run) or {}


def _normals(run: GuideRun) -> dict[str, tuple[Tensor, Tensor]] | None:
    """(loc, scale) of every Normal that a guide draws from, flattened; None if it draws from anything else."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for site in run.sites:
        fn = _unwrapped(site.fn)
        kind = type(fn).__name__
        if kind == "Delta":
            continue
        if kind in ("TransformedDistribution", "LogNormal"):
            fn = _unwrapped(fn.base_dist)
            kind = type(fn).__name__
        if kind == "MultivariateNormal" and fn.loc.ndim == 1:
            found[site.name] = (fn.loc, fn.scale_tril)
        elif kind == "Normal":
            loc, scale = torch.broadcast_tensors(fn.loc, fn.scale)
            shape = site.value.shape if loc.numel() < site.value.numel() else loc.shape
            found[site.name] = (loc.expand(shape).reshape(-1), scale.expand(shape).reshape(-1))
        else:
            return None
    if any(scale.ndim == 2 for _, scale in found.values()) and len(found) > 1:
        return None
    return found


def _unwrapped(fn: Any) -> Any:
    while type(fn).__name__ in ("Independent", "ExpandedDistribution", "MaskedDistribution"):
        fn = fn.base_dist
    return fn


def _is_full(normals: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
    return any(scale.ndim == 2 for _, scale in normals.values())


def _layout(run: GuideRun, normals: Mapping[str, Any], transforms: Mapping[str, Any]) -> _Layout | None:
    """Find the coordinates of each latent among the Normals' draws; None where they do not explain its value."""
    values = {site.name: site.value.reshape(-1) for site in run.sites}
    places: dict[str, tuple[str, int, torch.Size]] = {}
    at_site = set()
    shared = [name for name in normals if name not in transforms]
    cursor = 0
    for site in run.sites:
        if site.auxiliary:
            continue
        if site.name not in transforms:
            return None
        coordinates = transforms[site.name].inv(site.value)
        if site.name in normals:
            normal, start = site.name, 0
            at_site.add(site.name)
        elif f"{site.name}_unconstrained" in normals:
            normal, start = f"{site.name}_unconstrained", 0
        elif len(shared) == 1:
            normal, start = shared[0], cursor
            cursor += coordinates.numel()
        else:
            return None
        source = coordinates.reshape(-1) if normal == site.name else values[normal][start : start + coordinates.numel()]
        if source.shape != coordinates.reshape(-1).shape or not _close(source, coordinates.reshape(-1), 1e-3):
            return None
        places[site.name] = (normal, start, coordinates.shape)
    ordered = {name: transforms[name] for name in places}
    complete = sum(shape.numel() for _, _, shape in places.values()) == sum(len(loc) for loc, _ in normals.values())
    real = frozenset(name for name in at_site if _is_identity(transforms[name]))
    return _Layout(places, ordered, real) if complete and set(places) == set(transforms) else None


def _noise_free(probe: _Probe) -> bool:
    """Whether loc and scale are the same whatever was drawn."""
    for first, second in zip(probe.runs[::2], probe.runs[1::2], strict=True):
        mine, theirs = _normals(first) or {}, _normals(second) or {}
        if any(not _close(mine[name][part], theirs[name][part]) for name in mine for part in (0, 1)):
            return False
    return True


def _diagonal(probe: _Probe, layout: _Layout) -> GaussianGuide | None:
    locs = {normal: _find(probe, normal, 0, _loc_maps(probe)) for normal in {p[0] for p in layout.places.values()}}
    scales = {normal: _find(probe, normal, 1, _scale_maps(probe)) for normal in locs}
    if any(found is None for found in [*locs.values(), *scales.values()]):
        return None
    used = [found[0] for found in [*locs.values(), *scales.values()] if found]
    if len(set(used)) < len(used):
        return None
    return GaussianGuide(
        layout.transforms,
        lambda params: layout.split({n: m.forward(params[name]) for n, (name, m) in _items(locs)}),
        lambda params: layout.split({n: m.forward(params[name]) for n, (name, m) in _items(scales)}),
        lambda loc: _back(layout.join(loc), locs),
        lambda scale: _back(layout.join(_by_site(scale)), scales),
        layout.at_site,
    )


def _full(probe: _Probe, layout: _Layout) -> GaussianGuide | None:
    (normal,) = {place[0] for place in layout.places.values()}
    loc = _find(probe, normal, 0, _loc_maps(probe))
    factor = _factor_map(probe, normal)
    if loc is None or factor is None:
        return None
    name, loc_map = loc
    return GaussianGuide(
        layout.transforms,
        lambda params: layout.split({normal: loc_map.forward(params[name])}),
        factor.forward,
        lambda value: {name: loc_map.inverse(layout.join(value)[normal])},
        factor.inverse,
        frozenset(),
    )


@dataclass(frozen=True)
class _Map:
    """An elementwise map of one parameter, and back."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _FactorMap:
    """Parameters to a Cholesky factor, and back."""

    forward: Callable[[Params], Tensor]
    inverse: Callable[[Any], Params]


_IDENTITY = _Map(lambda x: x, lambda y: y)
_COMMON_SCALES = (
    _Map(torch.exp, torch.log),
    _Map(torch.nn.functional.softplus, lambda y: y + torch.log(-torch.expm1(-y))),
    _Map(lambda x: torch.exp(0.5 * x), lambda y: 2 * y.log()),
    _IDENTITY,
)


def _loc_maps(probe: _Probe) -> Callable[[str], tuple[_Map, ...]]:
    return lambda name: (_IDENTITY,)


def _scale_maps(probe: _Probe) -> Callable[[str], tuple[_Map, ...]]:
    limits = probe.guide.guide.constraints

    def maps(name: str) -> tuple[_Map, ...]:
        return ((_constraint_map(limits[name]), *_COMMON_SCALES)) if name in limits else _COMMON_SCALES

    return maps


def _constraint_map(constraint: Any) -> _Map:
    transform = transform_to(constraint)
    return _Map(transform, transform.inv)


def _find(
    probe: _Probe, normal: str, part: int, maps: Callable[[str], tuple[_Map, ...]]
) -> tuple[str, _Map] | None:
    """The parameter and map that give a Normal's loc (part 0) or scale (part 1) at all probed parameters."""
    targets = [(_normals(run) or {})[normal][part] for run in probe.runs[::2]]
    names = [name for name, value in probe.params[0].items() if value.numel() == targets[0].numel()]
    for name in names:
        for candidate in maps(name):
            made = [candidate.forward(params[name]).reshape(-1) for params in probe.params]
            if all(_close(value, target) for value, target in zip(made, targets, strict=True)):
                return name, candidate
    return _by_root(probe, normal, names) if part == 1 else None


def _by_root(probe: _Probe, normal: str, names: list[str]) -> tuple[str, _Map] | None:
    """A scale that is some other elementwise map of one parameter: inverted by Newton's method in log scale."""
    own = probe.params[0]
    targets = [(_normals(run) or {})[normal][1] for run in probe.runs[::2]]
    for name in names:

        def forward(value: Tensor, name: str = name) -> Tensor:
            return probe.read(own | {name: value.reshape(own[name].shape)})[normal][1]

        made = [forward(params[name]) for params in probe.params]
        if not all(_close(value, target) for value, target in zip(made, targets, strict=True)):
            continue
        if made[0].allclose(made[1]):
            continue
        start = own[name].reshape(-1)
        found = _Map(forward, lambda target, forward=forward, start=start: _newton_inverse(forward, target, start))  # type: ignore[misc]
        if _close(found.inverse(targets[1]), probe.params[1][name].reshape(-1), 1e-3):
            return name, found
    return None


def _newton_inverse(forward: Callable[[Tensor], Tensor], target: Tensor, start: Tensor) -> Tensor:
    value = start.detach().clone().to(target.device)
    for _ in range(60):
        value.requires_grad_(True)
        log_scale = forward(value).log()
        (slope,) = torch.autograd.grad(log_scale.sum(), value)
        gap = (target.log() - log_scale).detach()
        value = value.detach() + (gap / slope).clamp(-1.0, 1.0)
        if float(gap.abs().max()) < 1e-12:
            break
    return value.detach()


def _factor_map(probe: _Probe, normal: str) -> _FactorMap | None:
    """L as one lower-triangular parameter, or as AutoMultivariateNormal's diagonal times a unit factor."""
    targets = [(_normals(run) or {})[normal][1] for run in probe.runs[::2]]
    size = targets[0].shape[-1]
    limits = probe.guide.guide.constraints
    maps = {name: [_constraint_map(limits[name])] if name in limits else [_IDENTITY] for name in probe.params[0]}
    squares = [name for name, value in probe.params[0].items() if value.shape == (size, size)]
    vectors = [name for name, value in probe.params[0].items() if value.shape == (size,)]
    for square in squares:
        (whole,) = maps[square]
        if all(_close(whole.forward(p[square]), t) for p, t in zip(probe.params, targets, strict=True)):
            return _FactorMap(
                lambda params, n=square, m=whole: m.forward(params[n]),  # type: ignore[misc]
                lambda factor, n=square, m=whole: {n: m.inverse(factor)},  # type: ignore[misc]
            )
        for vector in vectors:
            (diagonal,) = maps[vector]
            made = [diagonal.forward(p[vector])[:, None] * whole.forward(p[square]) for p in probe.params]
            if all(_close(value, target) for value, target in zip(made, targets, strict=True)):
                return _product_map(vector, diagonal, square, whole)
    return None


def _product_map(vector: str, diagonal: _Map, square: str, unit: _Map) -> _FactorMap:
    return _FactorMap(
        lambda params: diagonal.forward(params[vector])[:, None] * unit.forward(params[square]),
        lambda factor: {
            vector: diagonal.inverse(factor.diagonal()),
            square: unit.inverse(factor / factor.diagonal()[:, None]),
        },
    )


def _items(found: Mapping[str, tuple[str, _Map] | None]) -> list[tuple[str, tuple[str, _Map]]]:
    return [(normal, pair) for normal, pair in found.items() if pair is not None]


def _back(flat: Mapping[str, Tensor], found: Mapping[str, tuple[str, _Map] | None]) -> Params:
    return {name: known.inverse(flat[normal]) for normal, (name, known) in _items(found)}


def _by_site(scale: Params | Tensor) -> Params:
    if isinstance(scale, Tensor):
        raise TypeError("A diagonal guide needs standard deviations by site, got a matrix.")
    return scale


def _split_rows(rows: Tensor, like: Params) -> Params:
    pieces = rows.split([value.numel() for value in like.values()], dim=-1)
    return {
        name: piece.reshape(rows.shape[0], *value.shape)
        for (name, value), piece in zip(like.items(), pieces, strict=True)
    }


def _detached(params: Params) -> Params:
    return {name: value.detach() for name, value in params.items()}


def _is_identity(transform: Any) -> bool:
    inner = transform
    while type(inner).__name__ == "IndependentTransform":
        inner = inner.base_transform
    return getattr(inner, "parts", None) == []


def _close(left: Tensor, right: Tensor, rtol: float = _RTOL) -> bool:
    return left.shape == right.shape and bool(torch.allclose(left, right.to(left), rtol=rtol, atol=1e-7))
