"""Fits of the network: a mean-field guide by SVI, or draws of SGLD and SGHMC; kept for the cells that share them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from experiments.fashion_mnist.settings import Settings
from pyro_forget.data import Data
from pyro_forget.energy import estimate_and_gradient
from pyro_forget.guides import MeanField, local_reparametrization
from pyro_forget.inference.fit import fit_guide
from pyro_forget.inference.stochastic import SGHMC, SGLD, RobbinsMonro, Rule
from pyro_forget.inference.stochastic.chains import Chains
from pyro_forget.inference.stochastic.potential import potential_of
from pyro_forget.params import axpy
from pyro_forget.posterior import Posterior, SampledPosterior, VariationalPosterior
from pyro_forget.store import digest

INITIAL_STD = 0.1
BATCH_SIZE = 128
STEPS_TO_A_TENTH = 4_000
OWN = ("method", "num_erased", "scaling", "recursion_steps", "finetune_steps", "sampler_steps", "data_root", "download")


def fitted(settings: Settings, data: Data, seed: int) -> Posterior:
    """A fit from initial values, batches and noise of this seed."""
    torch.manual_seed(seed)
    return _svi(settings, data, seed) if settings.fit == "svi" else _sampled(settings, data, seed)


def kept(settings: Settings, data: Data, seed: int, folder: Path) -> Posterior:
    """The same, read from FOLDER where it was fitted before."""
    shared = {name: value for name, value in asdict(settings).items() if name not in OWN}
    path = folder / f"seed{seed}-{digest({'ids': data.ids}, shared)[:12]}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fitted(settings, data, seed).save(path)  # type: ignore[attr-defined]
    if settings.fit != "svi":
        return SampledPosterior.load(path, settings.model, data)
    model = local_reparametrization(settings.model)
    return VariationalPosterior.load(path, model, MeanField(model), data)


def _svi(settings: Settings, data: Data, seed: int) -> VariationalPosterior:
    pyro.clear_param_store()
    model = local_reparametrization(settings.model)
    guide = MeanField(model, init_loc_fn=initial_means, init_scale=settings.guide_std)
    if settings.optimiser == "sgd":
        return _descended(settings, VariationalPosterior.started(model, guide, data, seed=seed), data, seed)
    return fit_guide(
        model,
        guide,
        data,
        num_steps=settings.num_steps,
        learning_rate=settings.learning_rate,
        batch_size=BATCH_SIZE,
        num_draws=settings.guide_draws,
        polish=None,
        seed=seed,
        progress=False,
    ).posterior


def _descended(settings: Settings, start: VariationalPosterior, data: Data, seed: int) -> VariationalPosterior:
    """Plain stochastic gradient descent, as published."""
    params, batches = start.params, data.minibatches(BATCH_SIZE, torch.Generator().manual_seed(seed))
    for step in range(settings.num_steps):
        energy = start.energy.with_fresh_noise(seed * 1_000_003 + step, settings.guide_draws)
        _, gradient = estimate_and_gradient(energy, params, next(batches), data.num_data)
        size = settings.step_size / data.num_data * 0.1 ** (step // STEPS_TO_A_TENTH)
        params = axpy(-size, gradient, params)
    return start.with_params(params)


def _sampled(settings: Settings, data: Data, seed: int) -> SampledPosterior:
    template = pyro.poutine.trace(settings.model).get_trace(*next(data.batches()).args)
    sites = [(name, node["value"].shape) for name, node in template.nodes.items() if node["type"] == "sample"]
    start = {name: INITIAL_STD * torch.randn(shape) for name, shape in sites if name not in ("y", "data")}
    chains = Chains(potential_of(settings.model, data), rule(settings, data.num_data), data, seed=seed, start=start)
    draws: list[dict[str, Tensor]] = []
    for number in range(settings.num_steps + settings.num_draws * settings.thin):
        chains.step()
        if number >= settings.num_steps and (number + 1 - settings.num_steps) % settings.thin == 0:
            draws.append(chains.latents())
    stacked = {name: torch.stack([draw[name] for draw in draws], 1) for name in draws[0]}
    return SampledPosterior(settings.model, stacked, data)


def rule(settings: Settings, num_data: int) -> Rule:
    """The sampler of a fit to so many images."""
    schedule = RobbinsMonro(settings.step_size / num_data, settings.decay)
    if settings.fit == "sgld":
        return SGLD(schedule, batch_size=BATCH_SIZE)
    return SGHMC(schedule, friction=settings.friction, batch_size=BATCH_SIZE)


def last_rule(settings: Settings) -> Rule:
    """The sampler as it was at the fit's last step, without further decay."""
    found = rule(settings, settings.num_train)
    size = found.schedule.step_size(settings.num_steps + settings.num_draws * settings.thin - 1)
    if settings.fit == "sgld":
        return SGLD(size, batch_size=BATCH_SIZE)
    return SGHMC(size, friction=settings.friction, batch_size=BATCH_SIZE)


def initial_means(site: dict[str, Any]) -> Tensor:
    """Means that differ between the units of a layer; of the guide at this site, the same on every device."""
    like = site["fn"].mean
    return (INITIAL_STD * torch.randn(like.shape)).to(like.device)
