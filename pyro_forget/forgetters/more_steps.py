"""Forgetting by sampling on: every draw goes on for a few steps of stochastic-gradient MCMC on the retained data."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_forget.data import Data
from pyro_forget.effects.noise import seeded
from pyro_forget.forgetters.cloud import cloud_of
from pyro_forget.forgetters.health import health_warnings, input_health
from pyro_forget.inference.stochastic import Diverged, Rule
from pyro_forget.inference.stochastic.chains import Chains
from pyro_forget.inference.stochastic.potential import Potential, potential_of_program
from pyro_forget.inference.stochastic.rule import CLIPPED
from pyro_forget.outcome import Edit, Evidence, Forgetter
from pyro_forget.params import Params, gaps
from pyro_forget.posterior import Posterior, SampledPosterior

_NUMBERS_AT_ONCE = 2_000_000  # of draws that move together, or of their rows: memory is bounded whatever their number
_MOST_DRAWS_AT_ONCE = 4096


@dataclass(frozen=True)
class MoreSteps:
    """Every draw moves on as a chain of its own: the cheap way to mend what a map of all draws cannot do.

    Draws keep their places and their weights: the steps have no acceptance that could say what weights became of them.
    Draws that move together share mini-batches, as vectorised chains do, so that their errors are not independent where
    gradients are noisy.

    Attributes:
        rule: the sampler, such as `SGLD(1e-5)`. One that adapts does so over the first half of the steps.
        num_steps: of each draw; more where a schedule lets no draw be taken after so many.
        after: the method that moves the draws before, if any.
        seed: of batches and noise.
        progress: show a bar.
    """

    rule: Rule
    num_steps: int
    after: Forgetter | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"`num_steps` must be at least 1, got {self.num_steps}.")

    def edit(self, posterior: Posterior, erased: Data, retained: Data) -> Edit:
        """The posterior after the steps; refused where they run away, or where `after` is. Nothing erased: the input.

        Raises:
            ValueError: the posterior is not one of draws, or a batch has more rows than are retained.
        """
        draws = cloud_of(posterior, "MoreSteps").posterior
        if len(erased) == 0:
            return Edit(posterior, Evidence(f"{self._words} from each draw", num_draws=draws.num_draws))
        begun = self._begun(draws, erased, retained)
        if begun.evidence.refused is not None:
            return begun
        moved = cloud_of(begun.posterior, "MoreSteps").posterior
        start = time.perf_counter()
        try:
            params, done = self._run(moved, retained)
        except Diverged as error:
            return Edit(posterior, replace(begun.evidence, refused=str(error)))
        size = self.rule.schedule.step_size(0)
        cost = {**done, "seconds": time.perf_counter() - start, "step_size": size}
        evidence = replace(
            begun.evidence,
            num_draws=moved.num_draws,
            step_norm=_lengths(draws, params) or begun.evidence.step_norm,
            extra=begun.evidence.extra | {"refresh": cost},
        )
        return Edit(draws.edited(params, retained.ids, moved.log_weights, take=True), evidence)

    @property
    def _words(self) -> str:
        return f"{self.num_steps} steps of {type(self.rule).__name__}"

    def _begun(self, posterior: SampledPosterior, erased: Data, retained: Data) -> Edit:
        """Draws from which the steps start, and what is known of them."""
        if self.after is None:
            rhat, ess = input_health(posterior)
            said = f"{self._words} on the retained data from each draw"
            return Edit(posterior, Evidence(said, warnings=health_warnings(rhat, ess), rhat_input=rhat, ess_input=ess))
        edit = self.after.edit(posterior, erased, retained)
        said = f"{edit.evidence.method}, then {self._words} on the retained data"
        return Edit(edit.posterior, replace(edit.evidence, method=said))

    def _run(self, posterior: SampledPosterior, data: Data) -> tuple[Params, dict[str, float]]:
        """(all draws after their steps, what to say of them)."""
        lead = posterior.shape
        flat = {name: value.detach().flatten(0, 1) for name, value in posterior.params.items()}
        found = {name: torch.empty_like(value) for name, value in flat.items()}
        groups = list(_groups(flat, self.rule.batch_size or data.num_data))
        potentials: dict[int, Potential] = {}
        steps, cut = 0, []
        with tqdm(total=self.num_steps * len(groups), desc="steps", disable=not self.progress) as bar:
            for number, group in enumerate(groups):
                size = group.stop - group.start
                if size not in potentials:
                    potentials[size] = potential_of_program(posterior.energy.program, data, size)
                start = potentials[size].layout.join({name: value[group] for name, value in flat.items()})
                chains = self._moved(potentials[size], data, start, number, bar)
                steps = chains.number
                if CLIPPED in chains.state:
                    cut.append(chains.state[CLIPPED])
                for name, value in chains.params().items():
                    found[name][group] = value
        said = {"steps": steps, **({"clipped": float(torch.cat(cut).mean())} if cut else {})}
        return {name: value.unflatten(0, lead) for name, value in found.items()}, said

    def _moved(self, potential: Potential, data: Data, start: Tensor, group: int, bar: Any) -> Chains:
        """One group of draws after its steps."""
        seed = seeded(torch.device("cpu"), self.seed, group).initial_seed()
        chains = Chains(potential, self.rule, data, num_warmup=self.num_steps // 2, seed=seed, start=start)
        while chains.number < self.num_steps or chains.exploring:
            chains.step()
            bar.update()
        return chains


def _groups(flat: Params, num_rows: int) -> Iterator[slice]:
    """Draws that move together."""
    num_draws = len(next(iter(flat.values())))
    entries = sum(value[0].numel() for value in flat.values())
    size = min(_MOST_DRAWS_AT_ONCE, max(1, _NUMBERS_AT_ONCE // max(entries, num_rows)))
    return (slice(first, min(first + size, num_draws)) for first in range(0, num_draws, size))


def _lengths(before: SampledPosterior, after: Params) -> dict[str, float]:
    """Root mean square over the draws of how far each site moved; nothing where they are not the same draws."""
    if any(after[name].shape != value.shape for name, value in before.params.items()):
        return {}
    return {name: length / sqrt(before.num_draws) for name, length in gaps(after, before.params).items()}
