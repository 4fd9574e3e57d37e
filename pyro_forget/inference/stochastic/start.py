"""Where chains start."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_forget.data import Data
from pyro_forget.effects.adoption import prior_latents
from pyro_forget.effects.noise import seeded
from pyro_forget.effects.run import Latents
from pyro_forget.inference.stochastic.potential import Potential


def starts(potential: Potential, data: Data, seed: int, start: Mapping[str, Tensor] | None) -> Latents:
    """Where chains start, constrained, (chain, *site).

    Raises:
        ValueError: `start` has other sites or shapes.
    """
    num_chains = potential.layout.num_chains
    if start is None:
        batch = next(data.batches())
        seeds = [seeded(torch.device("cpu"), seed, 2, chain).initial_seed() for chain in range(num_chains)]
        drawn = [prior_latents(potential.program, batch, chain) for chain in seeds]
        return {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}
    known = prior_latents(potential.program, next(data.batches()))
    if set(start) != set(known):
        raise ValueError(f"`start` must have the model's latents {sorted(known)}, got {sorted(start)}.")
    found = {}
    for name, like in known.items():
        value = torch.as_tensor(start[name]).to(like)
        if value.shape not in (like.shape, (num_chains, *like.shape)):
            raise ValueError(
                f"`start` has shape {tuple(value.shape)} for '{name}': {tuple(like.shape)}, or the same after the "
                f"{num_chains} chains, is needed."
            )
        found[name] = value.expand(num_chains, *like.shape).clone()
    return found
