"""Newton's method over affine maps, against Gaussians, where the map is known."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyro_forget.inference.affine_newton import AffineNewton, AffineProblem


def whitened(num_draws: int = 200, dim: int = 3) -> Tensor:
    """Draws whose mean is 0 and whose covariance is the identity, to the last digit."""
    draws = torch.randn(num_draws, dim, generator=torch.Generator().manual_seed(0))
    centred = draws - draws.mean(0)
    factor = torch.linalg.cholesky(centred.T @ centred / num_draws)
    return torch.linalg.solve_triangular(factor, centred.T, upper=False).T


def precision(seed: int, dim: int = 3) -> Tensor:
    root = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed))
    return root @ root.T + 0.5 * torch.eye(dim)


def gaussian(mean: Tensor, p: Tensor) -> tuple[Callable, Callable]:
    """(log density with gradient, mean Hessian of −log density)."""

    def log_target(rows: Tensor) -> tuple[Tensor, Tensor]:
        gap = rows - mean
        return -0.5 * ((gap @ p) * gap).sum(-1), -gap @ p

    return log_target, lambda rows: p


def problem(wider: float = 1.0) -> tuple[AffineProblem, Tensor, Tensor]:
    """From N(1, P₀⁻¹), `wider` draws of it, to N(−2, P₁⁻¹), of precisions that do not commute."""
    before, after = precision(1), precision(2)
    draws = 1.0 + wider * whitened() @ torch.linalg.cholesky(torch.linalg.inv(before)).T
    mean = torch.tensor([-2.0, 3.0, 0.5])
    log_target, hessian = gaussian(mean, after)
    return AffineProblem(draws, log_target, hessian, torch.zeros(3), before), mean, after


def moments(draws: Tensor) -> tuple[Tensor, Tensor]:
    centred = draws - draws.mean(0)
    return draws.mean(0), centred.T @ centred / len(draws)


@pytest.mark.parametrize("wider", [1.0, 1.4])
def test_between_gaussians_it_is_exact_and_keeps_what_is_wider(wider: float) -> None:
    task, mean, after = problem(wider)
    through, fall = AffineNewton().run(task)
    found, covariance = moments(through(task.draws))
    torch.testing.assert_close(found, mean)
    torch.testing.assert_close(covariance, wider**2 * torch.linalg.inv(after))
    torch.testing.assert_close(through.matrix, through.matrix.T)
    assert fall > 1


def test_a_tilt_is_carried_over() -> None:
    """What the draws' mean gradient lacks of zero is an error of theirs, and stays."""
    task, mean, after = problem()
    tilt = torch.tensor([0.3, -1.0, 2.0])
    through, _ = AffineNewton().run(replace(task, tilt=tilt))
    torch.testing.assert_close(moments(through(task.draws))[0], mean + torch.linalg.solve(after, tilt))


def test_where_nothing_changes_it_stays() -> None:
    task, *_ = problem()
    log_target, hessian = gaussian(task.draws.mean(0), task.hessian_before)
    through, fall = AffineNewton().run(replace(task, log_target=log_target, hessian=hessian))
    assert fall == 0 and torch.equal(through.matrix, torch.eye(3))
    torch.testing.assert_close(through(task.draws), task.draws)


def test_from_beside_a_saddle_it_goes_down() -> None:
    """Indefinite curvature is damped, and no step is kept that does not lower the energy."""

    def log_target(rows: Tensor) -> tuple[Tensor, Tensor]:
        return -(0.25 * rows.pow(4) - 2 * rows.square()).sum(-1), -(rows.pow(3) - 4 * rows)

    def hessian(rows: Tensor) -> Tensor:
        return (3 * rows.square() - 4).mean(0).diag()

    draws = 0.1 * whitened(100, 2) + torch.tensor([0.3, -0.2])
    task = AffineProblem(draws, log_target, hessian, torch.zeros(2), 100 * torch.eye(2))
    assert float(torch.linalg.eigvalsh(hessian(draws))[0]) < 0
    through, fall = AffineNewton(max_sweeps=30).run(task)
    assert fall > 5
    assert torch.allclose(through(draws).mean(0).abs(), torch.full((2,), 2.0), atol=0.2)
