"""The rivals on digits, written by hand in plain PyTorch: mean-field softmax regression, vectorised over its draws.

Nothing here uses the library, so that its bookkeeping costs the rivals nothing.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Params = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rows:
    """Data with pinned noise.

    Attributes:
        x: shape (row, feature).
        y: int64, shape (row,).
        noise: standard normal outputs of each row, shape (draw, row, class).
    """

    x: Tensor
    y: Tensor
    noise: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: Tensor) -> "Rows":
        return Rows(self.x[rows], self.y[rows], self.noise[:, rows])


def start(x: Tensor, num_classes: int) -> Params:
    """Means 0, log scales −1."""
    zeros = x.new_zeros(x.shape[1], num_classes)
    return zeros, zeros - 1


def divergence(loc: Tensor, log_scale: Tensor) -> Tensor:
    """KL(q ‖ N(0, 1)), nats."""
    return 0.5 * ((2 * log_scale).exp() + loc.square() - 1).sum() - log_scale.sum()


def share(loc: Tensor, log_scale: Tensor, rows: Rows) -> Tensor:
    """E_q[−log likelihood] by local reparametrisation, nats."""
    std = (rows.x.square() @ (2 * log_scale).exp()).sqrt()
    logits = torch.addcmul(rows.x @ loc, std, rows.noise)
    own = logits.gather(-1, rows.y.expand(len(logits), -1)[..., None])
    # Not cross_entropy, whose softmax takes several times as long over ten classes on a CPU.
    return (logits.logsumexp(-1).sum() - own.sum()) / len(logits)


def energy(loc: Tensor, log_scale: Tensor, rows: Rows) -> Tensor:
    """F(γ, rows), nats."""
    return divergence(loc, log_scale) + share(loc, log_scale, rows)


def gradient(params: Params, function: Callable[..., Tensor], *rest: object) -> tuple[float, Params]:
    """(value, gradient) by autograd."""
    loc, log_scale = (value.detach().requires_grad_(True) for value in params)
    value = function(loc, log_scale, *rest)
    return float(value.detach()), torch.autograd.grad(value, (loc, log_scale))  # type: ignore[return-value]


def blockwise(params: Params, rows: Rows, size: int) -> tuple[float, Params]:
    """The same value and gradient of `energy`, by hand and in blocks that fit the cache: for reference solutions."""
    loc, log_scale = params
    variance = (2 * log_scale).exp()
    value, loc_slope, variance_slope = divergence(*params), loc.clone(), 0.5 * torch.ones_like(variance)
    for block in (rows[chosen] for chosen in torch.arange(len(rows)).split(size)):
        std = (block.x.square() @ variance).sqrt()
        logits = torch.addcmul(block.x @ loc, std, block.noise)
        normaliser = logits.logsumexp(-1, keepdim=True)
        own = block.y.expand(len(logits), -1)[..., None]
        value = value + (normaliser.sum() - logits.gather(-1, own).sum()) / len(logits)
        residual = (logits - normaliser).exp_()
        residual.scatter_add_(-1, own, residual.new_full((), -1.0).expand(own.shape))
        loc_slope += block.x.T @ residual.mean(0)
        variance_slope += block.x.square().T @ (0.5 / std * (residual * block.noise).mean(0))
    return float(value), (loc_slope, 2 * variance * variance_slope - 1)


@dataclass(frozen=True)
class Visit:
    """A point of a minimisation: CPU seconds since it started, and where it was."""

    seconds: float
    params: Params


def minimise(
    slope: Callable[[Params], tuple[float, Params]], params: Params, gradient_norm: float, max_evaluations: int = 1000
) -> list[Visit]:
    """L-BFGS with strong Wolfe line search; every evaluation, the last of which meets `gradient_norm`."""
    leaves = [value.detach().clone() for value in params]
    visits: list[Visit] = []
    aside, begun = 0.0, time.process_time()

    class Done(Exception):
        """Raised to leave the optimiser."""

    def closure() -> float:
        nonlocal aside
        value, found = slope((leaves[0], leaves[1]))
        for leaf, part in zip(leaves, found, strict=True):
            leaf.grad = part
        paused = time.process_time()
        visits.append(Visit(paused - begun - aside, (leaves[0].clone(), leaves[1].clone())))
        size = float(torch.stack([part.norm() for part in found]).norm())
        aside += time.process_time() - paused
        if size <= gradient_norm or len(visits) >= max_evaluations:
            raise Done
        return value

    optimiser = torch.optim.LBFGS(
        leaves,
        max_iter=max_evaluations,
        max_eval=2 * max_evaluations,
        history_size=50,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    try:
        optimiser.step(closure)
    except Done:
        pass
    return visits


def recursion(
    params: Params, rows: Rows, erased: Tensor, scaling: float, num_steps: int, seed: int
) -> Iterator[tuple[int, Params]]:
    """The published recursion for one chunk of erased rows, batch 128, 5 draws: (t, γ + s·v_t) for every t.

    v₀ = ∇h, v_{t+1} = ∇h + v_t − s·H(batch_t)·v_t, every gradient and product vectorised over its 5 draws.

    References:
        S. Fu, F. He and D. Tao (2021), Bayesian inference forgetting, arXiv:2101.06417, section 4.
    """
    generator = torch.Generator().manual_seed(seed)
    force = gradient(params, share, _fresh(rows, erased, generator, 5))[1]
    size, vector = scaling / len(rows), force
    batches = _batches(len(rows), 128, generator)
    for step in range(1, num_steps + 1):
        product = _product(params, _fresh(rows, next(batches), generator, 5), len(rows), vector)
        vector = tuple(f + v - size * p for f, v, p in zip(force, vector, product, strict=True))  # type: ignore[assignment]
        yield step, (params[0] + size * vector[0], params[1] + size * vector[1])


def _product(params: Params, batch: Rows, num_data: int, vector: Params) -> Params:
    """H·vector with the batch standing for all rows: double backward over the likelihood, the KL's part by hand."""
    loc, log_scale = (value.detach().requires_grad_(True) for value in params)
    first = torch.autograd.grad(share(loc, log_scale, batch), (loc, log_scale), create_graph=True)
    found = torch.autograd.grad(first, (loc, log_scale), vector)
    weight = num_data / len(batch)
    return (
        torch.add(vector[0], found[0], alpha=weight),
        torch.add(2 * (2 * params[1]).exp() * vector[1], found[1], alpha=weight),
    )


