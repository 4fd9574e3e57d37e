"""The prior of every weight."""

import pyro.distributions as dist
import torch
from torch import Tensor


def normal_prior(like: Tensor, std: float, *shape: int) -> dist.TorchDistribution:
    """N(0, std²) for each entry of one latent of this shape, of the type and device of `like`."""
    # Expanded before, not by the distribution, which would build itself twice.
    loc = torch.zeros((), dtype=like.dtype, device=like.device).expand(shape)
    scale = torch.full((), std, dtype=like.dtype, device=like.device).expand(shape)
    return dist.Normal(loc, scale).to_event(len(shape))
