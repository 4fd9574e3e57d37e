"""An adopted model: what it says of latents and of a batch's rows, at given parameters and noise."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_forget.data import Batch
from pyro_forget.effects.parameters import Parametrised
from pyro_forget.effects.plate import plate_rows
from pyro_forget.effects.random import forked_rng
from pyro_forget.effects.run import Answers, Latents, Recorder
from pyro_forget.effects.site import Site
from pyro_forget.params import Params


@dataclass(frozen=True)
class Run:
    """The sites of one run.

    Attributes:
        sites: every latent, observed and factor site, in the order of the program.
        log_det: Σ log |dθ/du| of latents that were given unconstrained; 0 otherwise.
        num_rows: rows of the batch.
    """

    sites: tuple[Site, ...]
    log_det: Tensor | float
    num_rows: int

    def log_prior(self, skip: frozenset[str] = frozenset()) -> Tensor:
        """Σ log density of everything outside the data plate, with log_det; scalar, nats."""
        terms = [site.log_prob().sum() for site in self.sites if not site.is_data and site.name not in skip]
        return sum(terms, start=torch.as_tensor(self.log_det)) if terms else torch.as_tensor(self.log_det)

    def log_likelihood(self) -> Tensor:
        """Log likelihood by row, summed over the observed sites; shape (rows,), nats."""
        terms = [site.by_row(self.num_rows) for site in self.sites if site.is_data]
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


@dataclass(frozen=True)
class Program:
    """A model with its data plate.

    Attributes:
        model: the user's model and its learned parameters.
        plate: the name of the data plate.
        indexed: whether the model reads its data with the plate's index instead of its arguments.
        template: two made-up rows, for the prior's sake.
        minibatch_of: N where the model scales its data by N/B itself and that is to be taken out; None otherwise.
    """

    model: Parametrised
    plate: str
    indexed: bool
    template: Batch
    minibatch_of: int | None = None

    @staticmethod
    def rebuilt(
        model: Callable[..., Any],
        plate: str,
        indexed: bool,
        template: Batch,
        minibatch_of: int | None,
        free: Collection[str],
        tensors: Params | None = None,
    ) -> "Program":
        """A program from the model's code and the shapes of its call, without data.

        `tensors` are its learned parameters, free or not; None: those it starts with.
        """
        with plate_rows(plate, torch.arange(len(template))), pyro.poutine.block(), forked_rng():
            found = Parametrised.rebuilt(model, lambda: model(*template.args, **template.kwargs), tensors)
        kept = found.frozen([name for name in found.free if name not in free])
        return Program(kept, plate, indexed, template, minibatch_of)

    def run(self, batch: Batch, answers: Answers, params: Params | None = None) -> Run:
        """Run the model on a batch; it must be inside `quiet()` when speed matters or torch.func is around."""
        recorder = self.record(batch, answers, params)
        return Run(tuple(recorder.sites), recorder.log_det, len(batch))

    def record(self, batch: Batch, answers: Answers, params: Params | None = None) -> Recorder:
        """The same, with everything the run came across."""
        indices = batch.rows if self.indexed else torch.arange(len(batch))
        scale = 1.0 if self.minibatch_of is None else len(batch) / self.minibatch_of
        recorder = Recorder(answers, self.plate, scale)
        with plate_rows(self.plate, indices), recorder:
            self.model(params or {}, batch.args, batch.kwargs)
        return recorder


@contextmanager
def quiet() -> Iterator[None]:
    """Pyro's validation off: it looks into tensors, which costs time and fails under `torch.func.vmap`."""
    with pyro.validation_enabled(False):
        yield


def over_draws(function: Callable[..., Any], batched: Mapping[str, Any], num_draws: int) -> Any:
    """`function(batched)` for each draw along the leading dim of every tensor in `batched`, in one pass.

    One draw is run as it is: `vmap` has a price.
    """
    if num_draws == 1:
        alone = function({name: value.squeeze(0) for name, value in batched.items()})
        return torch.utils._pytree.tree_map(lambda value: value.unsqueeze(0), alone)
    return torch.func.vmap(function, randomness="error")(dict(batched))


def latents_log_likelihood(
    program: Program, latents: Latents, num_draws: int, batch: Batch, params: Params | None = None
) -> Tensor:
    """Log likelihood of each row under each of many draws; shape (num_draws, rows), nats."""

    def of(drawn: Latents) -> Tensor:
        return program.run(batch, Answers(drawn), params).log_likelihood()

    with quiet():
        return over_draws(of, latents, num_draws) if latents else of({}).expand(num_draws, -1)