def fine_tune(params: Params, rows: Rows, num_steps: int, learning_rate: float, seed: int) -> Params:
    """Adam from where the fit stands, on the retained rows; batch 128, one draw, linear decay to zero."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [value.detach().clone() for value in params]
    optimiser = torch.optim.Adam(leaves, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / num_steps)
    batches = _batches(len(rows), 128, generator)
    for _ in range(num_steps):
        batch = _fresh(rows, next(batches), generator, 1)
        weight = len(rows) / len(batch)
        found = gradient((leaves[0], leaves[1]), lambda m, r, b=batch, w=weight: divergence(m, r) + w * share(m, r, b))
        for leaf, part in zip(leaves, found[1], strict=True):
            leaf.grad = part
        optimiser.step()
        schedule.step()
    return leaves[0], leaves[1]


def _fresh(rows: Rows, chosen: Tensor, generator: torch.Generator, num_draws: int) -> Rows:
    """Some rows under new noise."""
    x, num_classes = rows.x[chosen], rows.noise.shape[-1]
    noise = torch.randn(num_draws, len(chosen), num_classes, generator=generator, dtype=x.dtype)
    return Rows(x, rows.y[chosen], noise)


def _batches(num_rows: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    size = min(size, num_rows)
    while True:
        yield from torch.randperm(num_rows, generator=generator)[: num_rows // size * size].split(size)


def independent_pairs(num_pairs: int, num_rows: int, num_classes: int, seed: int) -> Tensor:
    """Antithetic pairs ±ε, independent of each other, shape (2 · pair, row, class)."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(num_pairs, num_rows, num_classes, generator=generator, dtype=torch.float64)
    return torch.cat([half, -half])


def frame_pairs(num_pairs: int, num_rows: int, num_classes: int, seed: int) -> Tensor:
    """Antithetic pairs of a random orthonormal frame for each row, shape (2 · pair, row, class)."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(num_rows, num_pairs, num_classes, generator=generator, dtype=torch.float64)
    half = num_pairs**0.5 * torch.linalg.qr(frames).Q.transpose(0, 1)
    return torch.cat([half, -half]).contiguous()
