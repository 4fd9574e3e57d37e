"""The prior of every weight."""

from functools import lru_cache

import pyro.distributions as dist
import torch
from torch import Tensor

_KEPT = 1024


def normal_prior(like: Tensor, std: float, *shape: int) -> dist.TorchDistribution:
    """N(0, std²) for each entry of one latent of this shape, of the type and device of `like`."""
    return _normal(std, shape, like.dtype, like.device, torch.is_inference_mode_enabled())


# A network asks for the same few priors at every step, and to build them takes as long as a small layer. Tensors made
# in inference mode are of no use outside of it, so the mode is part of the key.
@lru_cache(_KEPT)
def _normal(
    std: float, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, inference: bool
) -> dist.TorchDistribution:
    # Expanded before, not by the distribution, which would build itself twice.
    loc = torch.zeros((), dtype=dtype, device=device).expand(shape)
    scale = torch.full((), std, dtype=dtype, device=device).expand(shape)
    return dist.Normal(loc, scale).to_event(len(shape))
