"""What was observed: the values at the sites in the data plate."""

import torch
from torch import Tensor

from pyro_forget.data import Batch, Data
from pyro_forget.effects.program import Program, quiet
from pyro_forget.effects.run import Answers
from pyro_forget.effects.site import Site
from pyro_forget.posterior import Posterior, SampledPosterior, VariationalPosterior


def observed(posterior: Posterior, data: Data) -> dict[str, Tensor]:
    """The observed values of these rows by site, each of shape (rows, *site).

    Factors have no value; a sequential plate has a site of its own for each row. Neither is among them.
    """
    program = _program(posterior)
    if program is None:
        return {}
    answers = Answers({name: value[0] for name, value in posterior.draws(1).items()})

    def rows(batch: Batch) -> dict[str, Tensor]:
        with quiet(), torch.no_grad():
            sites = program.run(batch, answers).sites
        return {site.name: value for site in sites if (value := _rows_last(site)) is not None}

    def of(name: str) -> Tensor:
        return data.gather(lambda batch: rows(batch)[name]).movedim(-1, 0)

    return {name: of(name) for name in rows(program.template)}


def _program(posterior: Posterior) -> Program | None:
    if isinstance(posterior, SampledPosterior):
        return posterior.energy.program
    if isinstance(posterior, VariationalPosterior):
        return posterior.energy.whole.program
    return None


def _rows_last(site: Site) -> Tensor | None:
    """The value, which may be smaller than the plates it broadcasts to, with the data plate's dim at the end."""
    if not site.is_data or site.frame is None or site.frame.dim is None or site.value.numel() == 0:
        return None
    return site.value.expand(site.fn.shape()).movedim(site.frame.dim - site.fn.event_dim, -1)
