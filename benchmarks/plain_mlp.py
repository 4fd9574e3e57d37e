"""Mean-field networks of two layers, written by hand in plain PyTorch: how the rivals are fitted and fine-tuned.

Local reparametrisation, one draw a step, every derivative by hand. Nothing here uses the library, so that its
bookkeeping costs the rivals nothing.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Means of (weight, bias) of each layer, then their log standard deviations; weights are (outputs, inputs).
Params = list[Tensor]
Schedule = Callable[[int, float], float | None]
BATCH = 128


@dataclass(frozen=True)
class Rows:
    """Images: x of shape (row, feature), y int64 of shape (row,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: Tensor) -> "Rows":
        return Rows(self.x[rows], self.y[rows])


def start(widths: tuple[int, int, int], seed: int) -> Params:
    """Means as wide as one over the root of the inputs, standard deviations of 0.02."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [shape for i, o in pairwise(widths) for shape in ((o, i), (o,))]
    means = [
        torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) if len(shape) == 2 else torch.zeros(shape)
        for shape in shapes
    ]
    return [*means, *(torch.full(shape, math.log(0.02)) for shape in shapes)]


def gradient(params: Params, batch: Rows, noise: tuple[Tensor, Tensor]) -> Params:
    """Of E_q[−log likelihood], the mean over the batch's rows."""
    w1, b1, w2, b2, *logs = params
    v1, c1, v2, c2 = ((2 * log).exp() for log in logs)
    x, x2 = batch.x, batch.x.square()
    sd1 = torch.addmm(c1, x2, v1.T).sqrt_()
    hidden = torch.addmm(b1, x, w1.T).addcmul_(sd1, noise[0]).relu_()
    hidden2 = hidden.square()
    sd2 = torch.addmm(c2, hidden2, v2.T).sqrt_()
    logits = torch.addmm(b2, hidden, w2.T).addcmul_(sd2, noise[1])
    residual = (logits - logits.logsumexp(-1, keepdim=True)).exp_()
    residual[torch.arange(len(batch)), batch.y] -= 1
    residual /= len(batch)
    slope2 = residual * noise[1] / (2 * sd2)
    back = (residual @ w2).addcmul_(hidden, slope2 @ v2, value=2.0).mul_(hidden > 0)
    slope1 = back * noise[0] / (2 * sd1)
    means = [back.T @ x, back.sum(0), residual.T @ hidden, residual.sum(0)]
    variances = [slope1.T @ x2, slope1.sum(0), slope2.T @ hidden2, slope2.sum(0)]
    return [*means, *(2 * v * slope for v, slope in zip((v1, c1, v2, c2), variances, strict=True))]


def add_divergence(params: Params, found: Params, prior_std: float, num_data: int) -> None:
    """Add the gradient of KL(q ‖ N(0, prior_std²)) / num_data in place."""
    half = len(params) // 2
    for mean, log, mean_slope, log_slope in zip(params, params[half:], found, found[half:], strict=False):
        mean_slope.add_(mean, alpha=1 / (prior_std**2 * num_data))
        log_slope.add_((2 * log).exp_(), alpha=1 / (prior_std**2 * num_data)).sub_(1 / num_data)


def noise(num_rows: int, widths: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Standard normal noise of both layers' outputs."""
    return tuple(torch.randn(num_rows, width, generator=generator) for width in widths)  # type: ignore[return-value]


def noisy_gradient(params: Params, batch: Rows, generator: torch.Generator) -> Params:
    """The gradient under fresh noise."""
    return gradient(params, batch, noise(len(batch), (len(params[1]), len(params[3])), generator))


def descend(
    params: Params,
    rows: Rows,
    prior_std: float,
    rate: float,
    schedule: Schedule,
    seed: int,
    slope: Callable[[Params, Rows, torch.Generator], Params] = noisy_gradient,
    clock: Callable[[], float] = time.process_time,
) -> tuple[Params, int]:
    """(params after Adam, number of steps): batches of 128, fresh noise.

    `schedule(step, seconds since the start)` is the factor of the learning rate, None to stop; `slope` the gradient of
    a batch's mean loss.
    """
    generator = torch.Generator().manual_seed(seed)
    leaves = [value.clone() for value in params]
    optimiser = torch.optim.Adam(leaves, lr=rate)
    step, begun = 0, clock()
    for chosen in batches(len(rows), generator):
        factor = schedule(step, clock() - begun)
        if factor is None:
            break
        optimiser.param_groups[0]["lr"] = rate * factor
        found = slope(leaves, rows[chosen], generator)
        add_divergence(leaves, found, prior_std, len(rows))
        for leaf, own in zip(leaves, found, strict=True):
            leaf.grad = own
        optimiser.step()
        step += 1
    return [leaf.detach() for leaf in leaves], step


def fit(rows: Rows, widths: tuple[int, int, int], prior_std: float, rate: float, epochs: int, seed: int) -> Params:
    """Adam with cosine decay to zero."""
    return descend(start(widths, seed), rows, prior_std, rate, cosine(rows, epochs), seed)[0]


def cosine(rows: Rows, epochs: int) -> Schedule:
    """Decay to zero over so many epochs."""
    total = epochs * (len(rows) // BATCH)

    def schedule(step: int, seconds: float) -> float | None:
        return None if step >= total else 0.5 * (1 + math.cos(math.pi * step / total))

    return schedule


def fine_tune(params: Params, rows: Rows, prior_std: float, rate: float, budget: float, seed: int) -> Params:
    """Adam with linear decay to zero at `budget` CPU seconds."""
    return descend(params, rows, prior_std, rate, linear_decay(budget), seed)[0]


def linear_decay(budget: float) -> Schedule:
    """Decay to zero at so many seconds."""

    def schedule(step: int, seconds: float) -> float | None:
        return None if seconds >= budget else 1 - seconds / budget

    return schedule


def batches(num_rows: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless, shuffled every epoch, the last incomplete batch dropped."""
    size = min(BATCH, num_rows)
    while True:
        yield from torch.randperm(num_rows, generator=generator)[: num_rows // size * size].split(size)


def predictive(params: Params, x: Tensor, num_draws: int, seed: int) -> Tensor:
    """Log of the mean over draws of the classes' probabilities, (row, class); the same noise for every params."""
    w1, b1, w2, b2, *logs = params
    v1, c1, v2, c2 = ((2 * log).exp() for log in logs)
    generator = torch.Generator().manual_seed(seed)
    mean, sd = torch.addmm(b1, x, w1.T), torch.addmm(c1, x.square(), v1.T).sqrt()
    total = x.new_zeros(len(x), len(b2))
    for _ in range(num_draws):
        first, second = noise(len(x), (len(b1), len(b2)), generator)
        hidden = torch.addcmul(mean, sd, first).relu_()
        spread = torch.addmm(c2, hidden.square(), v2.T).sqrt()
        total += torch.addmm(b2, hidden, w2.T).addcmul_(spread, second).softmax(-1)
    return (total / num_draws).log()
