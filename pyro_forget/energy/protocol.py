"""What an energy is, and energies written by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from pyro_forget.data import Batch, Data
from pyro_forget.params import Params


class Energy(Protocol):
    """F(γ, S) = prior(γ) + Σ_{z∈S} h(γ, z), least at the posterior of S; in nats, float64.

    Law: total(γ, S) − total(γ, S∖S′) = Σ_{z∈S′} h(γ, z), at the same noise.
    """

    def prior(self, params: Params) -> Tensor:
        """The part without data: −log prior, or the KL divergence to it; scalar."""
        ...

    def share(self, params: Params, batch: Batch) -> Tensor:
        """Σ h(γ, z) over the batch's rows, scalar."""
        ...

    def total(self, params: Params, data: Data) -> Tensor:
        """F(γ, data), scalar."""
        ...

    def with_noise(self, seed: int, pairs: int | None = None) -> Self:
        """The same under other pinned noise; a deterministic energy returns itself."""
        ...

    def with_fresh_noise(self, seed: int, num_draws: int) -> Self:
        """The same under independent draws for one batch, the noise of stochastic methods."""
        ...

    def estimate(self, params: Params, batch: Batch, num_data: int) -> Tensor:
        """F(γ, S) estimated with the batch standing for all `num_data` rows, scalar, nats."""
        ...


@dataclass(frozen=True)
class FunctionEnergy:
    """F and h as two functions, without Pyro: the door for energies written by hand.

    Attributes:
        total_of: F(γ, rows of a batch), prior included.
        share_of: Σ h(γ, z) over the rows of a batch.
        noise_of: (seed, pairs) to an energy under that noise; None for a deterministic one.
    """

    total_of: Callable[[Params, Batch], Tensor]
    share_of: Callable[[Params, Batch], Tensor]
    noise_of: Callable[[int, int | None], "FunctionEnergy"] | None = None

    def prior(self, params: Params) -> Tensor:
        """Not known apart from the data.

        Raises:
            ValueError: always; `total` needs no prior.
        """
        raise ValueError("A hand-written energy has no prior of its own: use `total`, which is F(γ, S).")

    def share(self, params: Params, batch: Batch) -> Tensor:
        """Σ h(γ, z) over the batch's rows, scalar."""
        return self.share_of(params, batch)

    def total(self, params: Params, data: Data) -> Tensor:
        """F(γ, data): F of the first batch and h of the others."""
        state: list[bool] = []

        def of(batch: Batch) -> Tensor:
            first = not state
            state.append(True)
            return (self.total_of if first else self.share_of)(params, batch)

        return data.reduce(of)

    def with_noise(self, seed: int, pairs: int | None = None) -> "FunctionEnergy":
        """The same under other noise, where `noise_of` says how."""
        return self if self.noise_of is None else self.noise_of(seed, pairs)

    def with_fresh_noise(self, seed: int, num_draws: int) -> "FunctionEnergy":
        """The same as `with_noise`: hand-written energies know one kind."""
        return self.with_noise(seed, num_draws)

    def estimate(self, params: Params, batch: Batch, num_data: int) -> Tensor:
        """F(γ, S) estimated with the batch standing for all `num_data` rows, scalar, nats."""
        total = self.total_of(params, batch)
        return total if num_data == len(batch) else total + (num_data / len(batch) - 1) * self.share_of(params, batch)


def estimate_of_parts(energy: Energy, params: Params, batch: Batch, num_data: int) -> Tensor:
    """prior(γ) + num_data / rows · share(γ, batch), derived once for all energies that have the parts."""
    return energy.prior(params) + num_data / len(batch) * energy.share(params, batch)


def total_of_parts(energy: Energy, params: Params, data: Data) -> Tensor:
    """prior(γ) + Σ share(γ, batch) in float64, derived once for all energies that have the parts."""
    return data.reduce(lambda batch: energy.share(params, batch).double(), start=energy.prior(params).double())


def share_of(energy: Energy, params: Params, data: Data) -> Tensor:
    """Σ_{z∈data} h(γ, z), scalar, float64; 0 for no rows."""
    start = torch.zeros((), dtype=torch.float64, device=next(iter(params.values())).device)
    return data.reduce(lambda batch: energy.share(params, batch).double(), start=start)


def value_and_gradient(function: Callable[[Params], Tensor], params: Params) -> tuple[float, Params]:
    """(f(γ), ∇f(γ)); an entry that f does not depend on has gradient zero.

    Raises:
        ValueError: the value or the gradient is not finite.
    """
    leaves = {name: value.detach().requires_grad_(True) for name, value in params.items()}
    value = function(leaves)
    if not value.requires_grad:
        return finite(value), {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return finite(value), dict(zip(leaves, found, strict=True))


def gradient_over(function: Callable[[Params, Batch], Tensor], params: Params, data: Data) -> tuple[float, Params]:
    """(Σ f(γ, batch), its gradient), one batch's graph at a time."""

    def of(batch: Batch) -> tuple[Tensor, Params]:
        value, gradient = value_and_gradient(lambda leaves: function(leaves, batch).double(), params)
        return torch.tensor(value, dtype=torch.float64), gradient

    zero = {name: torch.zeros_like(value) for name, value in params.items()}
    value, gradient = data.reduce(of, start=(torch.zeros((), dtype=torch.float64), zero))
    return float(value), gradient


class NonFinite(ValueError):
    """An energy that is NaN or infinite where a number is needed."""


def finite(value: Tensor) -> float:
    """The number of a scalar.

    Raises:
        NonFinite: it is NaN or infinite.
    """
    number = float(value.detach())
    if number != number or number in (float("inf"), float("-inf")):
        raise NonFinite(
            f"The energy is {number}: a log density is not finite at these parameters. Check the data for values "
            "outside the likelihood's support, and the posterior's scales."
        )
    return number
