"""Sampling to disk: draws stream out, and a run that was stopped, whatever the way, goes on as if it had not been."""

import time
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_forget.data import Data
from pyro_forget.effects.run import Latents
from pyro_forget.inference.stochastic.archive import Archive, block_length
from pyro_forget.inference.stochastic.chains import Chains
from pyro_forget.inference.stochastic.diagnostics import diagnose
from pyro_forget.inference.stochastic.lock import only_writer
from pyro_forget.inference.stochastic.potential import potential_of
from pyro_forget.inference.stochastic.rule import POSITION, Rule
from pyro_forget.inference.stochastic.sampling import Sampling
from pyro_forget.store import digest

_SECONDS = 10.0
_WARMUP_CHUNK = 50


def sample_posterior(
    model: Callable[..., Any],
    kernel: Rule,
    data: Data,
    *,
    store: str | Path,
    num_samples: int = 1000,
    num_chains: int = 4,
    warmup: int = 1000,
    thin: int = 1,
    seed: int = 0,
    start: Mapping[str, Tensor] | None = None,
    resume: bool = False,
    plate: str = "data",
    minibatch_scale: bool = False,
    progress: bool = True,
) -> Sampling:
    """Sample a Pyro model by mini-batches; draws go to `store` as they come, and memory does not grow with them.

    A run that is interrupted or killed is continued by the same call with `resume=True`: state, step sizes, batches
    and noise go on bit for bit, and no draw is lost once the progress bar has counted it. A larger `num_samples`
    makes a finished run longer.

    Args:
        model: the Pyro model.
        kernel: the sampler, such as `SGHMC(1e-4)`.
        data: the model's call, row by row.
        store: a folder.
        num_samples: draws of each chain.
        num_chains: side by side. All see the same mini-batches: each chain has the right law, but where gradients are
            noisy the chains move together, their spread at one moment is too small, and R-hat looks better than it
            is. Chains of different `seed` in stores of their own are independent.
        warmup: steps before the first draw, during which a kernel may adapt.
        thin: steps a draw.
        seed: of starts, batches and noise.
        start: constrained values by site, (*site) for all chains or (chain, *site); None for draws from the prior.
        resume: go on with what is in `store`, if anything is.
        plate: the name of the data plate.
        minibatch_scale: the model scales its data by N/B itself; take that out.
        progress: show a bar.

    Returns:
        The run on disk: `sampling.tree` for ArviZ, `sampling.posterior(model, data)` to forget from.

    Raises:
        ValueError: settings make no sense, the model cannot be taken over, or the store holds another run or is being
            written to.
        Diverged: a chain ran away; the draws before stay.
        OSError: the draws could not be written, such as on a full disk; those before stay, and `resume=True` goes on.
    """
    _check(num_samples=num_samples, num_chains=num_chains, thin=thin, warmup=warmup + 1)
    potential = potential_of(model, data, plate, num_chains=num_chains, minibatch_scale=minibatch_scale)
    chains = Chains(potential, kernel, data, num_warmup=warmup, seed=seed, start=start)
    settings = {
        **{"kernel": described(kernel), "num_chains": num_chains, "warmup": warmup, "thin": thin, "seed": seed},
        **{"plate": plate, "minibatch_scale": minibatch_scale, "num_data": data.num_data},
        **{"ids": digest({"ids": data.ids}, {}), "start": _start(chains), "num_samples": num_samples},
        "sites": {name: [*value.shape[1:], str(value.dtype)] for name, value in chains.latents().items()},
    }
    archive = Archive(Path(store))
    run = _Run(chains, archive, warmup, thin, progress)
    with only_writer(archive.path):
        run.enter(settings, resume)
        run.to_the_end(num_samples)
    return Sampling(archive.path)


