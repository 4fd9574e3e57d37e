"""Layers of networks whose weights are latents."""

import pyro
import torch.nn.functional as F
from torch import Tensor

from pyro_forget.models.prior import normal_prior


def linear(name: str, x: Tensor, num_outputs: int, prior_std: float) -> Tensor:
    """A layer x Wᵀ + b with latents `<name>.weight` (num_outputs, num_inputs) and `<name>.bias`."""
    weight = pyro.sample(f"{name}.weight", normal_prior(x, prior_std, num_outputs, x.shape[-1]))
    bias = pyro.sample(f"{name}.bias", normal_prior(x, prior_std, num_outputs))
    return F.linear(x, weight, bias)


def conv2d(name: str, x: Tensor, num_outputs: int, kernel_size: int, prior_std: float) -> Tensor:
    """A convolution of (rows, channels, height, width), without padding; latents as `nn.Conv2d` names them."""
    weight = pyro.sample(
        f"{name}.weight", normal_prior(x, prior_std, num_outputs, x.shape[1], kernel_size, kernel_size)
    )
    bias = pyro.sample(f"{name}.bias", normal_prior(x, prior_std, num_outputs))
    return F.conv2d(x, weight, bias)
