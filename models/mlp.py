"""The multilayer perceptron."""

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_forget.models.layers import linear


@dataclass(frozen=True)
class MLP:
    """y ~ Categorical(softmax(f(x))), f a network of linear layers with ReLU between them, weights ~ N(0, prior_std²).

    Latents: `layer0.weight` (widths[1], widths[0]), `layer0.bias` (widths[1],), `layer1.weight`, …

    Attributes:
        widths: of the inputs, of each hidden layer and of the output, such as (784, 400, 400, 10).
        prior_std: of each weight and bias.

    Raises:
        ValueError: if there is no layer.

    Example:
        >>> import torch
        >>> MLP(widths=(784, 400, 400, 10))(torch.ones(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    widths: tuple[int, ...]
    prior_std: float = 1.0

    def __post_init__(self) -> None:
        if len(self.widths) < 2:
            raise ValueError(f"`widths` needs the inputs and the outputs at least, got {self.widths}.")

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The logits of each row, shape (num_rows, widths[-1]); inputs of several dimensions are flattened."""
        hidden = x.flatten(1)
        *inner, num_classes = self.widths[1:]
        for depth, width in enumerate(inner):
            hidden = torch.relu(linear(f"layer{depth}", hidden, width, self.prior_std))
        logits = linear(f"layer{len(inner)}", hidden, num_classes, self.prior_std)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits
