"""Posteriors: what they draw, what they say of data, that nothing changes them, and that they can be saved."""

import copy
import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import Tensor

from pyro_forget.data import Data
from pyro_forget.energy import share_of
from pyro_forget.posterior import SampledPosterior, VariationalPosterior
from pyro_forget.store import load_tensors, save_tensors
from tests import guide_programs
from tests.guide_programs import GUIDES, data
from tests.programs import ADOPTED, WAYS, Program, linear, on, regression


def variational(name: str = "AutoNormal") -> VariationalPosterior:
    return guide_programs.adopted(name)


def sampled() -> SampledPosterior:
    return ADOPTED["every_support"]().sampled()


def weights(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


# --- draws of a guide


@pytest.mark.parametrize("name", GUIDES)
def test_draws_of_a_guide(name: str) -> None:
    posterior = variational(name)
    first, again = posterior.draws(7), posterior.draws(7)
    assert {site: tuple(value.shape) for site, value in first.items()} == {"weight": (7, 2), "noise": (7,)}
    assert_same(first, again)
    assert not any(value.requires_grad for value in first.values())
    assert bool((first["noise"] > 0).all())
    if name not in guide_programs.POINTS:
        assert not torch.equal(first["weight"], posterior.draws(7, seed=1)["weight"])
        assert len(first["weight"].unique(dim=0)) == 7
    assert posterior.draws(1)["weight"].shape == (1, 2)
    with pytest.raises(ValueError, match="`num_draws` must be at least 1, got 0"):
        posterior.draws(0)


def test_draws_have_the_moments_of_the_guide() -> None:
    posterior = variational("AutoMultivariateNormal")
    draws = posterior.draws(20_000)
    rows = torch.cat([draws["weight"], draws["noise"].log()[:, None]], -1)
    loc, factor = posterior.gaussian.flat()
    covariance = factor @ factor.T
    error = (covariance.diagonal() / 20_000).sqrt()
    assert ((rows.mean(0) - loc).abs() < 5 * error).all()
    spread = (covariance.diagonal().outer(covariance.diagonal()) + covariance.square()).sqrt()
    assert ((rows.T.cov() - covariance).abs() < 5 * spread / math.sqrt(20_000)).all()


def test_log_likelihoods_have_a_chain() -> None:
    posterior, rows = variational(), data()
    found = posterior.log_likelihood(rows, num_draws=9)
    assert found.shape == (1, 9, 24) and not found.requires_grad
    assert torch.equal(found, posterior.log_likelihood(rows.with_batch_size(5), num_draws=9))
    draws = posterior.draws(9)
    mean = draws["weight"] @ regression()[0].T
    expected = dist.Normal(mean, draws["noise"][:, None]).log_prob(regression()[1])
    torch.testing.assert_close(found[0], expected)
    some, _ = rows.split([3, 20])
    torch.testing.assert_close(posterior.log_likelihood(some, num_draws=9), found[..., [3, 20]])


def test_maximum_likelihood_has_no_draws_and_a_likelihood() -> None:
    program = ADOPTED["maximum_likelihood"]()
    posterior = program.variational()
    assert posterior.draws(4) == {}
    found = posterior.log_likelihood(program.data, num_draws=4)
    w = posterior.params["model.w"]
    expected = dist.Normal(regression()[0] @ w, 0.7).log_prob(regression()[1])
    torch.testing.assert_close(found, expected.expand(1, 4, 24))


@pytest.mark.parametrize("name", ["AutoNormal", "positive", "PyroSample", "AutoIAFNormal"])
def test_predictions_are_of_new_rows(name: str) -> None:
    posterior = variational(name)
    x = torch.randn(5, 2)
    found = posterior.predictive(300)(x, torch.zeros(5))
    assert found["y"].shape == (300, 5)
    assert bool((found["y"] != 0).all()), "observed values that are passed are not handed back"
    mean = posterior.draws(4000)["weight"].mean(0) @ x.T
    assert ((found["y"].detach().mean(0) - mean).abs() < 6 * found["y"].std(0) / math.sqrt(300)).all()


# --- an edit changes nothing


@pytest.mark.parametrize("name", ["AutoNormal", "positive", "AutoIAFNormal"])
def test_an_edit_of_a_guide_is_a_new_posterior(name: str) -> None:
    posterior = variational(name)
    before, digest, guide = copy.deepcopy(posterior.params), posterior.digest, posterior.guide
    params = {key: value + 1 for key, value in posterior.params.items()}
    ids = data().ids[3:]
    edited = posterior.edited(params, ids)
    params[next(iter(params))] += 5
    ids += 100
    assert edited.ids.tolist() == list(range(3, 24)) and edited.num_data == 21
    assert all(torch.equal(edited.params[key], value + 1) for key, value in before.items())
    assert (edited.parent, posterior.parent) == (digest, None)
    assert edited.digest != digest == posterior.digest
    assert posterior.num_data == 24 and posterior.guide is guide is not edited.guide
    assert_same(posterior.params, before)
    further = edited.edited(before, edited.ids)
    assert further.parent == edited.digest
    assert_same(further.draws(3), posterior.draws(3))
    assert posterior.with_params(before).parent is None


def test_an_edit_of_draws_is_a_new_posterior() -> None:
    posterior = sampled()
    before, latents, digest = copy.deepcopy(posterior.params), copy.deepcopy(posterior.latents), posterior.digest
    log_weights = weights()
    edited = posterior.edited({key: value + 0.1 for key, value in before.items()}, posterior.ids[2:], log_weights)
    torch.testing.assert_close(edited.log_weights, log_weights - log_weights.logsumexp((0, 1)))
    torch.testing.assert_close(edited.latents["scale"], (before["scale"] + 0.1).exp())
    assert (edited.parent, edited.num_data) == (digest, 22)
    assert posterior.log_weights is None and posterior.digest == digest
    assert_same(posterior.params, before)
    assert_same(posterior.latents, latents)
    assert edited.edited(edited.params, edited.ids).log_weights is None, "weights belong to the draws they came with"
    assert edited.digest != edited.edited(edited.params, edited.ids).digest


def test_a_digest_is_the_same_in_every_process() -> None:
    """Written down once: a digest that changed would cut every posterior from its descendants."""

    def guide(x: Tensor, y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([0.5, -1.0]))
        pyro.sample("w", dist.Normal(loc, pyro.param("scale", torch.tensor(0.25))).to_event(1))

    guide(*regression())
    posterior = VariationalPosterior(linear, guide, Data(*regression()))
    assert posterior.digest == DIGEST
    again = posterior.edited(dict(reversed(posterior.params.items())), posterior.ids)
    assert again.digest == DIGEST


DIGEST = "50259145711dce9d6601c4da3ae96efe2185f3a7bf373266d00f180666a5c5ea"


# --- draws of MCMC


def test_an_mcmc_run_in_one_line() -> None:
    kernel = NUTS(linear)
    mcmc = MCMC(kernel, num_samples=20, warmup_steps=20, num_chains=1, disable_progbar=True)
    mcmc.run(*regression())
    draws = mcmc.get_samples(group_by_chain=True)
    posterior = SampledPosterior(linear, draws, Data(*regression()))
    assert posterior.shape == (1, 20) and posterior.num_draws == 20
    assert torch.equal(posterior.latents["w"], draws["w"])
    with pytest.raises(ValueError, match=r"shape \(20, 2\), without a chain dim: use `MCMC.get_samples\(group_by"):
        SampledPosterior(linear, mcmc.get_samples(), Data(*regression()))


def test_draws_are_in_chain_order_and_spread_when_fewer_are_asked_for() -> None:
    value = torch.arange(12.0).reshape(2, 3, 2)
    posterior = SampledPosterior(linear, {"w": value}, Data(*regression()))
    assert torch.equal(posterior.draws()["w"], value.flatten(0, 1))
    assert torch.equal(posterior.draws(2)["w"], value.flatten(0, 1)[[0, 5]])
    assert torch.equal(posterior.draws(3)["w"][:, 0], torch.tensor([0.0, 4.0, 10.0]))
    assert posterior.draws(20)["w"].shape == (20, 2)
    with pytest.raises(ValueError, match="`num_draws` must be at least 1, got 0"):
        posterior.draws(0)


def test_weighted_draws_are_resampled() -> None:
    posterior = SampledPosterior(linear, {"w": torch.arange(12.0).reshape(2, 3, 2)}, Data(*regression()))
    probabilities = torch.tensor([[0.1, 0.0, 0.4], [0.2, 0.05, 0.25]])
    weighted = posterior.edited(posterior.params, posterior.ids, probabilities.log())
    found = weighted.draws(200)
    counts = torch.stack([(found["w"][:, 0] == 2 * place).sum() for place in range(6)])
    assert (counts - 200 * probabilities.flatten()).abs().max() <= 1
    assert len(weighted.draws()["w"]) == 6
    assert torch.equal(weighted.draws(50)["w"], weighted.draws(50)["w"])
    assert torch.equal(weighted.latents["w"], posterior.latents["w"]), "the cloud itself stays in chain order"


def test_log_likelihoods_of_draws() -> None:
    posterior = SampledPosterior(linear, {"w": torch.randn(2, 3, 2)}, Data(*regression()))
    found = posterior.log_likelihood(Data(*regression()).with_batch_size(5))
    expected = dist.Normal(posterior.latents["w"] @ regression()[0].T, 0.7).log_prob(regression()[1])
    torch.testing.assert_close(found, expected)
    assert found.shape == (2, 3, 24) and not found.requires_grad


def test_predictions_of_draws() -> None:
    posterior = SampledPosterior(linear, {"w": torch.randn(2, 3, 2)}, Data(*regression()))
    assert posterior.predictive()(torch.randn(5, 2))["y"].shape == (6, 5)
    assert posterior.predictive(4)(torch.randn(5, 2), torch.zeros(5))["y"].shape == (4, 5)


@pytest.mark.parametrize(
    ("draws", "words"),
    [
        ({}, r"of the model's latents \['w'\]: missing \['w'\], unknown \[\]"),
        ({"w": (2, 3, 2), "z": (2, 3)}, r"missing \[\], unknown \['z'\]"),
        ({"w": (3, 2)}, r"shape \(3, 2\), without a chain dim: use .*group_by_chain=True.*value\[None\]"),
        ({"w": (2, 3, 4)}, r"shape \(2, 3, 4\); \(chain, draw, \*\(2,\)\) is needed"),
        ({"w": (2, 3, 1, 2)}, r"shape \(2, 3, 1, 2\); \(chain, draw"),
    ],
)
def test_draws_that_are_not_of_the_model(draws: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SampledPosterior(linear, {name: torch.randn(shape) for name, shape in draws.items()}, Data(*regression()))


def test_draws_of_different_lengths() -> None:
    program = ADOPTED["groups"]()
    draws = program.draws()
    with pytest.raises(ValueError, match=r"different numbers of chains and draws: \[\(1, 3\), \(2, 3\)\]"):
        SampledPosterior(program.model, draws | {"level": draws["level"][:1]}, program.data, plate="homes")


def test_chains_of_different_lengths() -> None:
    """One by one, or padded; chains of one length may come as a list."""
    data, chains = Data(*regression()), [torch.randn(4, 2), torch.randn(3, 2)]
    with pytest.raises(ValueError, match=r"chains of 'w' have different lengths, \[4, 3\]: .* `chain\[:3\]`"):
        SampledPosterior(linear, {"w": chains}, data)
    padded = torch.stack([chains[0], torch.cat([chains[1], torch.full((1, 2), math.nan)])])
    with pytest.raises(ValueError, match=r"padded to the length of the others.*cut all chains to the shortest"):
        SampledPosterior(linear, {"w": padded}, data)
    cut = [chain[:3] for chain in chains]
    posterior = SampledPosterior(linear, {"w": cut}, data)
    assert torch.equal(posterior.latents["w"], torch.stack(cut))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 2, 1)])
