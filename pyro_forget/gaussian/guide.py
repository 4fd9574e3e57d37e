"""The map between a guide's parameters and its Gaussian, found from the guide's trace."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_forget.effects.guide import Guide, GuideRun
from pyro_forget.effects.run import Latents
from pyro_forget.gaussian.coordinates import Gaussian
from pyro_forget.gaussian.maps import IDENTITY, Map, factor_map, find_loc, find_scale
from pyro_forget.gaussian.probe import Normals, Probe, base_value, close, normals_of
from pyro_forget.params import Params


@dataclass(frozen=True)
class GaussianGuide:
    """The map between a guide's parameters and its Gaussian.

    Attributes:
        transforms: from each site's unconstrained value to its support, in the order of the coordinates.
        read_loc, read_scale: parameters to coordinates.
        write_loc, write_scale: coordinates to the parameters that hold them.
        at_site: sites that the guide samples directly, which local reparametrisation can see.
        read_logs: parameters to log scales, where they are parameters themselves.
        write_logs: from locations and log scales by site to the parameters, in that case.
    """

    transforms: Mapping[str, Any]
    read_loc: Callable[[Params], Params]
    read_scale: Callable[[Params], Params | Tensor]
    write_loc: Callable[[Params], Params]
    write_scale: Callable[[Params | Tensor], Params]
    at_site: frozenset[str]
    read_logs: Callable[[Params], Params] | None = None
    write_logs: Callable[[Params, Params], Params] | None = None

    def read(self, params: Params) -> Gaussian:
        """The Gaussian that these parameters stand for; differentiable."""
        log_scale = self.read_logs(params) if self.read_logs else None
        return Gaussian(self.read_loc(params), self.read_scale(params), log_scale)

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

    def support(self, values: Params) -> Latents:
        """One draw's latents in their supports."""
        return {
            name: values[name] if _is_identity(transform) else transform(values[name])
            for name, transform in self.transforms.items()
        }

    def is_real(self, site: str) -> bool:
        """Whether the site's coordinates are its values."""
        return _is_identity(self.transforms[site])


def gaussian_guide(guide: Guide, transforms: Mapping[str, Any]) -> GaussianGuide | None:
    """See a guide as a Gaussian; None where it is not one.

    Args:
        guide: the guide.
        transforms: `biject_to` each latent's support, as the model has it.
    """
    if not guide.num_normals or not guide.guide.params:
        return None
    probe = Probe(guide)
    normals = normals_of(probe.runs[0])
    if normals is None or not probe.is_gaussian():
        return None
    layout = _layout(probe.runs[0], normals, transforms)
    if layout is None:
        return None
    is_full = any(scale.ndim == 2 for _, scale in normals.values())
    return _full(probe, layout) if is_full else _diagonal(probe, layout)


@dataclass(frozen=True)
class _Layout:
    """Where each site's coordinates stand: (Normal's name, start, unconstrained shape) by site."""

    places: dict[str, tuple[str, int, torch.Size]]
    transforms: dict[str, Any]
    at_site: frozenset[str]

    def split(self, flat: Mapping[str, Tensor]) -> Params:
        """Coordinates by site from the flattened loc or scale of each Normal."""
        return {site: _piece(flat[normal], start, shape) for site, (normal, start, shape) in self.places.items()}

    def join(self, values: Params) -> dict[str, Tensor]:
        """The inverse of `split`."""
        pieces: dict[str, list[Tensor]] = {}
        for site, (normal, _, _) in self.places.items():
            pieces.setdefault(normal, []).append(values[site].reshape(-1))
        return {normal: torch.cat(parts) if len(parts) > 1 else parts[0] for normal, parts in pieces.items()}


