"""The published recursion of Bayesian inference forgetting, as its authors run it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pyro_forget.curvature.hessian import gradient_graph, product_of
from pyro_forget.data import Batch, Data
from pyro_forget.energy import Energy, NonFinite, gradient_over
from pyro_forget.params import Params, add, axpy, map_params, scale


@dataclass(frozen=True)
class Recursion:
    """γ ← γ + H⁻¹∇h for one chunk of data after another, H⁻¹∇h by the Neumann recursion on fresh batches and draws.

    H is of the energy over S with the chunk in it; the chunk leaves afterwards. No damping, no residual, no test of
    divergence.

    Attributes:
        scaling: s·n, tuned by hand until the recursion converges.
        num_steps: T.
        batch_size: rows of a product.
        num_draws: draws of every gradient and product.
        chunk: rows erased at a time.
        seed: of batches and draws.

    References:
        S. Fu, F. He and D. Tao (2021), Bayesian inference forgetting, arXiv:2101.06417, section 4 and algorithm 1.
    """

    scaling: float = 0.1
    num_steps: int = 64
    batch_size: int = 128
    num_draws: int = 5
    chunk: int = 64
    seed: int = 0

    def run(self, energy: Energy, params: Params, erased: Data, everything: Data) -> Params:
        """The params after all chunks; NaN where it diverged."""
        generator = torch.Generator().manual_seed(self.seed)
        left = everything
        for ids in erased.ids.split(self.chunk):
            chunk = erased.split(ids)[0]
            try:
                params = add(params, self._influence(energy, params, chunk, left, generator))
            except NonFinite:
                return map_params(lambda value: torch.full_like(value, torch.nan), params)
            left = left.split(ids)[1]
        return params

    def influence(self, force: Params, product: Callable[[Params], Params], num_data: int) -> Params:
        """s·v_T of v₀ = ∇h, v_{t+1} = ∇h + v_t − s·H·v_t; each `product` is of a fresh batch at fresh draws."""
        step, vector = self.scaling / num_data, force
        for _ in range(self.num_steps):
            vector = axpy(-step, product(vector), add(force, vector))
        return scale(vector, step)

    def _influence(self, energy: Energy, params: Params, chunk: Data, data: Data, generator: torch.Generator) -> Params:
        """H⁻¹∇h of the chunk, with all `data` in H."""
        _, force = gradient_over(self._fresh(energy, generator).share, params, chunk)
        batches = data.minibatches(self.batch_size, generator)

        def product(vector: Params) -> Params:
            fresh = self._fresh(energy, generator)
            return self._product(fresh, params, next(batches), data.num_data, vector)

        return self.influence(force, product, data.num_data)

    def _fresh(self, energy: Energy, generator: torch.Generator) -> Energy:
        seed = int(torch.randint(2**31, (1,), generator=generator))
        return energy.with_fresh_noise(seed, self.num_draws)

    def _product(self, energy: Energy, params: Params, batch: Batch, num_data: int, vector: Params) -> Params:
        """H·vector with the batch standing for all data."""

        def total(leaves: Params) -> torch.Tensor:
            return energy.estimate(leaves, batch, num_data)

        return product_of(gradient_graph(total, params), vector, keep=False)