def test_draws_that_diverged(bad: float, place: tuple[int, int, int]) -> None:
    draws = torch.randn(2, 3, 2)
    draws[place] = bad
    with pytest.raises(ValueError, match=r"Draws of 'w' are not all finite"):
        SampledPosterior(linear, {"w": draws}, Data(*regression()))


@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_draws_outside_the_support(place: tuple[int, int]) -> None:
    program = ADOPTED["every_support"]()
    draws = program.draws()
    draws["low"][place] = 0.5
    with pytest.raises(ValueError, match=r"outside (its|or on the edge of the site's) support"):
        SampledPosterior(program.model, draws, program.data)


def test_a_model_without_latents_has_no_draws() -> None:
    program = ADOPTED["maximum_likelihood"]()
    program.fitted()
    with pytest.raises(ValueError, match="has no latents, so it has no draws"):
        SampledPosterior(program.model, {}, program.data)


def test_draws_are_copied() -> None:
    draws = {"w": torch.randn(2, 3, 2)}
    posterior = SampledPosterior(linear, draws, Data(*regression()))
    before = draws["w"].clone()
    draws["w"] += 1
    assert torch.equal(posterior.params["w"], before)


# --- files


# One is converted from a fit of its own, the other has parameters for every row.
RUN_FIRST = {"AutoLaplace converted", "AutoGaussian"}


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    posterior = variational(name)
    posterior = posterior.edited({key: 1.01 * value for key, value in posterior.params.items()}, posterior.ids[2:])
    path = posterior.save(tmp_path / "posterior.safetensors")
    draws, total = posterior.draws(3), posterior.energy.with_noise(1, 3).total(posterior.params, data())
    pyro.clear_param_store()  # as a new process finds it
    pyro.set_rng_seed(99)
    guide = GUIDES[name]()
    if name == "AutoGaussian":
        with pytest.raises(ValueError, match="first run it on as many rows as it was fitted to"):
            VariationalPosterior.load(path, guide_programs.model, guide)
        guide(*regression())
    state = torch.get_rng_state()
    loaded = VariationalPosterior.load(path, guide_programs.model, guide)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(loaded.params, posterior.params)
    assert torch.equal(loaded.ids, posterior.ids)
    assert (loaded.digest, loaded.parent) == (posterior.digest, posterior.parent)
    assert_same(loaded.draws(3), draws)
    again = loaded.energy.with_noise(1, 3).total(loaded.params, data())
    torch.testing.assert_close(again, total, rtol=1e-12, atol=0)
    assert name in RUN_FIRST or not list(pyro.get_param_store())
    theirs = poutine.trace(loaded.guide).get_trace(*regression())
    assert {"weight", "noise"} <= set(theirs.nodes)
    if isinstance(guide, AutoNormal):
        assert guide.prototype_trace is None, "the guide that was passed stays as it was"


