"""Taking programs over: what every shape of program becomes, and that what is taken over is what Pyro computes."""

import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_forget.data import Data
from pyro_forget.posterior import SampledPosterior, VariationalPosterior
from tests.programs import ADOPTED, REFUSED, WAYS, Program

Posterior = SampledPosterior | VariationalPosterior


def share(posterior: Posterior, data: Data) -> Tensor:
    return data.reduce(lambda batch: posterior.energy.share(posterior.params, batch)).double()


@pytest.mark.parametrize(("name", "by"), WAYS)
def test_energies_of_adopted_programs_add(name: str, by: str) -> None:
    program = ADOPTED[name]()
    posterior = program.posterior(by)
    erased, retained = program.data.split(program.data.ids[[0, 2, -2, -1]])
    whole = posterior.energy.total(posterior.params, program.data)
    rest = posterior.energy.total(posterior.params, retained.with_batch_size(5))
    asked = share(posterior, erased.with_batch_size(3))
    torch.testing.assert_close(whole - rest, asked, rtol=1e-9, atol=1e-9)
    # These are no average rows: the share of other rows would show.
    average = share(posterior, program.data) * len(erased) / len(program.data)
    assert abs(asked - average) > 1e-3 * abs(average)


@pytest.mark.parametrize(("name", "by"), WAYS)
def test_log_likelihoods_of_adopted_programs_are_pyros(name: str, by: str) -> None:
    program = ADOPTED[name]()
    posterior = program.posterior(by)
    drawn = posterior.draws(3)
    if by == "guide":
        ours = posterior.log_likelihood(program.data, num_draws=3)[0]
    else:
        ours, drawn = posterior.log_likelihood(program.data).flatten(0, 1), posterior.draws()
    for place in range(3):
        theirs = pyros_log_likelihood(program, {site: value[place] for site, value in drawn.items()})
        torch.testing.assert_close(ours[place].sum(), theirs, rtol=1e-9, atol=1e-9)


def pyros_log_likelihood(program: Program, latents: dict[str, Tensor]) -> Tensor:
    """The observed sites in the data plate of a plain run of Pyro on all rows."""
    args, kwargs = program.call
    with torch.no_grad():
        model = poutine.condition(program.plain or program.model, data=latents)
        trace = poutine.trace(model).get_trace(*args, **kwargs)
        trace.compute_log_prob()
    sites = [node for node in trace.nodes.values() if node["type"] == "sample" and node["is_observed"]]
    inside = [node for node in sites if program.plate in {frame.name for frame in node["cond_indep_stack"]}]
    return torch.stack([node["log_prob_sum"] for node in inside if "_deterministic" not in node["infer"]]).sum()


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("by", ["guide", "draws"])
def test_refused_programs_say_why(name: str, by: str) -> None:
    make, words = REFUSED[name]
    program = make()
    if by == "guide":
        guide = program.fitted()
        with pytest.raises(ValueError, match=words):
            program.variational(guide)
    else:
        draws = program.draws()
        with pytest.raises(ValueError, match=words):
            SampledPosterior(program.model, draws, program.data, plate=program.plate)
