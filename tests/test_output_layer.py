"""The output layer alone: found by probing, solved as a convex problem."""

import pytest
import torch
from torch import Tensor

from pyro_forget.data import Batch, Data
from pyro_forget.forgetters.network import Network
from pyro_forget.forgetters.output_layer import OutputLayer
from pyro_forget.forgetting import Refused, forget
from pyro_forget.guides import MeanField, local_reparametrization
from pyro_forget.inference.last_layer import LastLayer, features
from pyro_forget.inference.output_layer import draw_pool, solve_output_layer
from pyro_forget.inference.pairing import Problem
from pyro_forget.models import MLP
from pyro_forget.params import Params, flatten, unflatten
from tests import fits, networks
from tests.oracles import dense_gradient, dense_hessian


def taken_over(posterior, data: Data, rows=range(20)) -> tuple[Network, LastLayer | None, Problem]:
    erased, retained = data.split(rows)
    network = Network.of(posterior, erased, 0)
    return network, network.last_layer(retained), network.problem(retained, 0, slice(0, 1))


def first(problem: Problem) -> Params:
    return {name: value[0] for name, value in problem.origin.items()}


# --- finding it


@pytest.mark.parametrize("kind", ["local", "mean-field", "AutoNormal", "delta"])
def test_it_is_found_in_a_network(kind: str) -> None:
    _, layer, _ = taken_over(*networks.network(kind))
    assert layer is not None
    assert ["layer1" in name for name in (*layer.units, *layer.others)] == [True, True, False, False]
    weight, bias = layer.units.values()
    assert torch.equal(weight, torch.arange(3)[:, None].expand(3, 12)) and torch.equal(bias, torch.arange(3))


def test_a_scale_is_no_part_of_it() -> None:
    x, _ = networks.clouds()
    data = Data(x, x[:, 0] * x[:, 1])
    _, layer, _ = taken_over(networks.started(networks.regression_network, data), data)
    assert layer is not None and list(layer.units) == ["outer"] and set(layer.others) == {"inner", "sigma"}


def test_units_may_stand_in_the_last_dim() -> None:
    x, y = networks.clouds()
    data = Data(x, torch.stack([y == 0, y == 1], 1).to(x))
    _, layer, _ = taken_over(networks.started(networks.bernoulli_network, data), data)
    assert layer is not None and torch.equal(layer.units["outer"], torch.arange(2).expand(6, 2))


@pytest.mark.parametrize("kind", ["delta", "local"])
def test_features_are_what_the_body_gives(kind: str) -> None:
    posterior, data = networks.network(kind)
    network, layer, problem = taken_over(posterior, data)
    (batch,), point = draw_pool(problem, 50, 0), first(problem)
    seen = features(network.points, point, layer, batch, 5)
    w, b = (next(value for name, value in point.items() if f"layer0.{part}" in name) for part in ("weight", "bias"))
    hidden = batch.args[0] @ w.T + b
    if kind == "local":
        scale = {name: value for name, value in network.points.scale.items()}
        variance = batch.args[0].square() @ scale["layer0.weight"].square().T + scale["layer0.bias"].square()
        hidden = hidden + variance.sqrt() * network.points.noise(batch, 5)["_noise_0"]
    assert torch.allclose(seen.phi, torch.cat([hidden.relu(), torch.ones(50, 1)], 1), atol=1e-10)


# --- solving it


def convex(seed: int = 0) -> tuple[Network, LastLayer, Problem, Batch]:
    x, y = networks.clouds()
    model = local_reparametrization(MLP((2, 3)))
    posterior = fits.fitted(model, MeanField(model), Data(x, y), num_steps=150)
    network, layer, problem = taken_over(posterior, Data(x, y))
    return network, layer, problem, draw_pool(problem, 100, seed)[0]


def tilted_pool_energy(problem: Problem, pool: Batch, params: Params) -> Tensor:
    """The pool's tilted energy with the proximal term, written out with β = 1."""
    weight, noise = problem.num_data / len(pool), problem.points.noise(pool, 0)
    origin = first(problem)

    def data(point: Params) -> Tensor:
        return -weight * problem.points.run(point, pool, noise).log_likelihood().sum()

    slope = unflatten(dense_gradient(data, origin), origin)
    step = {name: params[name] - value for name, value in origin.items()}
    tilt = sum(((slope[name] - problem.tilt[name][0]) * step[name]).sum() for name in origin)
    run = problem.points.run(origin, pool, noise)
    p = next(site for site in run.sites if site.is_data).fn.probs
    phi = torch.cat([pool.args[0], torch.ones(len(pool), 1)], 1)
    joined = torch.cat([step["layer0.weight"], step["layer0.bias"][:, None]], 1)
    fisher = torch.diag(p.mean(0)) - p.T @ p / len(pool)
    near = (joined * (fisher @ joined @ (phi.T @ phi / len(pool)))).sum()
    return data(params) + problem.points.prior(params, 0) - tilt + 0.05 * problem.num_data * near