@pytest.mark.parametrize(("name", "by"), [(name, by) for name, by in WAYS if name != "data_frame"])
def test_posteriors_of_all_programs_are_saved_and_loaded(name: str, by: str, tmp_path: Path) -> None:
    program = ADOPTED[name]()
    posterior = program.posterior(by)
    path = posterior.save(tmp_path / "posterior.safetensors")
    pyro.clear_param_store()
    fresh = ADOPTED[name]()
    for given in (None, fresh.data):
        loaded = load(path, by, fresh, given)
        assert loaded.digest == posterior.digest
        torch.testing.assert_close(
            loaded.energy.total(loaded.params, fresh.data), posterior.energy.total(posterior.params, program.data)
        )


def load(path: Path, by: str, program: Program, data: Data | None) -> Any:
    if by == "draws":
        return SampledPosterior.load(path, program.model, data)
    with poutine.block():
        guide = program.guide(program.model)
    pyro.clear_param_store()
    return VariationalPosterior.load(path, program.model, guide, data)


def test_weights_of_draws_are_saved(tmp_path: Path) -> None:
    posterior = sampled()
    weighted = posterior.edited(posterior.params, posterior.ids[1:], weights())
    loaded = SampledPosterior.load(weighted.save(tmp_path / "a.safetensors"), ADOPTED["every_support"]().model)
    assert torch.equal(loaded.log_weights, weighted.log_weights)
    assert (loaded.digest, loaded.parent) == (weighted.digest, posterior.digest)
    assert_same(loaded.draws(5), weighted.draws(5))
    assert loaded.shape == (2, 3)