def _layout(run: GuideRun, normals: Normals, transforms: Mapping[str, Any]) -> _Layout | None:
    """Find the coordinates of each latent among the Normals' draws; None where they do not explain its value."""
    drawn = {site.name: base_value(site.fn, site.value).reshape(-1) for site in run.sites if site.name in normals}
    shared = [name for name in normals if name not in transforms]
    places: dict[str, tuple[str, int, torch.Size]] = {}
    cursor = 0
    for site in (site for site in run.sites if not site.auxiliary):
        if site.name not in transforms:
            return None
        coordinates = transforms[site.name].inv(site.value)
        own = [name for name in (site.name, f"{site.name}_unconstrained") if name in normals]
        if not own and len(shared) != 1:
            return None
        normal, start = (own[0], 0) if own else (shared[0], cursor)
        cursor += 0 if own else coordinates.numel()
        if not close(drawn[normal][start : start + coordinates.numel()], coordinates.reshape(-1), 1e-3):
            return None
        places[site.name] = (normal, start, coordinates.shape)
    complete = sum(shape.numel() for _, _, shape in places.values()) == sum(len(loc) for loc, _ in normals.values())
    if not complete or set(places) != set(transforms):
        return None
    real = frozenset(name for name in places if name in normals and _is_identity(transforms[name]))
    return _Layout(places, {name: transforms[name] for name in places}, real)


def _piece(flat: Tensor, start: int, shape: torch.Size) -> Tensor:
    """A site's own Normal is taken as it is: a slice would cost its gradient an array of zeros."""
    if flat.numel() == shape.numel():
        return flat if flat.shape == shape else flat.reshape(shape)
    return flat.reshape(-1)[start : start + shape.numel()].reshape(shape)


def _diagonal(probe: Probe, layout: _Layout) -> GaussianGuide | None:
    normals = {place[0] for place in layout.places.values()}
    locs = {name: found for name in sorted(normals) if (found := find_loc(probe, name))}
    scales = {name: found for name in sorted(normals) if (found := find_scale(probe, name))}
    used = [name for name, _ in (*locs.values(), *scales.values())]
    # Every Normal has its own loc and scale, and none stands for two: else there is no way back.
    if len(used) < 2 * len(normals) or len(set(used)) < len(used):
        return None
    guide = GaussianGuide(
        layout.transforms,
        lambda params: layout.split({normal: known.forward(params[name]) for normal, (name, known) in locs.items()}),
        lambda params: layout.split({normal: known.forward(params[name]) for normal, (name, known) in scales.items()}),
        lambda loc: _back(layout.join(loc), locs),
        lambda scale: _back(layout.join(_by_site(scale)), scales),
        layout.at_site,
    )
    if not all(known.is_exp for _, known in scales.values()):
        return guide
    own = {normal: (name, IDENTITY) for normal, (name, _) in scales.items()}
    return replace(
        guide,
        read_logs=lambda params: layout.split({normal: params[name] for normal, (name, _) in own.items()}),
        write_logs=lambda loc, logs: _back(layout.join(loc), locs) | _back(layout.join(logs), own),
    )


def _full(probe: Probe, layout: _Layout) -> GaussianGuide | None:
    (normal,) = {place[0] for place in layout.places.values()}
    loc, factor = find_loc(probe, normal), factor_map(probe, normal)
    if loc is None or factor is None:
        return None
    name, known = loc
    return GaussianGuide(
        layout.transforms,
        lambda params: layout.split({normal: known.forward(params[name])}),
        factor.forward,
        lambda value: {name: known.inverse(layout.join(value)[normal])},
        factor.inverse,
        frozenset(),
    )


def _back(flat: Mapping[str, Tensor], found: Mapping[str, tuple[str, Map]]) -> Params:
    return {name: known.inverse(flat[normal]) for normal, (name, known) in found.items()}


def _by_site(scale: Params | Tensor) -> Params:
    if isinstance(scale, Tensor):
        raise TypeError("A diagonal guide needs standard deviations by site, got a matrix.")
    return scale


def _is_identity(transform: Any) -> bool:
    inner = transform
    while type(inner).__name__ == "IndependentTransform":
        inner = inner.base_transform
    return getattr(inner, "parts", None) == []
