"""SGHMC whose scales are found during warm-up."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_forget.inference.stochastic.control import Control
from pyro_forget.inference.stochastic.layout import Layout
from pyro_forget.inference.stochastic.rule import (
    MOMENTUM,
    POSITION,
    PRECISION,
    Move,
    Normals,
    State,
    check_batch_size,
    check_norm,
    check_share,
)
from pyro_forget.inference.stochastic.schedule import Schedule, as_schedule

_WINDOW, _MEAN, _SQUARE = "window", "mean", "mean_square"
# A gradient's square is averaged over no fewer steps than this, or one zero crossing makes it vanish.
_MIN_WINDOW = 10.0


@dataclass(frozen=True)
class ScaleAdaptedSGHMC:
    """v ← (1 − α) v − ε² s ∇U(θ) + √(2αε² s − ε⁴ s² V) ξ, then θ ← θ + v, with s = V^(−½).

    V is a running mean of squared gradients with a window τ of its own, adapted during warm-up only. Two guards where
    the published sampler goes wrong:

    - *Floored noise.* Where √V > 2α/ε² the gradients alone bring more noise than the friction takes out; the noise
      that is added is floored at zero there and the stationary variance is 2 to 20 times too large. Here s shrinks
      until the gradients' share of the noise is at most `noise_share`.
    - *Collapsed variance.* Where gradients have next to no noise, τ → 1 and V follows single gradients through zero,
      so that s explodes. Here τ is at least 10 steps, and √V at least `floor` times its root mean square over the site.

    V is the gradients' second moment, which overstates the variance of their noise: with full batches the variance is
    too small by a share of up to ε²√V/(2α), so keep ε small, or set `subtract_noise` to False.

    Attributes:
        step_size: ε, or a schedule.
        friction: α, in (0, 1].
        resample_every: steps after which momenta are drawn anew; 0 for never.
        hyperprior: (shape, rate) of a Gamma prior on the precision of each site, which replaces the scale of the
            site's Normal prior of mean 0 and is drawn by Gibbs' rule; None for the model's own prior.
        gibbs_every: steps between two such draws.
        subtract_noise: whether the added noise is lessened by ε⁴ s² V.
        noise_share: largest share of the noise that the gradients may bring, in (0, 1).
        floor: of √V, relative to its root mean square over the site.
        batch_size: rows a step; None for all.
        control: a control variate.
        max_gradient_norm: length to which longer gradients are cut, which changes the law; None for none.

    References:
        Springenberg, Klein, Falkner and Hutter (2016), Bayesian optimization with robust Bayesian neural networks,
        eq. 7-10.
    """

    step_size: float | Schedule
    friction: float = 0.05
    resample_every: int = 50
    hyperprior: tuple[float, float] | None = None
    gibbs_every: int = 15
    subtract_noise: bool = True
    noise_share: float = 0.5
    floor: float = 0.1
    batch_size: int | None = 128
    control: Control | None = None
    max_gradient_norm: float | None = None

    preconditioned = True
    needs_diagonal = False

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)
        check_norm(self.max_gradient_norm)
        check_share(self.friction, "friction")
        check_share(self.noise_share, "noise_share")
        check_share(self.floor, "floor")
        _ = self.schedule
        if self.hyperprior is not None and not min(self.hyperprior) > 0:
            raise ValueError(f"`hyperprior` must be a positive shape and rate, got {self.hyperprior}.")
        if self.resample_every < 0 or self.gibbs_every < 1:
            raise ValueError(
                f"`resample_every` must not be negative and `gibbs_every` at least 1, got {self.resample_every} and "
                f"{self.gibbs_every}."
            )

    @property
    def schedule(self) -> Schedule:
        """Step sizes."""
        return as_schedule(self.step_size)

    def start(self, position: Tensor, noise: Normals, layout: Layout) -> State:
        """Momenta at rest and statistics that the first step sets."""
        names = (MOMENTUM, _WINDOW, _MEAN, _SQUARE)
        return {name: torch.zeros_like(position) for name in names}

    def move(self, state: State, move: Move) -> None:
        """One update, in place."""
        position, momentum = state[POSITION], state[MOMENTUM]
        if move.number == 0 or move.warming:
            self._adapt(state, move.gradient, first=move.number == 0)
        scale = self._scale(state, move)
        energy = move.size**2 * move.temperature
        if self.resample_every and move.number % self.resample_every == 0:
            torch.mul(move.noise.draw(), (energy * scale).sqrt_(), out=momentum)
        momentum.mul_(1 - self.friction).addcmul_(move.gradient, scale, value=-(move.size**2))
        if move.temperature:
            variance = 2 * self.friction * energy * scale
            if self.subtract_noise:
                variance.addcmul_(scale.square(), state[_SQUARE], value=-(move.size**4))
            momentum.addcmul_(move.noise.draw(), variance.sqrt_())
        position.add_(momentum)
        if self.hyperprior is not None and move.number % self.gibbs_every == 0:
            state[PRECISION].copy_(self._precisions(position, move.layout, move.noise.generator))

    def _adapt(self, state: State, gradient: Tensor, first: bool) -> None:
        """Eq. 7-9, in the published order, the window at least ten steps long."""
        window, mean, square = state[_WINDOW], state[_MEAN], state[_SQUARE]
        if first:
            window.fill_(_MIN_WINDOW)
            mean.copy_(gradient)
            # The published start where the first gradient is less, as it is at a mode.
            square.copy_(gradient).square_().clamp_(min=1.0)
            return
        window.add_(1).addcdiv_(window * mean.square(), square + torch.finfo(square.dtype).tiny, value=-1)
        window.clamp_(min=_MIN_WINDOW)
        mean.add_((gradient - mean).div_(window))
        square.add_(gradient.square().sub_(square).div_(window))

    def _scale(self, state: State, move: Move) -> Tensor:
        """V^(−½) within both guards, flat."""
        square = state[_SQUARE]
        means = move.layout.sums(square) / square.new_tensor(move.layout.sizes)
        least = move.layout.spread(means).mul_(self.floor**2).clamp_(min=torch.finfo(square.dtype).tiny)
        guarded = torch.maximum(square, least)
        return torch.minimum(guarded.rsqrt(), self.noise_share * 2 * self.friction / (move.size**2 * guarded))

    def _precisions(self, position: Tensor, layout: Layout, generator: torch.Generator) -> Tensor:
        """One draw of each site's precision given its values, spread over its entries, flat."""
        shape, rate = self.hyperprior or (0.0, 0.0)
        sums, counts = layout.sums(position.square()), position.new_tensor(layout.sizes)
        drawn = torch._standard_gamma((shape + 0.5 * counts).expand_as(sums).contiguous(), generator=generator)
        return layout.spread(drawn / (rate + 0.5 * sums))

    def kinetic_temperature(self, state: State, step_size: float, layout: Layout) -> Tensor | None:
        """Mean of v²/(ε² s), shape (chain,), s without its guards."""
        return layout.dot(state[MOMENTUM] * state[_SQUARE].sqrt(), state[MOMENTUM]) / (layout.size * step_size**2)
