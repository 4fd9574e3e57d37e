"""The Hessian is one matrix, however its products are made."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal
from torch import Tensor

from pyro_forget.curvature import as_matrix
from pyro_forget.curvature.hessian import Hessian
from pyro_forget.curvature.jacobian import Jacobian
from pyro_forget.curvature.tape import NoForwardDerivative, Tape, forward_derivative
from pyro_forget.data import Data
from pyro_forget.energy import CoordinateEnergy, Energy, FunctionEnergy, coordinates_of
from pyro_forget.guides import MeanField, local_reparametrization
from pyro_forget.models import MLP, LogisticRegression
from pyro_forget.params import Params, flatten, map_params, unflatten
from pyro_forget.posterior import SampledPosterior, VariationalPosterior

MODES = ("graph", "tape", "stream")
NETWORK = MLP(widths=(3, 4, 3))
Case = tuple[Energy, Params, Data]


def classes(num_rows: int = 12, batch_size: int = 12) -> Data:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, 3, generator=generator)
    return Data.of((x, torch.randint(3, (num_rows,), generator=generator)), batch_size=batch_size)


def yes_or_no() -> Data:
    generator = torch.Generator().manual_seed(2)
    return Data(torch.randn(9, 2, generator=generator), torch.randint(2, (9,), generator=generator).to(torch.float64))


def counts(y: Tensor) -> None:
    """A prior that is not Normal, on a constrained site, and one that hangs on it."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    shift = pyro.sample("shift", dist.Normal(0.0, rate))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate * torch.exp(0.1 * shift)), obs=y)


