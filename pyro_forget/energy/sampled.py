"""The energy of a cloud of draws: the mean over the draws of −log joint, in unconstrained space."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_forget.data import Batch, Data
from pyro_forget.effects.program import Program, over_draws, quiet
from pyro_forget.effects.run import Answers, Latents
from pyro_forget.energy.protocol import estimate_of_parts, total_of_parts
from pyro_forget.params import Params, add


@dataclass(frozen=True)
class SampledEnergy:
    """F(γ, S) = mean over draws of −log p(θ + γ, S), log-Jacobian included.

    With γ of a site's shape the whole cloud moves; with the draws' shape each draw moves on its own.

    Attributes:
        program: the model.
        shapes: unconstrained shape of each site.
        origin: the cloud that γ shifts, (chain, draw, *site) by site; None where γ is the cloud itself.
    """

    program: Program
    shapes: dict[str, torch.Size]
    origin: Params | None = None

    def shifted(self, cloud: Params) -> "SampledEnergy":
        """The energy as a function of a shift of `cloud`."""
        return SampledEnergy(self.program, self.shapes, cloud)

    def prior(self, params: Params) -> Tensor:
        """Mean over draws of −log prior, scalar, nats."""
        return -self.log_prior(self.cloud(params)).double().mean()

    def share(self, params: Params, batch: Batch) -> Tensor:
        """Mean over draws of −log likelihood, summed over the batch's rows, scalar, nats."""
        return -self.log_likelihood_of(self.cloud(params), batch).double().sum(-1).mean()

    def total(self, params: Params, data: Data) -> Tensor:
        """F(γ, data), scalar, nats."""
        return total_of_parts(self, params, data)

    def with_noise(self, seed: int, pairs: int | None = None) -> "SampledEnergy":
        """Itself: draws are all its noise."""
        return self

    def with_fresh_noise(self, seed: int, num_draws: int) -> "SampledEnergy":
        """The energy of `num_draws` of the cloud's draws, chosen at random."""
        if self.origin is None:
            return self
        flat = {name: value.reshape(-1, *self.shapes[name]) for name, value in self.origin.items()}
        count = len(next(iter(flat.values())))
        chosen = torch.randint(count, (1, num_draws), generator=torch.Generator().manual_seed(seed))
        return self.shifted({name: value[chosen] for name, value in flat.items()})

    def estimate(self, params: Params, batch: Batch, num_data: int) -> Tensor:
        """F(γ, S) estimated with the batch standing for all `num_data` rows, scalar, nats."""
        return estimate_of_parts(self, params, batch, num_data)

    def cloud(self, params: Params) -> Params:
        """The draws that γ stands for, (chain, draw, *site)."""
        return params if self.origin is None else add(self.origin, params)

    def log_joint(self, cloud: Params, data: Data) -> Tensor:
        """Log p(θ, data) + log |dθ/du| of every draw, shape (chain, draw), nats, float64."""
        return data.reduce(
            lambda batch: self.log_likelihood_of(cloud, batch).double().sum(-1), start=self.log_prior(cloud).double()
        )

    def log_prior(self, cloud: Params) -> Tensor:
        """Log p(θ) + log |dθ/du| of every draw, shape (chain, draw)."""
        template = self.program.template
        return self._over(
            cloud, lambda values: self.program.run(template, Answers(values, unconstrained=True)).log_prior()
        )

    def log_likelihood_of(self, cloud: Params, batch: Batch) -> Tensor:
        """Of every draw and row, shape (chain, draw, row)."""
        return self._over(
            cloud, lambda values: self.program.run(batch, Answers(values, unconstrained=True)).log_likelihood()
        )

    def constrain(self, cloud: Params) -> Latents:
        """The draws in their supports, (chain, draw, *site)."""
        template = self.program.template

        def of(values: Params) -> Latents:
            sites = self.program.run(template, Answers(values, unconstrained=True)).sites
            return {site.name: site.value for site in sites if not site.observed}

        return self._over(cloud, of)

    def _over(self, cloud: Params, function):
        """`function` of each draw, in the draws' leading shape (chain, draw)."""
        lead = draws_shape(cloud, self.shapes)
        flat = {name: value.reshape(-1, *self.shapes[name]) for name, value in cloud.items()}
        with quiet():
            found = over_draws(function, flat, len(next(iter(flat.values()))))
        return torch.utils._pytree.tree_map(lambda value: value.reshape(*lead, *value.shape[1:]), found)


def draws_shape(cloud: Params, shapes: dict[str, torch.Size]) -> torch.Size:
    """The leading dims of a cloud, (chain, draw)."""
    name, value = next(iter(cloud.items()))
    return value.shape[: value.ndim - len(shapes[name])]
