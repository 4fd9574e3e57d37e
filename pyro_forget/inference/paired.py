"""Paired descent: mini-batches of the tilted energy with the same rows and noise at γ and γ₀, so that most cancels."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_forget.data import Batch
from pyro_forget.energy.points import prior_gradient
from pyro_forget.inference.last_layer import LastLayer
from pyro_forget.inference.pairing import Beta, Problem, batch_gradient, residuals
from pyro_forget.params import Params, scale

_LAST_RATE = 0.02  # of the learning rate, at the last step


@dataclass
class Shrink:
    """How much of the difference between the tilt at γ₀ as measured and as assumed is not noise.

    s = max(0, 1 − v/‖ḡ₀ − t/N‖²), ḡ₀ the mean of the batches' gradients at γ₀ and v its variance.

    Attributes:
        target: t/N.
        mean: ḡ₀, per datum.
        square: the mean of their squared lengths.
        count: batches.
    """

    target: Params
    mean: Params
    square: float = 0.0
    count: int = 0

    def add(self, gradient: Params) -> None:
        """One more batch."""
        self.count += 1
        for name, value in gradient.items():
            self.mean[name].lerp_(value, 1 / self.count)
        self.square += (_square(gradient) - self.square) / self.count

    def factor(self) -> float:
        """The factor s."""
        if self.count < 2:
            return 0.0
        gap = sum(float(torch.dist(value, self.target[name])) ** 2 for name, value in self.mean.items())
        return max(0.0, 1.0 - self.variance / (self.count - 1) / gap) if gap > 0 else 0.0

    @property
    def variance(self) -> float:
        """Of one batch's gradient, over all entries."""
        return self.square - _square(self.mean)


@dataclass(frozen=True)
class Paired:
    """Where paired descent ended.

    Attributes:
        params: the points.
        beta: the shares of the tilt kept at the end.
        shrink: s at the end.
        aim: t/N + s(ḡ₀ − t/N), per datum: what the retained data's gradient at γ₀ is taken for.
        noise_scale: tr Cov(g) / |g|² of the batches' gradients at γ₀ about t/N, times the batch size: rows after which
            the erased data's pull stands out.
        num_steps: of Adam.
    """

    params: Params
    beta: Beta
    shrink: float
    aim: Params
    noise_scale: float
    num_steps: int


@dataclass(frozen=True)
class PairedSteps:
    """The rule.

    Adam on g = g_B(γ) − β∘(g_B(γ₀) − a) + ∇prior/N, a = t/N + s(ḡ₀ − t/N), learning rate linear to 2 %. With s = 0 and
    β = 1 its mean is the gradient of the tilted energy, with s = 1 that of the retained energy (streaming SVRG); with
    β = 0 it is plain fine-tuning.

    Attributes:
        num_steps: of Adam.
        learning_rate: at the first.
        batch_size: rows a step.
        beta: "measured", or one number for all entries.
        shrink: whether s is measured; else it is 0.
    """

    num_steps: int
    learning_rate: float
    batch_size: int = 128
    beta: float | None = None
    shrink: bool = True

    def run(self, problem: Problem, layer: LastLayer | None, start: Params | None = None) -> Paired:
        """Descend from `start`, or γ₀."""
        params = {name: value.detach().clone() for name, value in (start or problem.origin).items()}
        optimiser = torch.optim.Adam(list(params.values()), lr=self.learning_rate, fused=True)
        state = self.state(problem, layer)
        for step, batch in zip(range(self.num_steps), self._batches(problem), strict=False):
            optimiser.param_groups[0]["lr"] = self.learning_rate * (1 - (1 - _LAST_RATE) * step / self.num_steps)
            gradient = self.gradient(problem, state, params, batch, problem.seed * 1_000_003 + step)
            for name, value in params.items():
                value.grad = gradient[name]
            optimiser.step()
        params = {name: value.detach() for name, value in params.items()}
        scale_of = self.batch_size * state.shrink.variance / max(_square(state.shrink.target), 1e-300)
        return Paired(params, state.beta, state.s, state.aim(), scale_of, self.num_steps)

    def state(self, problem: Problem, layer: LastLayer | None) -> "State":
        """Before the first step."""
        target = scale(problem.tilt, 1 / problem.num_data)
        beta = Beta.one(layer, layer.num_units if layer else 0, next(iter(target.values())))
        return State(beta, Shrink(target, scale(target, 0.0)))

    def gradient(self, problem: Problem, state: "State", params: Params, batch: Batch, seed: int) -> Params:
        """One batch's estimate of the gradient per datum."""
        noise, copies = problem.points.noise(batch, seed), problem.copies
        stacked = {name: torch.cat([value, problem.origin[name]]) for name, value in params.items()}
        slopes, (delta,) = batch_gradient(problem.points, stacked, batch, noise, residuals, 1 / len(batch))
        there = {name: value[copies:] for name, value in slopes.items()}
        self._measure(problem, state, delta, there)
        aim = state.aim() if state.s else state.shrink.target
        beta = state.beta if self.beta is None else None
        pull = prior_gradient(problem.points, params, seed)
        found = {}
        for name, value in slopes.items():
            here, own = value[:copies], aim[name]
            found[name] = (
                torch.sub(here, there[name], alpha=self.beta, out=torch.empty_like(own)).add_(own, alpha=self.beta)
                if beta is None
                else beta.paired(here, there[name], own, name)
            ).add_(pull[name], alpha=1 / problem.num_data)
        return found

    def _measure(self, problem: Problem, state: "State", delta: Tensor, there: Params) -> None:
        """β and s with one more batch. A draw's own deviation is no error of a fit: there β is 1 and s is 0."""
        if not problem.stationary:
            return
        if self.beta is None:
            state.beta = state.beta.after(delta[0], delta[1])
        state.shrink.add(there)
        state.s = state.shrink.factor() if self.shrink else 0.0

    def _batches(self, problem: Problem) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(problem.seed)
        return problem.rows.minibatches(self.batch_size, generator)


@dataclass
class State:
    """What the steps have measured so far: β, what ḡ₀ and t/N say, and s."""

    beta: Beta
    shrink: Shrink
    s: float = 0.0

    def aim(self) -> Params:
        """T/N + s(ḡ₀ − t/N)."""
        return {name: torch.lerp(value, self.shrink.mean[name], self.s) for name, value in self.shrink.target.items()}


def _square(params: Params) -> float:
    return sum(float(torch.linalg.vector_norm(value)) ** 2 for value in params.values())