def learned(y: Tensor) -> None:
    """A model that learns a parameter of its own."""
    slope = pyro.param("slope", lambda: torch.tensor(0.3))
    location = pyro.sample("location", dist.Normal(slope, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.StudentT(4.0, location * slope, 1.0), obs=y)


def posterior(model: Callable, guide: Callable, data: Data) -> VariationalPosterior:
    return VariationalPosterior.started(model, guide, data, seed=3)


def of(fitted: VariationalPosterior, pairs: int = 2) -> tuple[Energy, Params]:
    return fitted.energy.with_noise(5, pairs), map_params(lambda v: v + 0.05 * torch.cos(3 * v), fitted.params)


def weight_noise() -> Case:
    data = classes()
    return *of(posterior(NETWORK, MeanField(NETWORK), data)), data


def one_draw() -> Case:
    data = classes()
    energy, params = of(posterior(NETWORK, MeanField(NETWORK), data))
    return energy.with_fresh_noise(7, 1), params, data


def local() -> Case:
    model, data = local_reparametrization(NETWORK), classes()
    return *of(posterior(model, MeanField(model), data)), data


def coordinates() -> Case:
    energy, params, data = weight_noise()
    return CoordinateEnergy(energy.gaussian), coordinates_of(energy.read(params)), data


def full_covariance() -> Case:
    model, data = LogisticRegression(2), yes_or_no()
    return *of(posterior(model, AutoMultivariateNormal(model), data), pairs=3), data


def softplus_scales() -> Case:
    model, data = LogisticRegression(2), yes_or_no()
    return *of(posterior(model, AutoDiagonalNormal(model), data), pairs=3), data


def constrained() -> Case:
    data = Data(torch.tensor([1.0, 0.0, 3.0, 2.0]))
    return *of(posterior(counts, MeanField(counts), data), pairs=3), data


def learning() -> Case:
    data = Data(torch.tensor([1.0, -0.4, 0.3]))
    pyro.param("slope", torch.tensor(0.3))
    return *of(posterior(learned, MeanField(learned), data), pairs=3), data


def draws() -> Case:
    model, data = LogisticRegression(2), yes_or_no()
    cloud = SampledPosterior(model, {"weight": torch.randn(2, 5, 2)}, data)
    shift = {name: torch.full(shape, 0.1) for name, shape in cloud.energy.shapes.items()}
    return cloud.energy.shifted(cloud.params), shift, data


def by_hand() -> Case:
    def share(params: Params, batch) -> Tensor:
        return torch.log1p((batch.args[0] @ params["w"]).square()).sum()

    energy = FunctionEnergy(lambda params, batch: share(params, batch) + params["w"].pow(4).sum(), share)
    return energy, {"w": torch.tensor([0.3, -0.2, 0.5])}, classes()


CASES = [
    weight_noise,
    one_draw,
    local,
    coordinates,
    full_covariance,
    softplus_scales,
    constrained,
    learning,
    draws,
    by_hand,
]


class Kinked(torch.autograd.Function):
    """x³ with two derivatives backwards and none forward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 3 * x**2


def backward_only(x: Tensor, y: Tensor) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(Kinked.apply(x @ weight), 1.0), obs=y)


def dense(energy: Energy, params: Params, data: Data) -> Tensor:
    return torch.autograd.functional.hessian(lambda flat: energy.total(unflatten(flat, params), data), flatten(params))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_mode_is_the_hessian(case: Callable[[], Case], mode: str):
    energy, params, data = case()
    operator = Hessian(energy, params, data, mode)
    expected = dense(energy, params, data)
    # The first product is made while recording, the others are played: the matrix is made twice.
    for _ in range(2):
        torch.testing.assert_close(as_matrix(operator, params), expected, rtol=1e-9, atol=1e-9)
    assert operator.num_products == 2 * len(expected)


@pytest.mark.parametrize("mode", MODES)
def test_batches_add_up(mode: str):
    whole, (energy, params, _) = classes(), one_draw()
    operator = Hessian(energy, params, classes(batch_size=5), mode)
    expected = Hessian(energy, params, whole, "graph")
    vector = {name: torch.cos(torch.arange(value.numel()) + 1.0).reshape(value.shape) for name, value in params.items()}
    for factor in (1.0, -2.0):
        scaled = map_params(lambda v, factor=factor: factor * v, vector)
        torch.testing.assert_close(operator.mv(scaled), expected.mv(scaled), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["tape", "stream"])
def test_what_has_no_forward_derivative_is_differentiated_backwards(mode: str):
    data = yes_or_no()
    fitted = posterior(backward_only, MeanField(backward_only), data)
    energy, params = fitted.energy.with_fresh_noise(1, 1), fitted.params
    operator = Hessian(energy, params, data, mode)
    torch.testing.assert_close(as_matrix(operator, params), dense(energy, params, data), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "mode"),
    [(100, 100, "graph"), (2000, 2000, "tape"), (2000, 700, "tape"), (2000, 300, "stream")],
)
def test_the_mode_goes_by_size_and_batches(num_rows: int, batch_size: int, mode: str):
    model, data = MLP((3, 2500, 3)), classes(num_rows, batch_size)
    fitted = posterior(model, MeanField(model), data)
    assert Hessian(fitted.energy.with_fresh_noise(0, 1), fitted.params, data).mode == mode


def test_a_hand_written_energy_keeps_its_graph():
    energy, params, data = by_hand()
    assert Hessian(energy, params, data).mode == "graph"


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="`mode` must be one of"):
        Hessian(*by_hand(), mode="linearize")


def doubles(a: list[float], b: list[list[float]]) -> Params:
    return {"a": torch.tensor(a, dtype=torch.float64), "b": torch.tensor(b, dtype=torch.float64)}


POINT = doubles([0.5, -1.0, 2.0], [[1.0, 2.0, 3.0], [0.1, 0.2, -0.3]])
TANGENTS = [
    doubles([1.0, 2.0, 3.0], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]),
    doubles([-1.0, 0.5, 0.0], [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]),
]


def function(params: Params) -> Params:
    hidden = torch.relu(params["b"] @ params["a"])
    rows = torch.func.vmap(lambda row: (row * params["a"]).sin().sum())(params["b"])
    return {"sum": (hidden * rows).sum(), "cat": torch.cat([hidden, rows[:1]]), "constant": torch.ones(2)}


def derivative(function: Callable[[Params], Params], tangent: Params) -> Params:
    return torch.func.jvp(function, (POINT,), (tangent,))[1]


class TestTape:
    def test_recording_and_playing_give_the_derivative(self):
        image, tape = Tape.record(function, POINT, TANGENTS[0])
        torch.testing.assert_close(image, derivative(function, TANGENTS[0]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(tape.value, function(POINT), rtol=0, atol=0)
        for tangent in (*TANGENTS, TANGENTS[0]):
            torch.testing.assert_close(tape.play(tangent), derivative(function, tangent), rtol=1e-12, atol=1e-12)

    def test_tangents_written_into_a_buffer_are_played(self):
        def filling(params: Params) -> Params:
            buffer = torch.zeros(3)
            buffer[:2] = params["a"][:2]
            return {"y": buffer * params["b"][0]}

        _, tape = Tape.record(filling, POINT, TANGENTS[0])
        for tangent in TANGENTS:
            torch.testing.assert_close(tape.play(tangent), derivative(filling, tangent), rtol=0, atol=0)

    def test_arguments_are_left_as_they_were(self):
        kept = {name: value.clone() for name, value in TANGENTS[0].items()}
        _, tape = Tape.record(function, POINT, TANGENTS[0])
        tape.play(TANGENTS[0])
        torch.testing.assert_close(TANGENTS[0], kept, rtol=0, atol=0)

    def test_what_adds_nothing_is_not_played(self):
        images = torch.ones(2, 1, 4, 4, dtype=torch.float64)

        def convolved(params: Params) -> Params:
            # Torch's forward derivative adds what the images would contribute if they moved.
            return {"y": torch.nn.functional.conv2d(images, params["b"].reshape(2, 1, 1, 3), params["a"][:2])}

        image, tape = Tape.record(convolved, POINT, TANGENTS[0])
        torch.testing.assert_close(image, derivative(convolved, TANGENTS[0]))
        torch.testing.assert_close(tape.play(TANGENTS[1]), derivative(convolved, TANGENTS[1]))
        assert not [step for step in tape.steps if step.operator is torch.ops.aten.add.Tensor]

    def test_a_value_changed_after_it_was_used_is_refused(self):
        held = torch.ones(3)

        def changing(params: Params) -> Params:
            product = params["a"] * held
            held.add_(1.0)
            return {"y": product}

        with pytest.raises(NoForwardDerivative, match="changed in place"):
            Tape.record(changing, POINT, TANGENTS[0])

    def test_forward_derivative_says_when_there_is_none(self):
        with pytest.raises(NoForwardDerivative):
            forward_derivative(lambda params: {"y": Kinked.apply(params["a"])}, POINT, TANGENTS[0])
        with pytest.raises(NoForwardDerivative):
            Tape.record(lambda params: {"y": Kinked.apply(params["a"])}, POINT, TANGENTS[0])


@pytest.mark.parametrize("way", ["graph", "tape", "forward"])
def test_jacobian_products_are_those_of_the_matrix(way: str):
    point, tangents = POINT, TANGENTS
    jacobian = Jacobian(function, point, way)
    for tangent in tangents:
        torch.testing.assert_close(jacobian.push(tangent), derivative(function, tangent), rtol=1e-12, atol=1e-12)
    outputs = function(point)
    cotangent = {
        name: torch.cos(torch.arange(1.0, value.numel() + 1)).reshape(value.shape) for name, value in outputs.items()
    }
    _, pull = torch.func.vjp(function, point)
    torch.testing.assert_close(jacobian.pull(cotangent), pull(cotangent)[0], rtol=1e-12, atol=1e-12)
