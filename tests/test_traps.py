"""Traps of Pyro that were met once: each would make forgetting silently do nothing, or do it to the wrong thing."""

import copy
import gc
import weakref
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoNormal
from pyro.optim import Adam
from torch import Tensor

from pyro_forget.data import Data
from pyro_forget.posterior import VariationalPosterior
from tests.guide_programs import GUIDES, LOCAL_PARAMS, POINTS, adopted, data, fitted, model
from tests.programs import regression

MEDIANS = ["AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal", "AutoGuideList", "MeanField"]


def moved(posterior: VariationalPosterior, by: float = 0.5) -> VariationalPosterior:
    """Every parameter changed, one row fewer."""
    params = {name: value + by * torch.ones_like(value) for name, value in posterior.params.items()}
    # The buffers of a converted AutoLaplace have no constraint that would keep them triangular.
    params |= {name: params[name].tril() for name in params if name == "scale_tril"}
    return posterior.edited(params, posterior.ids[1:])


def drawn(guide: Any, num_samples: int = 4) -> dict[str, Tensor]:
    pyro.set_rng_seed(3)
    found = Predictive(model, guide=guide, num_samples=num_samples)(*regression()[:1])
    return {name: found[name].detach() for name in ("weight", "noise")}


def store_state() -> dict[str, tuple[int, Tensor]]:
    return {name: (id(value), value.detach().clone()) for name, value in pyro.get_param_store()._params.items()}


def assert_same_store(before: dict[str, tuple[int, Tensor]]) -> None:
    after = store_state()
    assert list(after) == list(before)
    for name, (identity, value) in before.items():
        assert after[name][0] == identity
        assert torch.equal(after[name][1], value)


@pytest.mark.parametrize("name", GUIDES)
def test_an_edited_guide_draws_from_the_edited_parameters(name: str) -> None:
    """A deep copy with shifted tensors draws from the original, because the store's names win."""
    guide = fitted(name)
    before = drawn(guide)
    posterior = VariationalPosterior(model, guide, data())
    forgotten = moved(posterior)
    after = drawn(forgotten.guide)
    for site, value in before.items():
        assert (value - after[site]).abs().max() > 0.01
        assert torch.equal(drawn(guide)[site], value)
    # What Pyro draws from the edited guide is what the posterior says of itself.
    torch.manual_seed(5)
    theirs = poutine.trace(forgotten.guide).get_trace(*regression())
    torch.manual_seed(5)
    ours = forgotten.energy.whole.guide.run(forgotten.params, None).latents
    assert all(torch.equal(ours[site], theirs.nodes[site]["value"]) for site in before)
    assert_other(drawn(posterior.guide), after)


def assert_other(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert all((one[name] - other[name]).abs().max() > 0.01 for name in one)


@pytest.mark.parametrize("name", LOCAL_PARAMS)
def test_and_so_it_does_with_module_local_parameters(name: str) -> None:
    with pyro.settings.context(module_local_params=True):
        guide = fitted(name)
        before = drawn(guide)
        forgotten = moved(VariationalPosterior(model, guide, data()))
        assert_other(before, drawn(forgotten.guide))
        assert all(torch.equal(drawn(guide)[site], value) for site, value in before.items())


def test_what_pyro_does_to_a_deep_copy() -> None:
    """The trap itself: when this fails, Pyro has mended it."""
    guide = fitted("AutoNormal")
    twin = copy.deepcopy(guide)
    with torch.no_grad():
        twin.locs.weight_unconstrained.add_(100.0)
    assert torch.equal(drawn(twin)["weight"], drawn(guide)["weight"])


@pytest.mark.parametrize("name", MEDIANS)
def test_the_median_is_that_of_the_edited_parameters(name: str) -> None:
    guide = fitted(name)
    before = guide.median()
    forgotten = moved(VariationalPosterior(model, guide, data()))
    after = forgotten.guide.median()
    assert (after["weight"] - before["weight"]).abs().min() > 0.1
    torch.testing.assert_close(guide.median()["weight"], before["weight"], rtol=0, atol=0)


# Under module-local parameters, Pyro's SVI itself refuses plain `nn.Parameter`s.
@pytest.mark.parametrize(
    ("name", "local"),
    [
        *((name, False) for name in ("AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal", "AutoGuideList")),
        *((name, False) for name in ("PyroModule", "PyroSample", "MeanField")),
        *((name, True) for name in ("AutoNormal", "AutoGuideList", "PyroSample", "MeanField")),
    ],
)
def test_further_svi_trains_the_edited_guide_and_no_other(name: str, local: bool) -> None:
    with pyro.settings.context(module_local_params=local):
        guide = fitted(name)
        before = drawn(guide)
        forgotten = moved(VariationalPosterior(model, guide, data()))
        edited = forgotten.guide
        start = drawn(edited)
        svi = SVI(model, edited, Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(5):
            svi.step(*regression())
        assert_other(drawn(edited), start)
        assert all(torch.equal(drawn(guide)[site], value) for site, value in before.items())
        # And what was trained can be taken over again.
        again = VariationalPosterior(model, edited, data())
        names = dict(edited.named_parameters())
        assert all(torch.equal(again.params[key], value) for key, value in names.items())
        assert_other(drawn(moved(again).guide), drawn(edited))


def test_further_svi_of_a_function_guide_happens_in_its_own_store() -> None:
    guide = fitted("positive")
    forgotten = moved(VariationalPosterior(model, guide, data()))
    before = store_state()
    with forgotten.loaded():
        inside = {name: value.clone() for name, value in pyro.get_param_store()._params.items()}
        assert all(torch.equal(inside[name], value) for name, value in forgotten.params.items())
        svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(3):
            svi.step(*regression())
        trained = VariationalPosterior(model, guide, data())
    assert_same_store(before)
    assert all((trained.params[name] - value).abs().max() > 1e-3 for name, value in inside.items())


@pytest.mark.parametrize("name", GUIDES)
def test_the_store_and_the_generator_stay_as_they_are(name: str, tmp_path: Any) -> None:
    guide = fitted(name)
    own = dict(guide.named_parameters()) if isinstance(guide, torch.nn.Module) else {}
    values = {key: value.detach().clone() for key, value in own.items()}
    before, state = store_state(), torch.get_rng_state()
    posterior = VariationalPosterior(model, guide, data())
    posterior.energy.total(posterior.params, data())
    posterior.draws(3)
    posterior.log_likelihood(data(), num_draws=3)
    posterior.save(tmp_path / "posterior.safetensors")
    moved(posterior).draws(2)
    assert posterior.guide is not guide
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_store(before)
    assert all(torch.equal(value, values[key]) for key, value in own.items())
    if isinstance(guide, torch.nn.Module):
        assert all(value is own[key] for key, value in guide.named_parameters())


def test_two_guides_of_one_name() -> None:
    """Fit A, clear the store, fit B: A's next call would draw from B and be overwritten."""
    first = fitted("AutoNormal")
    taken = VariationalPosterior(model, first, data())
    pyro.clear_param_store()
    second = fitted("AutoNormal")
    with pytest.raises(ValueError, match=r"store and AutoNormal disagree about 'locs.weight_unconstrained'"):
        VariationalPosterior(model, first, data())
    # Taken over in time, A keeps its own parameters, and B has its own.
    assert_other({"w": taken.draws(3)["weight"]}, {"w": VariationalPosterior(model, second, data()).draws(3)["weight"]})


def test_with_module_local_parameters_two_guides_of_one_name_do_not_meet() -> None:
    with pyro.settings.context(module_local_params=True):
        guides = fitted("AutoNormal"), fitted("AutoNormal")
        for guide in guides:
            VariationalPosterior(model, guide, data())


def test_a_module_inside_a_function_guide() -> None:
    """`pyro.module` hands back the module with its own tensors, whatever the store was filled with."""
    net = torch.nn.Linear(1, 2)

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.module("net", net)
        pyro.sample("weight", pyro.distributions.Normal(net(torch.ones(1)), 0.1).to_event(1))
        pyro.sample("noise", pyro.distributions.LogNormal(0.0, 0.1))

    guide(*regression())
    with pytest.raises(ValueError, match=r"`pyro.module` registered \['net'\].*PyroModule"):
        VariationalPosterior(model, guide, data())


def test_a_guide_that_opens_the_data_plate_draws_the_same_for_any_rows() -> None:
    """A subsampling plate takes its indices from the same generator as the latents."""

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=3):
            pass
        loc = pyro.param("loc", torch.tensor([0.3, 0.8]))
        pyro.sample("weight", pyro.distributions.Normal(loc, 0.1).to_event(1))
        pyro.sample("noise", pyro.distributions.LogNormal(pyro.param("noise_loc", torch.tensor(0.0)), 0.1))

    guide(*regression())
    posterior = VariationalPosterior(model, guide, data())
    erased, retained = data().split([1, 5])
    assert_additive(posterior, erased, retained)


def assert_additive(posterior: VariationalPosterior, erased: Data, retained: Data) -> None:
    total = posterior.energy.total(posterior.params, data())
    rest = posterior.energy.total(posterior.params, retained)
    share = posterior.energy.share(posterior.params, next(erased.batches()))
    torch.testing.assert_close(total - rest, share.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", GUIDES)
def test_energies_of_guides_add(name: str) -> None:
    assert_additive(adopted(name), *data().split([0, 7, 23]))


@pytest.mark.parametrize("name", LOCAL_PARAMS)
def test_energies_do_not_ask_where_parameters_live(name: str) -> None:
    values = []
    for local in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        with pyro.settings.context(module_local_params=local):
            posterior = adopted(name)
            values.append(posterior.energy.total(posterior.params, data()))
    torch.testing.assert_close(*values)


def tensors_in(thing: Any, seen: set[int]) -> list[Tensor]:
    """Every tensor that can be reached from an object by attributes, items and closures."""
    if id(thing) in seen or isinstance(thing, (str, int, float, type(None), type, type(gc))):
        return []
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return [thing, *tensors_in(getattr(thing, "__dict__", {}), seen)]
    parts: list[Any] = []
    if isinstance(thing, dict):
        parts = [*thing.values()]
    elif isinstance(thing, (list, tuple, set, frozenset)):
        parts = [*thing]
    else:
        parts = [*getattr(thing, "__dict__", {}).values()]
        parts += [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
        parts += [getattr(thing, "__self__", None), *(getattr(thing, "__defaults__", None) or ())]
    return [tensor for part in parts for tensor in tensors_in(part, seen)]


def holds_rows(thing: Any, x: Tensor) -> bool:
    """Whether a number of x is anywhere in a tensor that `thing` can reach."""
    found = [tensor for tensor in tensors_in(thing, set()) if tensor.is_floating_point() and not tensor.is_meta]
    # What a flow cached in a run under vmap is dead: nothing can be read from it.
    alive = [tensor.detach() for tensor in found if not torch._C._functorch.is_functorch_wrapped_tensor(tensor)]
    return any(bool(torch.isin(x, tensor.to(x).reshape(-1)).any()) for tensor in alive)


@pytest.mark.parametrize("name", [name for name in GUIDES if name.startswith(("Auto", "Mean"))])
def test_no_row_survives_in_the_guide_or_the_posterior(name: str) -> None:
    guide = fitted(name)
    rows = torch.cat([part.flatten() for part in regression()])
    if name not in ("MeanField", "AutoGaussian", "AutoStructured"):
        assert holds_rows(guide, rows), "a fitted autoguide remembers the data; this test would see nothing"
    posterior = VariationalPosterior(model, guide, data())
    forgotten = moved(posterior)
    assert not holds_rows(forgotten.guide, rows)
    assert not holds_rows(forgotten, rows)
    assert not holds_rows(posterior, rows)


def test_arguments_are_remembered_by_their_shapes() -> None:
    trace = adopted("AutoNormal").guide.prototype_trace
    x, y = trace.nodes["_INPUT"]["args"]
    assert (x.shape, y.shape) == ((24, 2), (24,))
    assert x.device.type == y.device.type == "meta"


def test_nothing_keeps_the_data_alive() -> None:
    x, y = regression()
    guide = AutoNormal(model)
    guide(x, y)
    posterior = VariationalPosterior(model, guide, Data(x, y))
    assert isinstance(posterior.guide, AutoGuide)
    alive = [weakref.ref(x), weakref.ref(y)]
    del x, y, guide
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_the_models_learned_parameters_are_not_reset() -> None:
    """An empty scope of the store around the model would start them anew, without a word."""

    def learned(x: Tensor, y: Tensor | None = None) -> Tensor:
        noise = pyro.param("noise", torch.tensor(0.5), constraint=torch.distributions.constraints.positive)
        weight = pyro.sample("weight", pyro.distributions.Normal(torch.zeros(2), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", pyro.distributions.Normal(x @ weight, noise), obs=y)

    guide = AutoNormal(learned)
    guide(*regression())
    with torch.no_grad():
        pyro.get_param_store()._params["noise"].fill_(2.0)
    posterior = VariationalPosterior(learned, guide, data())
    assert posterior.params["model.noise"] == 2.0
    drawn = posterior.draws(1)
    trace = poutine.trace(poutine.condition(learned, data={"weight": drawn["weight"][0]})).get_trace(*regression())
    trace.compute_log_prob()
    torch.testing.assert_close(posterior.log_likelihood(data(), 1).sum(), trace.nodes["y"]["log_prob_sum"].detach())
    # The model that goes back to the user has the edited noise, and its own stays.
    forgotten = moved(posterior)
    edited = poutine.trace(forgotten.model).get_trace(*regression())
    torch.testing.assert_close(edited.nodes["y"]["fn"].scale, torch.tensor(2.5).exp().expand(24))
    assert pyro.param("noise").log() == 2.0


@pytest.mark.parametrize("name", sorted(POINTS))
def test_point_masses_are_taken_over(name: str) -> None:
    posterior = adopted(name)
    assert posterior.gaussian is None
    assert all(bool((value == value[0]).all()) for value in posterior.draws(5).values())


@pytest.mark.parametrize("name", ["AutoNormal", "AutoIAFNormal", "positive", "PyroSample"])
def test_what_a_later_fit_does_to_the_guide_does_not_reach_the_posterior(name: str) -> None:
    guide = fitted(name)
    posterior = VariationalPosterior(model, guide, data())
    draws, digest = posterior.draws(3), posterior.digest
    total = posterior.energy.total(posterior.params, data())
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(3):
        svi.step(*regression())
    assert posterior.digest == digest
    assert all(torch.equal(posterior.draws(3)[site], value) for site, value in draws.items())
    torch.testing.assert_close(posterior.energy.total(posterior.params, data()), total, rtol=0, atol=0)
    assert VariationalPosterior(model, guide, data()).digest != digest
