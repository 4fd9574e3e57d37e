"""The last layer of a network: the parameters that its output is affine in while the others stand still."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_forget.curvature.natural import Natural, natural_of
from pyro_forget.data import Batch, Data
from pyro_forget.effects.program import Run, quiet
from pyro_forget.energy.points import Points, over_points
from pyro_forget.params import Params, axpy

PROBED_ROWS = 16
_SHARED = -1
_STRETCH = 2.0  # of a probe, in root mean squares of the entries: far enough to cross the kinks of a body
_RTOL = 2e-3  # of a move, what counts as affine; a body's bends are of order one


class NoLastLayer(ValueError):
    """The model has no last layer that can be solved on its own."""


@dataclass(frozen=True)
class LastLayer:
    """Which entries feed which unit.

    Attributes:
        units: for each name, the unit that an entry feeds, of the entry's shape; −1 for one that feeds several.
        others: names that move the output in other ways: the body.
        num_units: of the output.
        kind: of the likelihood.
    """

    units: Mapping[str, Tensor]
    others: tuple[str, ...]
    num_units: int
    kind: str

    def order(self) -> Tensor:
        """Places of the entries in the joined vector, (unit, feature).

        Raises:
            NoLastLayer: the units do not see as many features each.
        """
        flat = torch.cat([value.reshape(-1) for value in self.units.values()])
        places = [torch.nonzero(flat == unit)[:, 0] for unit in range(self.num_units)]
        if bool((flat == _SHARED).any()) or len({len(place) for place in places}) != 1:
            raise NoLastLayer(
                "The output layer's units share weights or have different numbers of them: it cannot be solved as one "
                "linear map of features. Use `PairedDescent(head_start=False)`."
            )
        return torch.stack(places)


@dataclass(frozen=True)
class Features:
    """What the last layer sees and says of some rows, under one draw of the noise.

    Attributes:
        phi: (row, feature).
        natural: its output at the origin, and the data.
    """

    phi: Tensor
    natural: Natural


def find_last_layer(points: Points, point: Params, batch: Batch, seed: int = 0) -> LastLayer | None:
    """Probe which names the output is jointly affine in, from the last to the first; None where there is none.

    Names that move a Normal's scale are left out: its energy is not convex in them.
    """
    noise = points.noise(batch, seed)
    generator = torch.Generator().manual_seed(seed)
    chosen: list[str] = []
    others: list[str] = []
    for name in reversed(point):
        moved, affine = _probe(points, point, (*chosen, name), batch, noise, generator)
        if not affine:
            others.append(name)
        # Beside others that move the output, a name that does not would pass for affine.
        elif moved and (not chosen or _probe(points, point, (name,), batch, noise, generator)[0]):
            chosen.append(name)
    if not chosen:
        return None
    names = tuple(name for name in point if name in chosen)
    kind = natural_at(points, point, batch, noise).kind
    units, num_units = _units(points, point, names, batch, noise, kind == "Categorical")
    return LastLayer(units, tuple(reversed(others)), num_units, kind)


def joined(parts: Sequence[Features]) -> Features:
    """The rows of all parts."""
    naturals = [part.natural for part in parts]
    scales = [natural.log_scale for natural in naturals if natural.log_scale is not None]
    natural = Natural(
        naturals[0].kind,
        torch.cat([natural.output for natural in naturals]),
        torch.cat([natural.target for natural in naturals]),
        torch.cat(scales) if scales else None,
        torch.cat([natural.weight for natural in naturals]),
    )
    return Features(torch.cat([part.phi for part in parts]), natural)


def features(points: Points, point: Params, layer: LastLayer, batch: Batch, seed: int) -> Features:
    """Φ with output = output₀ + Φ·stepᵀ, found in one pass by letting each unit carry another feature.

    Raises:
        NoLastLayer: the units do not see the same features.
    """
    noise = points.noise(batch, seed)
    order = layer.order().to(next(iter(point.values())).device)
    is_softmax = layer.kind == "Categorical"
    # A softmax shows differences of logits only: one unit stands still for the others to be measured against.
    carriers = list(range(int(is_softmax), layer.num_units))
    num_features, like = order.shape[1], next(iter(point.values()))
    steps = torch.zeros(2 - (-num_features // len(carriers)), order.numel(), dtype=like.dtype, device=like.device)
    for feature in range(num_features):
        steps[1 + feature // len(carriers), order[carriers[feature % len(carriers)], feature]] = 1.0
    together = torch.randn(order.shape, generator=torch.Generator().manual_seed(1)).to(like)
    steps[-1, order.reshape(-1)] = together.reshape(-1)
    here, outputs = _outputs(points, point, layer, steps, batch, noise)
    change = outputs[1:] - here.output
    change = change - change[..., :1] if is_softmax else change
    found = change[:-1][..., carriers].permute(1, 0, 2).reshape(len(batch), -1)[:, :num_features]
    wanted = found @ together.T
    wanted = wanted - wanted[:, :1] if is_softmax else wanted
    if float((change[-1] - wanted).abs().max()) > 10 * _RTOL * float(wanted.abs().max().clamp(min=1e-12)):
        raise NoLastLayer(
            "The units of the output layer do not see the same features: it cannot be solved as one linear map. Use "
            "`PairedDescent(head_start=False)`."
        )
    return Features(found, here)


def _outputs(
    points: Points, point: Params, layer: LastLayer, steps: Tensor, batch: Batch, noise: Mapping[str, Tensor]
) -> tuple[Natural, Tensor]:
    """(the data site at the first step, outputs after all steps of the joined entries (step, row, unit))."""
    shapes = [point[name].shape for name in layer.units]
    pieces = steps.split([shape.numel() for shape in shapes], dim=-1)
    stacked = {
        name: point[name] + piece.reshape(len(steps), *shape)
        for name, piece, shape in zip(layer.units, pieces, shapes, strict=True)
    }

    def read(run: Run) -> tuple[Tensor, ...]:
        natural = natural_of(run)
        none = natural.log_scale is None
        return natural.output, natural.target, natural.weight, *(() if none else (natural.log_scale,))

    with torch.no_grad():
        output, target, weight, *log_scale = over_points(points, stacked, batch, noise, read, _rest(point, layer))
    first = Natural(layer.kind, output[0], target[0], log_scale[0][0] if log_scale else None, weight[0])
    return first, output


def _rest(point: Params, layer: LastLayer) -> Params:
    return {name: value for name, value in point.items() if name not in layer.units}


def natural_at(points: Points, point: Params, batch: Batch, noise: Mapping[str, Tensor]) -> Natural:
    """The data site at one point."""
    with torch.no_grad(), quiet():
        return natural_of(points.run(point, batch, noise))


def _probe(
    points: Points,
    point: Params,
    names: tuple[str, ...],
    batch: Batch,
    noise: Mapping[str, Tensor],
    generator: torch.Generator,
) -> tuple[bool, bool]:
    """(whether these entries move the output, whether it is affine in them and nothing else moves)."""
    step = {
        name: _STRETCH
        * point[name].square().mean().sqrt().clamp(min=0.1)
        * torch.randn(point[name].shape, generator=generator).to(point[name])
        for name in names
    }
    own = {name: point[name] for name in names}
    ends = [axpy(factor, step, own) for factor in (0.0, 1.0, -1.5)]
    stacked = {name: torch.stack([end[name] for end in ends]) for name in names}
    fixed = {name: value for name, value in point.items() if name not in names}

    def read(run: Run) -> tuple[Tensor, Tensor]:
        natural = natural_of(run)
        output = natural.output
        if natural.kind == "Categorical":
            output = output - output.mean(-1, keepdim=True)
        return output, output.new_zeros(()) if natural.log_scale is None else natural.log_scale

    with torch.no_grad():
        output, log_scale = over_points(points, stacked, batch, noise, read, fixed)
    there, back = output[1] - output[0], output[2] - output[0]
    size = max(float(there.abs().max()), float(back.abs().max()))
    spread = float((log_scale - log_scale[:1]).abs().max())
    bend = float((1.5 * there + back).abs().max())
    return size > 0, bend <= _RTOL * size and spread <= _RTOL


def _units(
    points: Points,
    point: Params,
    names: tuple[str, ...],
    batch: Batch,
    noise: Mapping[str, Tensor],
    is_softmax: bool,
) -> tuple[dict[str, Tensor], int]:
    """The unit that each entry moves, by the largest column of the Jacobian's squares."""
    leaves = {name: point[name].detach()[None].requires_grad_(True) for name in names}
    fixed = {name: value for name, value in point.items() if name not in names}
    with torch.enable_grad():
        output = over_points(points, leaves, batch, noise, lambda run: natural_of(run).output, fixed)[0]
        output = output - output.mean(-1, keepdim=True) if is_softmax else output
    rows = torch.randn(len(output), generator=torch.Generator().manual_seed(2)).to(output)
    each = torch.eye(output.shape[-1]).to(output)[:, None] * rows[:, None]
    slopes = torch.autograd.grad(
        output, list(leaves.values()), each, is_grads_batched=True, allow_unused=True, materialize_grads=True
    )
    units = {name: _owner(slope[:, 0].abs()) for name, slope in zip(names, slopes, strict=True)}
    return units, output.shape[-1]


