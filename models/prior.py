"""The prior of every weight."""

import pyro.distributions as dist
from torch import Tensor


def normal_prior(like: Tensor, std: float, *shape: int) -> dist.TorchDistribution:
    """N(0, std²) for each entry of one latent of this shape, of the type and device of `like`."""
    return dist.Normal(like.new_zeros(()), like.new_full((), std)).expand(shape).to_event(len(shape))
