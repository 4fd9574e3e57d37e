"""U(θ) = −log joint in unconstrained space, and its gradient from a mini-batch, for many chains at once."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_forget.data import Batch, Data
from pyro_forget.effects.adoption import adopt_model, check_rows, prior_latents
from pyro_forget.effects.program import Program, over_draws, quiet
from pyro_forget.effects.run import Answers, Latents
from pyro_forget.energy.conjugate import Conjugate, conjugate_of
from pyro_forget.inference.stochastic.layout import Layout
from pyro_forget.params import Params
from pyro_forget.posterior.sampled import unconstrain


@dataclass(frozen=True)
class Potential:
    """U(θ) = −log p(θ) − log|dθ/du| − N/B Σ_batch log p(z | θ), unbiased over batches.

    Normal priors that nothing changes are added in closed form: for a network, autograd through their log densities
    would cost as much as the network.

    Attributes:
        program: the model.
        layout: of the flat array that all chains are.
        num_data: N.
        conjugate: sites with such priors.
        loc, precision: of these priors, flat, or a number where all are the same; precision 0 elsewhere.
        constant: what the closed forms leave out of −log prior, nats.
        real: whether all sites are unconstrained as they are.
        closed: whether the closed forms are the whole of the prior.
    """

    program: Program
    layout: Layout
    num_data: int
    conjugate: Mapping[str, Conjugate]
    loc: Tensor
    precision: Tensor
    constant: float
    real: bool
    closed: bool

    @cached_property
    def is_ridge(self) -> bool:
        """Whether all sites share one Normal prior of mean 0, whose gradient is a multiple of the position."""
        shared = self.precision.ndim == 0 and self.loc.ndim == 0
        return bool(self.conjugate) and shared and float(self.loc) == 0

    def gradient(
        self, position: Tensor, batch: Batch, out: Tensor, prior_precision: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(U of every chain, (chain,), float64; ∇U, flat, in `out`).

        Args:
            position: flat, as all that is not said to have another shape.
            batch: stands for all N rows.
            out: written to.
            prior_precision: in place of the closed-form priors' own.
        """
        leaves, value = self._run(position, batch, self.num_data / len(batch), with_prior=True)
        slopes, energy = self._slopes(value, leaves), value.detach().double()
        if self.is_ridge and prior_precision is None:
            precision = float(self.precision)
            self.layout.join_added(slopes, position, precision, out)
            return energy + self.layout.dot(position, position) * (0.5 * precision) + self.constant, out
        self.layout.join(slopes, out=out)
        return energy + self._add_prior(position, out, prior_precision), out

    def likelihood_gradient(self, position: Tensor, batch: Batch, weight: float, out: Tensor) -> Tensor:
        """∇ of −weight·Σ log p(z | θ) over the batch, in `out`."""
        leaves, value = self._run(position, batch, weight, with_prior=False)
        return self.layout.join(self._slopes(value, leaves), out=out)

    def full_likelihood_gradient(self, position: Tensor, data: Data) -> Tensor:
        """∇ of −Σ log p(z | θ) over all data."""
        return data.reduce(lambda batch: self.likelihood_gradient(position, batch, 1.0, torch.empty_like(position)))

    def product(self, position: Tensor, batch: Batch, vector: Tensor, prior_precision: Tensor | None = None) -> Tensor:
        """∇²U times `vector`, estimated from the batch."""
        leaves, value = self._run(position, batch, self.num_data / len(batch), with_prior=True)
        parts = self.layout.views(vector)
        first = torch.autograd.grad(
            value.sum(), list(leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
        inner = torch.stack([(slope * parts[name]).sum() for name, slope in zip(leaves, first, strict=True)]).sum()
        found = (self.precision if prior_precision is None else prior_precision) * vector
        if not inner.requires_grad:
            return found
        second = torch.autograd.grad(inner, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return found + self.layout.join(dict(zip(leaves, second, strict=True)))

    def turned_gradients(self, values: Params) -> frozenset[str]:
        """Sites whose gradient at (chain, *site) comes with its last two dims the other way round in memory.

        So do those of matrix products under `vmap`, and turning them back would cost as much as a product.
        """
        if self.layout.num_chains == 1:
            return frozenset()
        leaves, value = self._run(self.layout.join(values), self.program.template, 1.0, with_prior=False)
        found = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        pairs = zip(leaves, found, strict=True)
        return frozenset(
            name for name, slope in pairs if slope.ndim > 2 and not slope.is_contiguous() and slope.mT.is_contiguous()
        )

    def constrain(self, position: Tensor) -> Latents:
        """The chains in the sites' supports, (chain, *site); copies."""
        values = self.layout.views(position)
        if self.real:
            return {name: value.clone() for name, value in values.items()}

        def of(one: Params) -> Latents:
            run = self.program.run(self.program.template, Answers(one, unconstrained=True))
            return {site.name: site.value for site in run.sites if not site.observed}

        with quiet(), torch.no_grad():
            return over_draws(of, values, self.layout.num_chains)

    def unconstrained(self, latents: Latents) -> Tensor:
        """(chain, *site) in the sites' supports to the flat array.

        Raises:
            ValueError: a value lies outside its support.
        """
        found = unconstrain(self.program, {name: latents[name][:, None] for name in self.layout.shapes})
        return self.layout.join({name: value.squeeze(1) for name, value in found.items()})

    def _run(self, position: Tensor, batch: Batch, weight: float, with_prior: bool) -> tuple[Params, Tensor]:
        """(leaves by site, −log density of every chain) without what is closed-form; one chain has no chain dim."""
        alone, skip = self.layout.num_chains == 1, frozenset(self.conjugate)
        leaves = self.layout.leaves(position)
        has_prior = with_prior and not self.closed

        def of(values: Params) -> Tensor:
            run = self.program.run(batch, Answers(values, unconstrained=not self.real))
            found = run.log_likelihood().sum() * -weight
            return found - run.log_prior(skip=skip) if has_prior else found

        with quiet(), torch.enable_grad():
            return leaves, of(leaves).reshape(1) if alone else over_draws(of, leaves, self.layout.num_chains)

    @staticmethod
    def _slopes(value: Tensor, leaves: Params) -> Params:
        # Zeros are filled in by hand: autograd's own way of doing it costs as much as a small network's pass.
        found = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
        pairs = zip(leaves.items(), found, strict=True)
        return {name: torch.zeros_like(leaf) if slope is None else slope for (name, leaf), slope in pairs}

    def _add_prior(self, position: Tensor, out: Tensor, prior_precision: Tensor | None) -> Tensor | float:
        """Add the closed-form priors' gradients to `out`; their part of U, (chain,), nats."""
        if not self.conjugate:
            return 0.0
        pull = (position - self.loc) * (self.precision if prior_precision is None else prior_precision)
        out.add_(pull)
        return 0.5 * self.layout.dot(position - self.loc, pull) + self.constant


def potential_of(
    model: Callable[..., Any], data: Data, plate: str = "data", *, num_chains: int = 1, minibatch_scale: bool = False
) -> Potential:
    """The potential of a Pyro model for so many chains.

    Raises:
        ValueError: the model cannot be taken over, has no latents, or has latents of several types.
    """
    learned = adopt_model(model, data, plate, minibatch_scale=minibatch_scale)
    program = replace(learned, model=learned.model.frozen(learned.model.free))
    found = potential_of_program(program, data, num_chains)
    check_rows(program, data, prior_latents(program, next(data.batches())))
    return found


def potential_of_program(program: Program, data: Data, num_chains: int = 1) -> Potential:
    """The potential of a model that was taken over before, its learned parameters fixed.

    Raises:
        ValueError: it has no latents, or latents of several types.
    """
    batch = next(data.batches())
    first, second = (prior_latents(program, batch, seed) for seed in (0, 1))
    if not first:
        raise ValueError("The model has no latents: there is nothing to sample.")
    if len({(value.dtype, value.device) for value in first.values()}) > 1:
        kinds = {name: f"{value.dtype} on {value.device}" for name, value in first.items()}
        raise ValueError(f"The latents are of several types or on several devices, {kinds}: make them all alike.")
    with quiet(), torch.no_grad():
        runs = [program.run(program.template, Answers(latents)) for latents in (first, second)]
    pairs = zip(*([site for site in run.sites if not site.observed] for run in runs), strict=True)
    known = {one.name: conjugate_of(one, other) if _is_real(one.fn.support) else None for one, other in pairs}
    conjugate = {name: prior for name, prior in known.items() if prior is not None}
    start = unconstrain(program, {name: value[None, None] for name, value in first.items()})
    layout = Layout({name: value.shape[2:] for name, value in start.items()}, num_chains)
    real = all(_is_real(site.fn.support) for site in runs[0].sites if not site.observed)
    closed = all(site.name in conjugate for site in runs[0].sites if not site.is_data)

    def of(layout: Layout) -> Potential:
        numbers = _closed_form(conjugate, layout, next(iter(first.values())))
        return Potential(program, layout, data.num_data, conjugate, *numbers, real, closed)

    plain = of(layout)
    turned = plain.turned_gradients(
        {name: value.flatten(0, 1).repeat(num_chains, *[1] * (value.ndim - 2)) for name, value in start.items()}
    )
    return of(replace(layout, turned=turned)) if turned else plain


def _closed_form(conjugate: Mapping[str, Conjugate], layout: Layout, like: Tensor) -> tuple[Tensor, Tensor, float]:
    """(loc, precision, constant) of the closed-form priors; numbers where all entries share them."""
    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    locs, precisions, constant = [], [], 0.0
    for name, size in zip(layout.shapes, layout.sizes, strict=True):
        prior = conjugate.get(name)
        loc, scale = (zero, zero + torch.inf) if prior is None else (prior.loc.to(like), prior.scale.to(like))
        locs.append(loc.reshape(-1).expand(size).repeat(layout.num_chains))
        precisions.append(scale.square().reciprocal().reshape(-1).expand(size).repeat(layout.num_chains))
        if prior is not None:
            constant += float(scale.double().log().reshape(-1).expand(size).sum()) + 0.5 * size * math.log(2 * math.pi)
    numbers = [torch.cat(parts) for parts in (locs, precisions)]
    loc, precision = (value[0] if bool((value == value[0]).all()) else value for value in numbers)
    return loc, precision, constant


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real
