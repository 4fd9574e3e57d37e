"""Forgetting as it was published for MCMC: a chain that samples on while it forgets."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_forget.data import Data
from pyro_forget.effects.noise import seeded
from pyro_forget.forgetters.cloud import cloud_of
from pyro_forget.importance import systematic_resample
from pyro_forget.inference.recursion import Recursion
from pyro_forget.inference.stochastic import Diverged, Rule
from pyro_forget.inference.stochastic.chains import Chains
from pyro_forget.inference.stochastic.potential import potential_of_program
from pyro_forget.inference.stochastic.rule import POSITION, PRECISION
from pyro_forget.inference.stochastic.stream import BatchStream
from pyro_forget.outcome import Edit, Evidence
from pyro_forget.params import Params
from pyro_forget.posterior import Posterior, SampledPosterior

_DIVERGED = 1000  # times the spread of the draws that came

_UNTESTED = (
    "The published algorithm tests nothing: neither that its shift lowers the energy of the retained data, nor that "
    "the chain has settled on them."
)
_TOO_FAR = "The published recursion diverged: lower its `scaling`."


@dataclass(frozen=True)
class PublishedChain:
    """The published algorithm with its sampler steps: one chain moves on, is shifted chunk by chunk, and moves on.

    The gradient of a chunk of erased data, and every Hessian product, is a mean over a few states of the chain, one
    sampler step before each, on the data that are left with the chunk still among them. The shift that the recursion
    makes of them is applied to the chain where it stands; then the chunk leaves, and the sampler goes on without it,
    momenta and all. The draws are those of that chain after the last chunk. `Transport.published` takes its
    expectations over the draws that are there instead, and moves them all.

    Attributes:
        rule: the sampler, whose steps are counted from 0; there is no warm-up in which one could adapt.
        recursion: T, scaling, rows of a product and of a chunk, and states a mean is over (`num_draws`).
        num_draws: to collect, in one chain; None for as many as there were.
        thin: steps a draw; as published, one.
        seed: of the sampler's batches and noise; those of the products have the recursion's.
        progress: show a bar, of chunks.

    References:
        S. Fu, F. He and D. Tao (2021), Bayesian inference forgetting, arXiv:2101.06417, section 4.3.
    """

    rule: Rule
    recursion: Recursion = field(default_factory=Recursion)
    num_draws: int | None = None
    thin: int = 1
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.num_draws is not None and self.num_draws < 1:
            raise ValueError(
                f"`num_draws` must be at least 1, or None for as many as there were, got {self.num_draws}."
            )
        if self.thin < 1:
            raise ValueError(f"`thin` must be at least 1, got {self.thin}.")

    def edit(self, posterior: Posterior, erased: Data, retained: Data) -> Edit:
        """Draws of the chain on the retained data; refused where it runs away. With nothing erased, the input.

        Raises:
            ValueError: the posterior is not one of draws, or a batch has more rows than are retained.
        """
        draws = cloud_of(posterior, "PublishedChain").posterior
        count = draws.num_draws if self.num_draws is None else self.num_draws
        evidence = Evidence(
            f"published algorithm on a chain of {type(self.rule).__name__} that goes on ({self.recursion}), then "
            f"{count} draws, {self.thin} steps each",
            num_draws=count,
        )
        if len(erased) == 0:
            return Edit(posterior, evidence)
        # Now, and not when the chain gets there: a batch that is too large for what is left.
        BatchStream(retained, self.rule.batch_size, self.seed)
        begun = time.perf_counter()
        walk = _Walk(self, draws, erased.join(retained))
        try:
            if not walk.forget(erased, _DIVERGED * _spread(draws)):
                return Edit(posterior, replace(evidence, solver="recursion: diverged", refused=_TOO_FAR))
            ended = time.perf_counter()
            evidence = walk.described(evidence)
            params = walk.collected(count)
        except Diverged as error:
            refused = f"{error} Or it was shifted to where it ran away: lower the recursion's `scaling`."
            return Edit(posterior, replace(evidence, refused=refused))
        cost = {"seconds": ended - begun, "draw_seconds": time.perf_counter() - ended}
        evidence = replace(evidence, extra={"chain": evidence.extra["chain"] | cost})
        return Edit(draws.edited({name: params[name] for name in draws.params}, retained.ids), evidence)


class _Walk:
    """The chain on its way, and the data that it walks on."""

    def __init__(self, settings: PublishedChain, posterior: SampledPosterior, everything: Data) -> None:
        self.settings, self._number = settings, 0
        self._whole = potential_of_program(posterior.energy.program, everything)
        start = self._whole.layout.join(_last(posterior))
        self.shift, self.num_products = torch.zeros_like(start), 0
        self.chains = self._on(everything, start)

    def forget(self, erased: Data, most: float) -> bool:
        """One chunk after another; False as soon as they have shifted the chain as far as `most`.

        Raises:
            Diverged: the chain ran away.
        """
        left, parts = self.chains.data, erased.ids.split(self.settings.recursion.chunk)
        for ids in tqdm(parts, desc="forget", disable=not self.settings.progress):
            chunk, left = left.split(ids)
            shift = self._influence(chunk)
            self.shift += shift
            if not float(self.shift.norm()) < most:
                return False
            before, self._number = self.chains, self._number + 1
            self.chains = self._on(left, before.state[POSITION] + shift)
            self._go_on_like(before)
        return True

    def collected(self, count: int) -> Params:
        """So many draws, unconstrained, (1, draw, *site).

        Raises:
            Diverged: the chain ran away.
        """
        like = self.chains.params()
        found = {name: value.new_empty((1, count, *value.shape[1:])) for name, value in like.items()}
        for place in range(count):
            self.chains.draw(self.settings.thin)
            for name, value in self.chains.params().items():
                found[name][:, place] = value
        return found

    def described(self, evidence: Evidence) -> Evidence:
        """With what the forgetting took and did."""
        pieces = zip(self._whole.layout.shapes, self._whole.layout.pieces(self.shift), strict=True)
        said = {"chunks": self._number, "steps": self.chains.number}
        return replace(
            evidence,
            solver="recursion",
            num_products=self.num_products,
            warnings=(_UNTESTED,),
            step_norm={name: float(piece.double().norm()) for name, piece in pieces},
            extra={"chain": said},
        )

    def _influence(self, chunk: Data) -> Tensor:
        """The published recursion's H⁻¹∇h, H of the data that are left with the chunk among them; flat."""
        chains, recursion = self.chains, self.settings.recursion
        potential, size = chains.potential, min(recursion.batch_size, chains.data.num_data)
        batches = BatchStream(chains.data, size, self._seed(recursion.seed))

        def product(vector: Params) -> Params:
            def of(position: Tensor) -> Tensor:
                return potential.product(position, next(batches), vector[POSITION], chains.state.get(PRECISION))

            self.num_products += recursion.num_draws
            return {POSITION: self._mean(of)}

        force = self._mean(lambda position: potential.full_likelihood_gradient(position, chunk))
        return recursion.influence({POSITION: force}, product, potential.num_data)[POSITION]

    def _mean(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Over a few states of the chain, one step before each."""
        total, count = torch.zeros_like(self.shift), self.settings.recursion.num_draws
        for _ in range(count):
            self.chains.step()
            total.add_(function(self.chains.state[POSITION]), alpha=1 / count)
        return total

    def _on(self, data: Data, position: Tensor) -> Chains:
        """The chain at this place, with these data."""
        potential = replace(self._whole, num_data=data.num_data)
        return Chains(potential, self.settings.rule, data, seed=self._seed(self.settings.seed), start=position)

    def _seed(self, seed: int) -> int:
        """Of this chunk."""
        return seeded(torch.device("cpu"), seed, self._number).initial_seed()

    def _go_on_like(self, before: Chains) -> None:
        """Take over momenta and the like, and the number of steps; anchors of control variates belong to the data."""
        for name, value in before.state.items():
            if name != POSITION and not name.startswith("anchor"):
                self.chains.state[name].copy_(value)
        self.chains.number = before.number


def _last(posterior: SampledPosterior) -> Params:
    """The last draw that counts, (1, *site)."""
    place, weights = -1, posterior.log_weights
    if weights is not None:
        place = int(systematic_resample(weights.flatten(), posterior.num_draws)[-1])
    return {name: value.detach().flatten(0, 1)[place][None] for name, value in posterior.params.items()}


def _spread(posterior: SampledPosterior) -> float:
    """Euclidean length of the draws' standard deviations; infinite for a single draw."""
    if posterior.num_draws < 2:
        return math.inf
    values = [value.detach().flatten(0, 1) for value in posterior.params.values() if value.numel()]
    return math.sqrt(sum(float(value.var(0).sum()) for value in values))