@pytest.mark.parametrize("frozen", [False, True])
def test_learned_parameters_are_saved_also_where_they_are_frozen(frozen: bool, tmp_path: Path) -> None:
    program = ADOPTED["learned_noise"]()
    guide = program.fitted()
    pyro.get_param_store()._params["noise"].data.fill_(1.5)
    posterior = VariationalPosterior(program.model, guide, program.data, freeze=("noise",) if frozen else ())
    path = posterior.save(tmp_path / "a.safetensors")
    expected = posterior.energy.total(posterior.params, program.data)
    pyro.clear_param_store()
    loaded = VariationalPosterior.load(path, program.model, AutoNormal(program.model))
    torch.testing.assert_close(loaded.energy.total(loaded.params, program.data), expected, rtol=1e-12, atol=0)
    trace = poutine.trace(loaded.model).get_trace(*regression())
    torch.testing.assert_close(trace.nodes["y"]["fn"].scale, torch.tensor(1.5).exp().expand(24))


def test_a_call_that_no_file_holds_needs_its_data(tmp_path: Path) -> None:
    program = ADOPTED["data_frame"]()
    path = program.variational().save(tmp_path / "a.safetensors")
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="does not hold the shapes of the model's arguments: pass `data`"):
        VariationalPosterior.load(path, program.model, AutoNormal(program.model))
    loaded = VariationalPosterior.load(path, program.model, AutoNormal(program.model), program.data)
    assert loaded.num_data == 24


