"""Mean-field LeNet-5 in plain PyTorch: how the rivals are fitted and fine-tuned.

Local reparametrisation at every output, positions of a convolution included, one draw a step; derivatives by autograd.
Nothing here uses the library. Params are means of (weight, bias) of each layer, then their log standard deviations.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.plain_mlp import Params, Rows, cosine, descend, linear_decay

SHAPES = ((6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84))
START_LOG_STD = math.log(0.02)
Map = Callable[[Tensor, Tensor, Tensor], Tensor]


def start(seed: int) -> Params:
    """Means as wide as one over the root of the inputs of a unit, standard deviations of 0.02."""
    generator = torch.Generator().manual_seed(seed)
    means = []
    for shape in SHAPES:
        weight = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        means += [weight, torch.zeros(shape[0])]
    return [*means, *(torch.full_like(mean, START_LOG_STD) for mean in means)]


def logits(params: Params, x: Tensor, generator: torch.Generator) -> Tensor:
    """Of images (row, 1, 32, 32) under fresh noise, (row, 10)."""
    half = len(params) // 2
    hidden, last = x, len(SHAPES) - 1
    for place, shape in enumerate(SHAPES):
        layer: Map = F.conv2d if len(shape) == 4 else F.linear
        hidden = hidden if len(shape) == 4 else hidden.flatten(1)
        weight, bias, log_weight, log_bias = (params[2 * place + part] for part in (0, 1, half, half + 1))
        variance = layer(hidden.square(), (2 * log_weight).exp(), (2 * log_bias).exp())
        mean = layer(hidden, weight, bias)
        # Where all that comes in is zero the root has no slope; the bias's variance keeps it above.
        hidden = mean + variance.sqrt() * torch.randn(mean.shape, generator=generator)
        if place != last:
            hidden = hidden.relu()
        if len(shape) == 4:
            hidden = F.max_pool2d(hidden, 2)
    return hidden


def gradient(params: Params, batch: Rows, generator: torch.Generator) -> Params:
    """Of E_q[−log likelihood], the mean over the batch's rows."""
    leaves = [value.detach().requires_grad_() for value in params]
    loss = F.cross_entropy(logits(leaves, batch.x, generator), batch.y)
    return list(torch.autograd.grad(loss, leaves))


def fit(rows: Rows, prior_std: float, rate: float, epochs: int, seed: int) -> Params:
    """Adam with cosine decay to zero."""
    return descend(start(seed), rows, prior_std, rate, cosine(rows, epochs), seed, gradient)[0]


def fine_tune(params: Params, rows: Rows, prior_std: float, rate: float, budget: float, seed: int) -> Params:
    """Adam with linear decay to zero at `budget` CPU seconds."""
    return descend(params, rows, prior_std, rate, linear_decay(budget), seed, gradient)[0]


@torch.no_grad()
def predictive(params: Params, x: Tensor, num_draws: int, seed: int) -> Tensor:
    """Log of the mean over draws of the classes' probabilities, (row, class); the same noise for every params."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.stack([logits(params, x, generator).softmax(-1) for _ in range(num_draws)]).mean(0)
    return total.log()
