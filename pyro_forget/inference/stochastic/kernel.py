"""Stochastic-gradient samplers as kernels of `pyro.infer.MCMC`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_forget.data import Data
from pyro_forget.inference.stochastic.chains import Chains
from pyro_forget.inference.stochastic.potential import potential_of
from pyro_forget.inference.stochastic.rule import POSITION, Rule
from pyro_forget.params import Params


class MiniBatchKernel(MCMCKernel):
    """One chain of a stochastic-gradient sampler that draws its own mini-batches.

    `MCMC(MiniBatchKernel(model, SGLD(1e-4), data), num_samples, warmup_steps).run()`; the draws of
    `get_samples(group_by_chain=True)` are in the sites' supports, as `SampledPosterior` wants them. Every chain takes
    its seed from Pyro's, `pyro.set_rng_seed`, so that several chains differ whether they run one after another or in
    processes of their own. For many chains side by side and more draws than fit into memory: `sample_posterior`.

    Args:
        model: the Pyro model.
        rule: the sampler.
        data: the model's call, row by row.
        plate: the name of the data plate.
        thin: steps a draw; a step of warm-up counts as many.
        start: constrained values by site, (*site); None for a draw from the prior.
        minibatch_scale: the model scales its data by N/B itself; take that out.

    Raises:
        ValueError: the model cannot be taken over; the message says why.
    """

    # Draws leave in the sites' supports: there is nothing for `MCMC` to transform.
    transforms: Mapping[str, Any] = {}

    def __init__(
        self,
        model: Callable[..., Any],
        rule: Rule,
        data: Data,
        *,
        plate: str = "data",
        thin: int = 1,
        start: Mapping[str, Tensor] | None = None,
        minibatch_scale: bool = False,
    ) -> None:
        if thin < 1:
            raise ValueError(f"`thin` must be at least 1, got {thin}.")
        self.model, self.rule, self.data, self.thin = model, rule, data, thin
        self._potential = potential_of(model, data, plate, minibatch_scale=minibatch_scale)
        self._start = start
        self._given: Params | None = None
        self._chains: Chains | None = None
        self._last: Params | None = None
        self._num_warmup = 0

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Start a chain.

        Raises:
            ValueError: the data were passed to `run` as well.
        """
        if args or kwargs:
            raise ValueError("The kernel has its data already: call `MCMC.run()` without arguments.")
        self._num_warmup, self._last = warmup_steps * self.thin, None
        seed = int(torch.randint(2**31, ()))
        self._chains = Chains(
            self._potential, self.rule, self.data, num_warmup=self._num_warmup, seed=seed, start=self._start
        )
        if self._given is not None:
            self._chains.set_position(self._joined(self._given))

    @property
    def initial_params(self) -> Params:
        """Where the chain stands, in the sites' supports."""
        return self._draw()

    @initial_params.setter
    def initial_params(self, params: Params) -> None:
        """Start the chain here, unconstrained, as `MCMC(initial_params=...)` has it."""
        self._given = params

    def sample(self, params: Params) -> Params:
        """The next draw, in the sites' supports.

        Raises:
            Diverged: the energy is not finite.
        """
        chains = self._running
        if self._last is not None and params is not self._last:
            chains.set_position(chains.potential.unconstrained({name: value[None] for name, value in params.items()}))
        for _ in range(self.thin):
            chains.step()
        while chains.exploring and chains.number > self._num_warmup:
            chains.step()
        return self._draw()

    def logging(self) -> dict[str, str]:
        """The energy and the step size, for the progress bar."""
        chains = self._running
        size = self.rule.schedule.step_size(max(chains.number - 1, 0))
        return {"energy": f"{float(chains.energy):.5g}", "step size": f"{size:.2e}"}

    def diagnostics(self) -> dict[str, Any]:
        """Steps taken and the last estimate of the energy, nats."""
        chains = self._running
        return {"steps": chains.number, "energy": float(chains.energy)}

    @property
    def _running(self) -> Chains:
        if self._chains is None:
            raise ValueError("The kernel was not set up: run it by `pyro.infer.MCMC`.")
        return self._chains

    def _draw(self) -> Params:
        self._last = {name: value.squeeze(0) for name, value in self._running.latents().items()}
        return self._last

    def _joined(self, params: Params) -> Tensor:
        layout = self._potential.layout
        views = {name: torch.as_tensor(params[name]).reshape(1, *shape) for name, shape in layout.shapes.items()}
        return layout.join(views).to(self._running.state[POSITION])