def test_a_file_holds_no_row(tmp_path: Path) -> None:
    for posterior in (variational(), SampledPosterior(linear, {"w": torch.randn(2, 3, 2)}, Data(*regression()))):
        tensors, _ = load_tensors(posterior.save(tmp_path / "a.safetensors"))
        rows = torch.cat([part.flatten() for part in regression()])
        assert not any(bool(torch.isin(rows, value.to(rows)).any()) for value in tensors.values())


def saved(tmp_path: Path) -> Path:
    path = variational().save(tmp_path / "a.safetensors")
    pyro.clear_param_store()
    return path


def test_a_damaged_file(tmp_path: Path) -> None:
    path = saved(tmp_path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="was damaged or changed after it was written"):
        VariationalPosterior.load(path, guide_programs.model, AutoNormal(guide_programs.model))


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="it was cut off"):
        VariationalPosterior.load(path, guide_programs.model, AutoNormal(guide_programs.model))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(ValueError, match="holds a 'variational' posterior: load it with the class it came from"):
        SampledPosterior.load(path, guide_programs.model)
    path = sampled().save(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="holds a 'sampled' posterior"):
        VariationalPosterior.load(path, guide_programs.model, AutoNormal(guide_programs.model))
    save_tensors(path, {}, {})
    with pytest.raises(ValueError, match="holds a None posterior"):
        SampledPosterior.load(path, guide_programs.model)


def test_a_guide_that_is_not_the_saved_one(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(ValueError, match=r"AutoDiagonalNormal has parameters .*the code it was saved from"):
        VariationalPosterior.load(path, guide_programs.model, AutoDiagonalNormal(guide_programs.model))


def test_a_model_that_is_not_the_saved_one(tmp_path: Path) -> None:
    path = saved(tmp_path)
    learned = ADOPTED["learned_noise"]().model
    with pytest.raises(ValueError, match=r"model has parameters \['noise'\], the file \[\]"):
        VariationalPosterior.load(path, learned, AutoNormal(learned))


def test_data_that_are_not_the_posteriors(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(ValueError, match="`data` has other ids than the posterior"):
        VariationalPosterior.load(path, guide_programs.model, AutoNormal(guide_programs.model), data().split([1])[1])
    path = sampled().save(tmp_path / "b.safetensors")
    program = ADOPTED["every_support"]()
    with pytest.raises(ValueError, match="`data` has other ids than the posterior"):
        SampledPosterior.load(path, program.model, program.data.split([1])[1])


def test_the_order_of_the_rows_does_not_matter_when_loading(tmp_path: Path) -> None:
    path = saved(tmp_path)
    x, y = regression()
    turned = Data.of((x.flip(0), y.flip(0)), ids=range(23, -1, -1))
    loaded = VariationalPosterior.load(path, guide_programs.model, AutoNormal(guide_programs.model), turned)
    torch.testing.assert_close(
        share_of(loaded.energy, loaded.params, turned.split([3])[0]),
        share_of(loaded.energy, loaded.params, data().split([3])[0]),
    )


# --- before a fit


def test_a_fit_starts_from_the_guide_as_it_is_or_as_it_is_first_made() -> None:
    guide = AutoNormal(linear)
    state = torch.get_rng_state()
    started = VariationalPosterior.started(linear, guide, Data(*regression()))
    assert guide.prototype_trace is None and not list(pyro.get_param_store())
    assert torch.equal(torch.get_rng_state(), state)
    assert started.parent is None and started.num_data == 24
    fitted = on(linear).fitted()
    again = VariationalPosterior.started(linear, fitted, Data(*regression()))
    assert_same(again.params, on(linear).variational(fitted).params)
