"""Targets of stochastic-gradient samplers, with their exact answers, and chains side by side."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor

from pyro_forget.data import Data
from pyro_forget.inference.stochastic import Rule
from pyro_forget.inference.stochastic.chains import Chains
from pyro_forget.inference.stochastic.layout import Layout
from pyro_forget.inference.stochastic.potential import potential_of
from pyro_forget.inference.stochastic.rule import POSITION, Move, Normals
from tests.oracles import LinearGaussian

PRIOR_STD, NOISE = 2.0, 0.8


def linear_model(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), PRIOR_STD).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def logistic_model(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def correlated(num_data: int = 40) -> LinearGaussian:
    """A posterior that no sign or axis can be mistaken in: means 1, −2 and ½, unequal scales, correlated."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.tensor([[1.0, 0.6, 0.0], [0.0, 0.8, -0.3], [0.0, 0.0, 0.5]]).double()
    x = torch.randn(num_data, 3, generator=generator).double() @ mix
    noise = torch.randn(num_data, generator=generator).double()
    y = x @ torch.tensor([1.0, -2.0, 0.5]).double() + NOISE * noise
    return LinearGaussian(x, y, PRIOR_STD, NOISE)


def chains_of(
    rule: Rule,
    data: Data,
    model: Callable[..., Any] = linear_model,
    num_chains: int = 1,
    start: dict[str, Tensor] | None = None,
    num_warmup: int = 0,
    seed: int = 0,
) -> Chains:
    potential = potential_of(model, data, num_chains=num_chains)
    return Chains(potential, rule, data, num_warmup=num_warmup, seed=seed, start=start)


def ends(rule: Rule, data: Data, num_steps: int, num_chains: int, **options: Any) -> Tensor:
    """Where independent chains stand after so many steps: exact independent draws of their law, (chain, d)."""
    chains = chains_of(rule, data, num_chains=num_chains, **options)
    for _ in range(num_steps):
        chains.step()
    return chains.latents()["w"]


def assert_same_law(draws: Tensor, mean: Tensor, covariance: Tensor, bias: float = 0.0, sigmas: float = 5.0) -> None:
    """Mean and covariance agree within so many standard errors of independent draws, plus a share `bias`."""
    count, found = len(draws), draws.T.cov()
    deviations = covariance.diagonal().sqrt()
    gap = (draws.mean(0) - mean).abs()
    assert bool((gap <= sigmas * deviations / count**0.5 + bias * deviations).all()), (draws.mean(0), mean)
    scale = deviations[:, None] * deviations
    error = ((scale.square() + covariance.square()) / count).sqrt()
    assert bool(((found - covariance).abs() <= sigmas * error + bias * scale).all()), (found, covariance)


def langevin_covariance(target: LinearGaussian, step_size: float) -> Tensor:
    """Of θ ← (I − εP)θ + √(2ε)ξ, exactly."""
    one = np.eye(target.x.shape[1])
    drift = one - step_size * _precision(target)
    return torch.from_numpy(solve_discrete_lyapunov(drift, 2 * step_size * one))


def hamiltonian_covariance(target: LinearGaussian, step_size: float, friction: float) -> Tensor:
    """Of (θ, v) with v ← (1 − α)v − ηPθ + √(2αη)ξ, θ ← θ + v, exactly."""
    one = np.eye(target.x.shape[1])
    pull = step_size * _precision(target)
    drift = np.block([[one - pull, (1 - friction) * one], [-pull, (1 - friction) * one]])
    noise = 2 * friction * step_size * np.kron(np.ones((2, 2)), one)
    return torch.from_numpy(solve_discrete_lyapunov(drift, noise))


def _precision(target: LinearGaussian) -> np.ndarray:
    x = target.x.numpy()
    return x.T @ x / target.noise**2 + np.eye(x.shape[1]) / target.prior_std**2


def moved(rule: Rule, position: Tensor, gradients: list[Tensor], seed: int, **options: Any) -> dict[str, Tensor]:
    """The state after moves with these gradients; the noise is that of `Normals` under `seed`."""
    layout = Layout({"w": position.shape})
    noise = Normals(position, torch.Generator().manual_seed(seed))
    state = {POSITION: position.clone(), **rule.start(position, noise, layout)}
    for number, gradient in enumerate(gradients):
        size = rule.schedule.step_size(number)
        rule.move(state, Move(number, size, 1.0, True, gradient.clone(), noise, layout, **options))
    return state