class _Run:
    """Chains on their way to an archive."""

    def __init__(self, chains: Chains, archive: Archive, warmup: int, thin: int, progress: bool) -> None:
        self.chains, self.archive, self.warmup, self.thin = chains, archive, warmup, thin
        self.progress, self.count, self.finished = progress, 0, False
        self._draws: list[tuple[Latents, dict[str, Tensor]]] = []
        self._block = block_length(chains.latents())
        self._saved = time.monotonic()

    def enter(self, settings: dict[str, Any], resume: bool) -> None:
        """Begin, or stand where the run in the archive stands."""
        if not self.archive.exists:
            self.archive.create(settings, self.chains.latents(), self._statistics(), self.chains.data.ids)
            self.archive.annotate({"settings": settings, "creation_library": "pyro_forget"})
            return
        refuse_other_run(self.archive, settings, resume)
        self.archive.grow(settings["num_samples"])
        if (self.archive.path / "state.safetensors").exists():
            tensors, header = self.archive.state()
            self.chains.load(tensors, header)
            self.count = header["draws"]

    def to_the_end(self, num_samples: int) -> None:
        """Warm up, draw, write, and say how it went."""
        complete = self.count >= num_samples
        with tqdm(total=num_samples, initial=self.count, desc="sample", disable=not self.progress) as bar:
            self._warm_up(bar)
            while self.count + len(self._draws) < num_samples:
                latents = self.chains.draw(self.thin)
                self._draws.append((latents, self.chains.statistics))
                at_boundary = (self.count + len(self._draws)) % self._block == 0
                if at_boundary or self._is_due() or self.count + len(self._draws) == num_samples:
                    bar.update(self._commit())
                    bar.set_postfix(energy=f"{float(self.chains.energy.mean()):.5g}", refresh=False)
        if not complete or Sampling(self.archive.path).diagnostics is None:
            noise = self.chains.noise_scale().mean()
            found = diagnose(Sampling(self.archive.path).tree, float(noise) if bool(noise.isfinite()) else None)
            self.archive.annotate({"diagnostics": found.to_dict()})

    def _warm_up(self, bar: Any) -> None:
        while self.chains.number < self.warmup:
            self.chains.step()
            if self.chains.number % _WARMUP_CHUNK == 0:
                bar.set_postfix(warmup=f"{self.chains.number}/{self.warmup}", refresh=False)
                if self._is_due():
                    self._commit()

    def _is_due(self) -> bool:
        return time.monotonic() - self._saved > _SECONDS

    def _commit(self) -> int:
        """Write what has been drawn since the last time; how many draws."""
        count = self.count + len(self._draws)
        blocks = {"posterior": _stacked([latents for latents, _ in self._draws])}
        blocks["sample_stats"] = _stacked([statistics for _, statistics in self._draws])
        try:
            self.archive.commit(self.count, blocks, count, *self.chains.save())
        except OSError as error:
            raise OSError(
                error.errno,
                f"The draws could not be written to {self.archive.path} ({error.strerror or error}). The first "
                f"{self.count} of each chain are safe: make room and call again with `resume=True`.",
            ) from error
        written, self.count, self._draws, self._saved = len(self._draws), count, [], time.monotonic()
        return written

    def _statistics(self) -> dict[str, Tensor]:
        """Like the statistics of a step, before any was taken."""
        chains, names = self.chains, ["energy", "step_size", "configurational_temperature", "gradient_norm"]
        if chains.rule.kinetic_temperature(chains.state, 1.0, chains.potential.layout) is not None:
            names.append("kinetic_temperature")
        if chains.rule.max_gradient_norm is not None:
            names.append("clipped")
        return {name: torch.zeros(chains.num_chains, dtype=torch.float64) for name in names}


def described(value: Any) -> Any:
    """A kernel's settings as JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__} | {f.name: described(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return digest({name: torch.as_tensor(one) for name, one in value.items()}, {})
    if isinstance(value, tuple):
        return [described(one) for one in value]
    return value


def refuse_other_run(archive: Archive, settings: Mapping[str, Any], resume: bool) -> None:
    """Raise where a store holds another run, or this one without leave to go on.

    Raises:
        ValueError: it does; the message lists the differences.
    """
    stored = archive.settings
    differences = [
        f"{name} is {stored.get(name)!r} there, {value!r} here"
        for name, value in settings.items()
        if name != "num_samples" and stored.get(name) != value
    ]
    if settings["num_samples"] < stored["num_samples"]:
        differences.append(f"num_samples is {stored['num_samples']} there, {settings['num_samples']} here")
    if differences:
        raise ValueError(
            f"{archive.path} holds another run: {'; '.join(differences)}. Choose another `store`, or the settings of "
            "that run."
        )
    if not resume:
        raise ValueError(
            f"{archive.path} holds {archive.num_draws} draws of this very run: `resume=True` goes on with it; for a "
            "new one choose another `store` or delete that folder."
        )


def _start(chains: Chains) -> str:
    """What tells one start on one data set from another: where the chains begin, and the gradient there."""
    position = chains.state[POSITION]
    batch = next(chains.data.batches())
    gradient = chains.potential.gradient(position, batch, torch.empty_like(position))[1]
    numbers = [float(value) for value in (position.double().sum(), gradient.double().sum())]
    return " ".join(f"{number:.5e}" for number in numbers)


def _stacked(draws: list[Mapping[str, Tensor]]) -> dict[str, np.ndarray]:
    """(chain, draw, *site) by name."""
    names = draws[0] if draws else {}
    return {name: torch.stack([one[name] for one in draws], dim=1).cpu().numpy() for name in names}


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            least = 0 if name == "warmup" else 1
            raise ValueError(f"`{name}` must be at least {least}, got {value - 1 + least}.")
