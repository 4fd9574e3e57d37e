"""The natural output of a likelihood: the network's output, its residuals, and what it was compared with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_forget.curvature.fisher import family_of, outputs_of, unwrapped
from pyro_forget.effects.program import Run
from pyro_forget.effects.site import Site

KINDS = ("Categorical", "Normal", "Bernoulli")


@dataclass(frozen=True)
class Natural:
    """One data site as a function of its output, a row for each datum.

    Attributes:
        kind: "Categorical", "Normal" or "Bernoulli".
        output: logits or means, (row, unit).
        target: classes (row,), or values (row, unit).
        log_scale: of a Normal, (row, unit); None of the others.
        weight: the site's mask and scale, (row, 1) or (row, unit).
    """

    kind: str
    output: Tensor
    target: Tensor
    log_scale: Tensor | None
    weight: Tensor

    def loss(self, output: Tensor) -> Tensor:
        """−log likelihood by row at another output, without what does not depend on it; (row,), nats."""
        if self.kind == "Categorical":
            own = output.gather(-1, self.target[:, None])[:, 0]
            return (output.logsumexp(-1) - own) * self.weight[:, 0]
        if self.kind == "Bernoulli":
            return ((torch.nn.functional.softplus(output) - self.target * output) * self.weight).sum(-1)
        return (0.5 * (output - self.target).square() * self._precision * self.weight).sum(-1)

    def residual(self, output: Tensor) -> Tensor:
        """The slope of `loss` in the output, (row, unit)."""
        if self.kind == "Categorical":
            found = torch.exp(output - output.logsumexp(-1, keepdim=True)) * self.weight
            return found.scatter_add(-1, self.target[:, None], -self.weight.to(found))
        if self.kind == "Bernoulli":
            return (output.sigmoid() - self.target) * self.weight
        return (output - self.target) * self._precision * self.weight

    def loss_and_residual(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Both at once: a softmax over a few classes costs more than the layer before it."""
        if self.kind != "Categorical":
            return self.loss(output), self.residual(output)
        normaliser, own = output.logsumexp(-1, keepdim=True), self.target[:, None]
        residual = torch.exp(output - normaliser).mul_(self.weight)
        residual.scatter_add_(-1, own, -self.weight.to(residual))
        return (normaliser - output.gather(-1, own))[:, 0] * self.weight[:, 0], residual

    def fisher(self, output: Tensor) -> Tensor:
        """The Fisher matrix in the output, summed over the rows, (unit, unit)."""
        if self.kind == "Categorical":
            p = torch.exp(output - output.logsumexp(-1, keepdim=True))
            return torch.diag((p * self.weight).sum(0)) - (p * self.weight).T @ p
        if self.kind == "Bernoulli":
            return torch.diag((output.sigmoid() * (-output).sigmoid() * self.weight).sum(0))
        return torch.diag((self._precision * self.weight).expand_as(output).sum(0))

    @property
    def _precision(self) -> Tensor:
        if self.log_scale is None:
            raise ValueError(f"A {self.kind} has no scale.")
        return torch.exp(-2 * self.log_scale)


def natural_of(run: Run) -> Natural:
    """The only data site of a run.

    Raises:
        ValueError: there are several, or its distribution is of another family.
    """
    site = _only(run)
    family = family_of(site)
    if family is None or type(unwrapped(site.fn)[0]).__name__ not in KINDS:
        raise ValueError(
            f"The likelihood at '{site.name}' is {type(unwrapped(site.fn)[0]).__name__}: only that of a Categorical, "
            "a Normal or a Bernoulli can be read as a function of a network's output. Use `Influence`."
        )
    kind = type(unwrapped(site.fn)[0]).__name__
    outputs, weight = outputs_of(site, family)
    if kind == "Categorical":
        if len(site.fn.batch_shape) != 1:
            raise ValueError(
                f"Site '{site.name}' has {len(site.fn.batch_shape)} batch dims: a Categorical likelihood must have "
                "one outcome a row."
            )
        return Natural(kind, outputs[0], site.value, None, weight)
    rows = [_by_row(value, site, run.num_rows) for value in outputs]
    value = _by_row(site.value.expand(outputs[0].shape), site, run.num_rows)
    log_scale = rows[1] if kind == "Normal" else None
    return Natural(kind, rows[0], value, log_scale, _by_row(weight.expand(outputs[0].shape), site, run.num_rows))


def _only(run: Run) -> Site:
    sites = [site for site in run.sites if site.is_data]
    if len(sites) != 1:
        names = [site.name for site in sites]
        raise ValueError(f"The model has {len(sites)} data sites, {names}: a network's output is read at exactly one.")
    return sites[0]


def _by_row(value: Tensor, site: Site, num_rows: int) -> Tensor:
    """(row, everything else)."""
    dim = site.frame.dim if site.frame is not None else None
    if dim is None:
        raise ValueError(f"Site '{site.name}' is in a sequential plate: use a vectorised one, `with pyro.plate(...)`.")
    place = len(site.fn.batch_shape) + dim
    return value.movedim(place, 0).reshape(num_rows, -1)
