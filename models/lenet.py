"""LeNet-5."""

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch.nn.functional as F
from torch import Tensor

from pyro_forget.models.layers import conv2d, linear


@dataclass(frozen=True)
class LeNet:
    """y ~ Categorical(softmax(f(x))), f LeNet-5 for images of 32 × 32, its weights ~ N(0, prior_std²).

    There are 61,706 of them for grey images, 62,006 for colours.

    Two convolutions (6 and 16 channels, kernels of 5 × 5, ReLU, max-pooled by 2) and layers of 400-120-84-num_classes
    with ReLU between them. Latents: `conv1.weight`, `conv1.bias`, `conv2`, `linear1`, `linear2`, `linear3` likewise.

    Attributes:
        num_classes: classes 0, 1, …
        prior_std: of each weight and bias.

    References:
        Y. LeCun, L. Bottou, Y. Bengio and P. Haffner (1998), Gradient-based learning applied to document recognition,
        section II.B; ReLU, max-pooling and the softmax replace its activations, sub-sampling and output layer.

    Example:
        >>> import torch
        >>> LeNet()(torch.zeros(5, 1, 32, 32)).shape
        torch.Size([5, 10])
    """

    num_classes: int = 10
    prior_std: float = 0.15

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The logits of each image, shape (num_rows, num_classes); x has shape (num_rows, channels, 32, 32)."""
        if x.ndim != 4 or x.shape[2:] != (32, 32):
            shape = tuple(x.shape)
            raise ValueError(f"LeNet takes images of shape (num_rows, channels, 32, 32), got {shape}: resize or pad.")
        hidden = F.max_pool2d(F.relu(conv2d("conv1", x, 6, 5, self.prior_std)), 2)
        hidden = F.max_pool2d(F.relu(conv2d("conv2", hidden, 16, 5, self.prior_std)), 2)
        hidden = F.relu(linear("linear1", hidden.flatten(1), 120, self.prior_std))
        hidden = F.relu(linear("linear2", hidden, 84, self.prior_std))
        logits = linear("linear3", hidden, self.num_classes, self.prior_std)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits
