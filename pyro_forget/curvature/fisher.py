"""The Fisher matrix Λ of an observation distribution in the outputs of a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_forget.effects.random import forked_rng
from pyro_forget.effects.site import Site

NUM_SAMPLES = 16


@dataclass(frozen=True)
class Family:
    """Outputs of a distribution and its Fisher matrix in them.

    Attributes:
        outputs: of the unwrapped distribution.
        factors: what Λ is made of, one tensor an output, from the outputs: the diagonal, or probabilities p of
            Λ = diag(p) − ppᵀ.
        coupled: whether Λ is diag(p) − ppᵀ over the last dim of the output; else it is diagonal.
    """

    outputs: Callable[[Any], tuple[Tensor, ...]]
    factors: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
    coupled: bool = False

    def product(self, factors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Λ · tangents."""
        if not self.coupled:
            return tuple(factor * tangent for factor, tangent in zip(factors, tangents, strict=True))
        weighted = factors[0] * tangents[0]
        return (weighted - factors[0] * weighted.sum(-1, keepdim=True),)


def _normal(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.exp(-2 * outputs[1]), torch.full_like(outputs[1], 2.0)


def _bernoulli(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs[0].sigmoid() * (-outputs[0]).sigmoid(),)


def _categorical(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # Not `softmax`, which takes ten times as long over a few classes on a CPU.
    return (torch.exp(outputs[0] - outputs[0].logsumexp(-1, keepdim=True)),)


def _centred_logits(fn: Any) -> tuple[Tensor, ...]:
    # Λ does not see a constant; without the normaliser that torch adds, the logits of a linear model stay linear.
    return (fn.logits - fn.logits.mean(-1, keepdim=True),)


def _sampled(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.full_like(outputs[0], 1.0 / NUM_SAMPLES),)


SAMPLED = Family(lambda fn: (), _sampled)
FAMILIES: dict[str, Family] = {
    "Normal": Family(lambda fn: torch.broadcast_tensors(fn.loc, fn.scale.log()), _normal),
    "Bernoulli": Family(lambda fn: (fn.logits,), _bernoulli),
    "Categorical": Family(_centred_logits, _categorical, coupled=True),
    "Poisson": Family(lambda fn: (fn.rate.log(),), lambda outputs: (outputs[0].exp(),)),
}


def unwrapped(fn: Any) -> tuple[Any, int]:
    """(the innermost distribution, how many of its batch dims are event dims outside)."""
    event_dims = 0
    while type(fn).__name__ in ("Independent", "ExpandedDistribution", "MaskedDistribution"):
        if type(fn).__name__ == "Independent":
            event_dims += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    return fn, event_dims


def family_of(site: Site) -> Family | None:
    """The closed form for a site's likelihood; None where there is none."""
    if type(site.fn).__name__ == "MaskedDistribution":
        return None
    return FAMILIES.get(type(unwrapped(site.fn)[0]).__name__)


def outputs_of(site: Site, family: Family) -> tuple[tuple[Tensor, ...], Tensor]:
    """(outputs, weight): the weight is the site's mask and scale, in a shape that multiplies the outputs."""
    fn, event_dims = unwrapped(site.fn)
    batch_shape, outputs = site.fn.batch_shape, family.outputs(fn)
    # Parameters that a plate expands only on paper get their full shape here.
    trailing = event_dims + int(family.coupled)
    full = [value.expand(*batch_shape, *value.shape[value.ndim - trailing :]) for value in outputs]
    weight = torch.as_tensor(site.scale, dtype=full[0].dtype, device=full[0].device)
    if isinstance(site.mask, Tensor):
        weight = weight * site.mask
    elif site.mask is False:
        weight = weight * 0
    weight = weight.expand(batch_shape).reshape(*batch_shape, *(1,) * trailing)
    return tuple(full), weight


def sampled_outputs(site: Site) -> tuple[tuple[Tensor, ...], Tensor]:
    """The same for any distribution that can be sampled: log densities of values drawn from it, to go with `SAMPLED`.

    Their Jacobian's rows are scores, whose mean square is the Fisher matrix (Martens 2020, section 9).
    """
    with forked_rng(0), torch.no_grad():
        values = site.fn.sample((NUM_SAMPLES,))
    scores = site.fn.log_prob(values)
    weight = torch.as_tensor(site.scale, dtype=scores.dtype, device=scores.device)
    if isinstance(site.mask, Tensor):
        weight = weight * site.mask
    return (scores,), weight.expand(scores.shape)
