"""Reading a site: its log density by row, with its mask and the program's own scale, without the plates' scale."""

from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor
from torch.distributions import constraints


@dataclass(frozen=True)
class Site:
    """One sample site of one run of a model.

    Attributes:
        fn: its distribution, expanded by the plates.
        value: what was observed or substituted.
        mask: of `poutine.mask`, or None.
        scale: what the program's own `poutine.scale` leaves after the plates' scale is taken out.
        frame: of the data plate, None outside it.
        observed: whether it belongs to the likelihood or the prior.
    """

    name: str
    fn: Any
    value: Tensor
    mask: Tensor | bool | None
    scale: float | Tensor
    frame: CondIndepStackFrame | None
    observed: bool

    @property
    def is_data(self) -> bool:
        """Whether this is a data term: observed, or a factor, inside the data plate."""
        return self.observed and self.frame is not None

    def log_prob(self) -> Tensor:
        """The log density, of the site's batch shape, masked and scaled."""
        mask, value = self.mask, _unmasked_value(self.fn, self.value)
        if mask is None or mask is True:
            log_prob = self.fn.log_prob(value)
            # A product by one is nothing, and autograd would carry it along.
            return log_prob if isinstance(self.scale, float) and self.scale == 1 else self.scale * log_prob
        if mask is False:
            return torch.zeros_like(self.fn.log_prob(value))
        log_prob = self.fn.log_prob(_feasible(self.fn, value))
        return self.scale * torch.where(mask, log_prob, torch.zeros_like(log_prob))

    def by_row(self, num_rows: int) -> Tensor:
        """The log density summed over all but the data plate's dim, shape (num_rows,)."""
        log_prob = self.log_prob()
        if self.frame is None:
            raise ValueError(f"Site '{self.name}' is not in the data plate.")
        if self.frame.dim is None:
            # A sequential plate visits one row at a time and counts from 1.
            return (
                torch.nn.functional.one_hot(torch.tensor(self.frame.counter - 1, device=log_prob.device), num_rows).to(
                    log_prob.dtype
                )
                * log_prob.sum()
            )
        if log_prob.ndim < -self.frame.dim or log_prob.shape[self.frame.dim] != num_rows:
            raise _wrong_rows(self, num_rows)
        if log_prob.ndim == 1:
            return log_prob
        rows = log_prob.movedim(self.frame.dim, 0)
        return rows.reshape(num_rows, -1).sum(-1)


def make_site(msg: dict[str, Any], plate: str, data_scale: float) -> Site:
    """The site that a message describes once the program's own handlers have run.

    `data_scale` multiplies the data sites: it undoes a mini-batch scale that the model applies itself.
    """
    scale = msg["scale"]
    for frame in msg["cond_indep_stack"]:
        if frame.full_size not in (None, frame.size):
            scale = scale * frame.size / frame.full_size
    frame = next((frame for frame in msg["cond_indep_stack"] if frame.name == plate), None)
    if frame is not None and msg["is_observed"]:
        scale = scale * data_scale
    return Site(msg["name"], msg["fn"], msg["value"], msg["mask"], scale, frame, bool(msg["is_observed"]))


def _unmasked_value(fn: Any, value: Tensor) -> Tensor:
    """`value` with something feasible where a `MaskedDistribution` hides a NaN."""
    while type(fn).__name__ in ("Independent", "ExpandedDistribution"):
        fn = fn.base_dist
    mask = getattr(fn, "_mask", None)
    if not isinstance(fn, MaskedDistribution) or not isinstance(mask, Tensor):
        return value
    hidden = ~mask.reshape(*mask.shape, *(1 for _ in fn.event_shape))
    return torch.where(hidden, _feasible(fn, value), value)


def _feasible(fn: Any, value: Tensor) -> Tensor:
    """`value` with something inside the support for NaN.

    A masked NaN would poison the gradient (0 · NaN), so its density is taken elsewhere.
    """
    if not value.is_floating_point():
        return value
    inside = 0.5 if fn.support is constraints.unit_interval else 1.0
    return torch.where(torch.isnan(value), torch.full_like(value, inside), value)


def _wrong_rows(site: Site, num_rows: int) -> ValueError:
    return ValueError(
        f"Site '{site.name}' has batch shape {tuple(site.fn.batch_shape)}, which does not show the data plate's "
        f"{num_rows} rows at dim {site.frame.dim if site.frame else None}: every row needs its own log likelihood."
    )