def test_on_a_convex_model_it_is_the_minimum_that_newton_finds() -> None:
    _, layer, problem, pool = convex()
    held = Problem(**{**vars(problem), "stationary": False})
    found = first_of(solve_output_layer(held, layer, [pool], 0, max_steps=200, rtol=1e-9).params)
    newton = first(problem)
    for _ in range(20):
        gradient = dense_gradient(lambda p: tilted_pool_energy(problem, pool, p), newton)
        hessian = dense_hessian(lambda p: tilted_pool_energy(problem, pool, p), newton)
        newton = unflatten(flatten(newton) - torch.linalg.solve(hessian, gradient), newton)
    moved = float((flatten(newton) - flatten(first(problem))).norm())
    assert moved > 0.05
    assert float((flatten(found) - flatten(newton)).norm()) < 1e-6 * moved


def first_of(params: Params) -> Params:
    return {name: value[0] for name, value in params.items()}


def test_nothing_asked_moves_nothing() -> None:
    """With no force the origin is the minimum, whatever the pool."""
    network, layer, problem, pool = convex()
    pull = {name: value + network.reading.force[name] for name, value in problem.tilt.items()}
    idle = Problem(**{**vars(problem), "tilt": pull})
    found = solve_output_layer(idle, layer, [pool], 0, max_steps=100, rtol=1e-9)
    assert max(float((found.params[name] - value).abs().max()) for name, value in problem.origin.items()) < 1e-8


# --- the forgetter


@pytest.mark.parametrize("kind", ["local", "AutoNormal", "delta", "draws"])
def test_spoiled_rows_are_forgotten(kind: str) -> None:
    before, data = networks.drawn() if kind == "draws" else networks.network(kind)
    kept = {name: value.clone() for name, value in before.params.items()}
    after, report = forget(before, *data.split(networks.SPOILED), OutputLayer())
    assert report.log_likelihood_after < report.log_likelihood_before
    assert report.evidence.held_out_fall > 0 and report.evidence.extra["evaluations"] > 0
    assert torch.equal(after.ids, data.split(networks.SPOILED)[1].ids)
    moved = {name for name, size in report.evidence.step_norm.items() if size > 0 and "scale" not in name}
    assert moved and all("layer1" in name for name in moved)
    assert all(torch.equal(before.params[name], value) for name, value in kept.items())


def test_a_seed_gives_the_same_result() -> None:
    before, data = networks.network()
    results = [forget(before, *data.split(networks.SPOILED), OutputLayer(seed=s))[0] for s in (1, 1, 2)]
    assert results[0].digest == results[1].digest != results[2].digest


def test_nothing_erased_is_the_identity() -> None:
    before, data = networks.network()
    assert forget(before, *data.split([]), OutputLayer())[0] is before


def test_without_an_output_layer_it_refuses() -> None:
    x, _ = networks.clouds()
    data = Data(x, x[:, 0].tanh())
    with pytest.raises(Refused, match="no output layer"):
        forget(networks.started(networks.bent_network, data), *data.split(range(5)), OutputLayer())


def test_another_family_is_an_error() -> None:
    x, y = networks.clouds()
    data = Data(x, y.to(x))
    with pytest.raises(ValueError, match="Poisson"):
        forget(networks.started(networks.counts_network, data), *data.split(range(5)), OutputLayer())


def test_a_pool_larger_than_the_data_is_an_error() -> None:
    before, data = networks.network()
    with pytest.raises(ValueError, match="`pool` is 500, the retained data have 280 rows"):
        forget(before, *data.split(networks.SPOILED), OutputLayer(pool=500))


@pytest.mark.parametrize("label", [3, -1])
def test_a_class_that_the_output_does_not_have_is_an_error(label: int) -> None:
    before, _ = networks.network()
    x, y = networks.clouds()
    y[:20] = label
    with pytest.raises(ValueError, match=f"classes such as {label}, the output layer has 3 units"):
        forget(before, *Data(x, y).split(networks.SPOILED), OutputLayer())


@pytest.mark.parametrize("name", ["pool", "max_steps"])
def test_settings_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        OutputLayer(**{name: 0})
