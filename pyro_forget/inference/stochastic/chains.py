"""Chains that run side by side, and all that is needed to go on from where they stand."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from pyro_forget.data import Batch, Data
from pyro_forget.effects.noise import seeded
from pyro_forget.effects.run import Latents
from pyro_forget.inference.stochastic.control import SVRG, FixedMode
from pyro_forget.inference.stochastic.failure import Diverged, suggested_size
from pyro_forget.inference.stochastic.potential import Potential
from pyro_forget.inference.stochastic.rule import CLIPPED, POSITION, PRECISION, Move, Normals, Rule, State
from pyro_forget.inference.stochastic.start import starts
from pyro_forget.inference.stochastic.stream import BatchStream
from pyro_forget.params import Params

_ANCHOR, _ANCHOR_GRADIENT = "anchor", "anchor_gradient"


class Chains:
    """Vectorised chains of one rule; all see the same mini-batch and have noise of their own.

    The shared part of the gradient's noise moves all chains alike: they are independent only as far as that part is
    small beside the noise that is added.

    Args:
        potential: of the model.
        rule: the sampler.
        data: the rows.
        num_warmup: steps during which the rule may adapt.
        seed: of starts, batches and noise.
        start: constrained values by site, (*site) for all chains or (chain, *site); or a position, flat and
            unconstrained; None for draws from the prior.

    Attributes:
        state: tensors by name, flat arrays among them.
        number: steps taken.
        energy: U where the last step began, estimated from its batch, (chain,), nats; NaN before the first step.
        statistics: of the last step that was measured, (chain,) each: the energy and the batch's gradient where it
            began, its size, and two temperatures, which are 1 on average under the posterior: configurational, the
            mean of θ·∇U over the entries, and kinetic, that of v M⁻¹ v after the step; where gradients are cut to a
            length, the share of steps after the warm-up that were.

    Raises:
        ValueError: the data have fewer rows than a batch, or settings and model do not fit.
    """

    def __init__(
        self,
        potential: Potential,
        rule: Rule,
        data: Data,
        *,
        num_warmup: int = 0,
        seed: int = 0,
        start: Mapping[str, Tensor] | Tensor | None = None,
    ) -> None:
        self.potential, self.rule, self.data, self.num_warmup = potential, rule, data, num_warmup
        self._stream = BatchStream(data, rule.batch_size, seed)
        self._seed, self._start = seed, start
        position = self._first_position()
        self._noise = Normals(position, seeded(position.device, seed, 1))
        self.state: State = {POSITION: position, **rule.start(position, self._noise, potential.layout)}
        if rule.max_gradient_norm is not None:
            self.state[CLIPPED] = torch.zeros(self.num_chains, dtype=torch.float64, device=position.device)
        self._start_prior()
        self._start_control()
        self.number = 0
        self.energy = torch.full((self.num_chains,), torch.nan, dtype=torch.float64)
        self.statistics: dict[str, Tensor] = {}
        self._gradient, self._spare = torch.zeros_like(position), torch.empty(0)

    @property
    def num_chains(self) -> int:
        """Side by side."""
        return self.potential.layout.num_chains

    @property
    def exploring(self) -> bool:
        """Whether the next draw may not be taken here: the last step was one without noise."""
        return self.number > 0 and self.rule.schedule.exploring(self.number - 1)

    def step(self, measure: bool = False) -> None:
        """One update of every chain; `measure` for its `statistics`.

        Raises:
            Diverged: the energy is not finite.
        """
        batch, schedule = next(self._stream), self.rule.schedule
        position = self.state[POSITION]
        self._move_anchor()
        energy, gradient = self.potential.gradient(position, batch, self._gradient, self.state.get(PRECISION))
        self.energy = energy
        if not isfinite(float(energy.sum())):
            raise self._diverged()
        self._control(batch, gradient)
        if measure:
            self._measure(position, gradient)
        self._shorten(gradient, measure)
        size = schedule.step_size(self.number)
        move = Move(
            number=self.number,
            size=size,
            temperature=0.0 if schedule.exploring(self.number) else 1.0,
            warming=self.number < self.num_warmup,
            gradient=gradient,
            noise=self._noise,
            layout=self.potential.layout,
            diagonal=(lambda: self._diagonal(batch)) if self.rule.needs_diagonal else None,
        )
        self.rule.move(self.state, move)
        self.number += 1
        kinetic = self.rule.kinetic_temperature(self.state, size, self.potential.layout) if measure else None
        if kinetic is not None:
            self.statistics["kinetic_temperature"] = kinetic.double()

    def draw(self, thin: int) -> Latents:
        """`thin` steps, and more until the schedule lets a draw be taken; measured at the last.

        Raises:
            Diverged: the energy or a chain is not finite.
        """
        for left in reversed(range(thin)):
            self.step(measure=not left)
        while self.exploring:
            self.step(measure=True)
        return self.latents()

    def noise_scale(self, num_batches: int = 16) -> Tensor:
        """Tr Cov(gradient of a batch)/|∇U|² here, (chain,), float64; infinite where ∇U cannot be told from zero.

        Batches are drawn from a generator of its own, so that the chains go on as if nothing had been asked.

        References:
            McCandlish, Kaplan, Amodei and the OpenAI Dota team (2018), An empirical model of large-batch training,
            eq. 2.9 and A.2.
        """
        stream, layout = BatchStream(self.data, self.rule.batch_size, self._seed + 1), self.potential.layout
        mean, squares = torch.zeros_like(self._gradient), torch.zeros(self.num_chains, dtype=torch.float64)
        for _ in range(num_batches):
            batch, found = next(stream), torch.empty_like(mean)
            self.potential.gradient(self.state[POSITION], batch, found, self.state.get(PRECISION))
            self._control(batch, found)
            mean.add_(found, alpha=1 / num_batches)
            squares = squares.to(found.device) + layout.dot(found, found)
        length = layout.dot(mean, mean)
        variance = (squares - num_batches * length).clamp(min=0) / (num_batches - 1)
        return variance / (length - variance / num_batches).clamp(min=0)

    def latents(self) -> Latents:
        """The chains in the sites' supports, (chain, *site).

        Raises:
            Diverged: a chain is not finite any more.
        """
        return self.potential.constrain(self._finite_position())

    def params(self) -> Params:
        """The chains in unconstrained space, (chain, *site): views, which the next step changes.

        Raises:
            Diverged: a chain is not finite any more.
        """
        return self.potential.layout.views(self._finite_position())

    def set_position(self, position: Tensor) -> None:
        """Put the chains here: flat, unconstrained."""
        self.state[POSITION].copy_(position)

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON): what `load` needs to go on bit for bit."""
        epoch, place = self._stream.save()
        tensors = {f"state/{name}": value for name, value in self.state.items()}
        tensors |= {"generator/batches": epoch, "generator/noise": self._noise.generator.get_state()}
        return tensors, {"number": self.number, "place": place}

    def load(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Stand where saved chains stood."""
        for name, value in self.state.items():
            value.copy_(tensors[f"state/{name}"])
        self._noise.generator.set_state(tensors["generator/noise"].clone())
        self._stream.load(tensors["generator/batches"], header["place"])
        self.number = header["number"]

    def _first_position(self) -> Tensor:
        if isinstance(self._start, Tensor):
            return self._start.clone()
        return self.potential.unconstrained(starts(self.potential, self.data, self._seed, self._start))

    def _finite_position(self) -> Tensor:
        if not bool(torch.isfinite(self.state[POSITION]).all()):
            raise self._diverged()
        return self.state[POSITION]

    def _measure(self, position: Tensor, gradient: Tensor) -> None:
        layout = self.potential.layout
        self.statistics = {
            "energy": self.energy,
            "step_size": torch.full_like(self.energy, self.rule.schedule.step_size(self.number)),
            "configurational_temperature": layout.dot(position, gradient) / layout.size,
            "gradient_norm": layout.dot(gradient, gradient).sqrt(),
        }

    def _shorten(self, gradient: Tensor, measure: bool) -> None:
        """Cut long gradients, and count that after the warm-up."""
        if self.rule.max_gradient_norm is None:
            return
        shortened = self.potential.layout.shorten(gradient, self.rule.max_gradient_norm)
        steps = self.number + 1 - self.num_warmup
        if steps > 0:
            self.state[CLIPPED].lerp_(shortened.double(), 1 / steps)
        if measure:
            self.statistics["clipped"] = self.state[CLIPPED].clone()

    def _start_prior(self) -> None:
        if self.rule.hyperprior is None:
            return
        sites, known = set(self.potential.layout.shapes), set(self.potential.conjugate)
        if sites != known or bool((self.potential.loc != 0).any()):
            raise ValueError(
                "`hyperprior` replaces the scale of Normal priors of mean 0 that nothing else changes; not so for "
                f"{sorted(sites - known) or 'the means of this model'}. Leave it out."
            )
        self.state[PRECISION] = self.potential.precision.expand_as(self.state[POSITION]).clone()

    def _start_control(self) -> None:
        control, position = self.rule.control, self.state[POSITION]
        if control is None:
            return
        anchor = position.clone()
        if isinstance(control, FixedMode):
            latents = starts(self.potential, self.data, 0, control.latents)
            anchor = self.potential.unconstrained(latents)
        self.state[_ANCHOR] = anchor
        self.state[_ANCHOR_GRADIENT] = self.potential.full_likelihood_gradient(anchor, self.data)

    def _move_anchor(self) -> None:
        control = self.rule.control
        if isinstance(control, SVRG) and self.number and self.number % control.every == 0:
            anchor = self.state[_ANCHOR].copy_(self.state[POSITION])
            self.state[_ANCHOR_GRADIENT].copy_(self.potential.full_likelihood_gradient(anchor, self.data))

    def _control(self, batch: Batch, gradient: Tensor) -> None:
        if self.rule.control is None:
            return
        if self._spare.shape != gradient.shape:
            self._spare = torch.empty_like(gradient)
        weight = self.potential.num_data / len(batch)
        there = self.potential.likelihood_gradient(self.state[_ANCHOR], batch, weight, self._spare)
        gradient.sub_(there).add_(self.state[_ANCHOR_GRADIENT])

    def _diagonal(self, batch: Batch) -> Tensor:
        """An unbiased estimate of the diagonal of ∇²U: z ⊙ ∇²U z with random signs z.

        References:
            Bekas, Kokiopoulou and Saad (2007), An estimator for the diagonal of a matrix, section 2.
        """
        signs = self._noise.signs()
        return signs * self.potential.product(self.state[POSITION], batch, signs, self.state.get(PRECISION))

    def _diverged(self) -> Diverged:
        size = self.rule.schedule.step_size(max(self.number - 1, 0))
        position, batch = self._first_position(), next(self.data.batches())
        return Diverged(self.number, size, suggested_size(self.rule, size, self.potential, position, batch))