def _owner(strength: Tensor) -> Tensor:
    """(unit, *entry) to (*entry): the unit that each entry moves most; −1 where there is no telling.

    Features may be zero on all probed rows, and two logits move alike whoever pushes. So where the owners that can be
    told go by the place along one dim, all do.
    """
    count, shape = len(strength), strength.shape[1:]
    if count == 1:
        return torch.zeros(shape, dtype=torch.int64, device=strength.device)
    top = strength.topk(2, dim=0)
    owner, known = top.indices[0], top.values[0] > 0
    if count > 2:
        known &= top.values[1] <= 0.75 * top.values[0]
    else:
        known &= False
    for dim in (dim for dim, length in enumerate(shape) if length == count):
        places = torch.arange(count, device=strength.device)
        places = places.reshape([count if d == dim else 1 for d in range(len(shape))]).expand(shape)
        if bool((owner == places)[known].all()):
            return places
    return torch.where(known, owner, torch.full_like(owner, _SHARED))


def some_rows(data: Data) -> Batch:
    """A few rows from all over the data, to probe with."""
    chosen = torch.linspace(0, data.num_data - 1, min(data.num_data, PROBED_ROWS)).round().long()
    return next(data.split(data.ids[chosen])[0].with_batch_size(PROBED_ROWS).batches())
