"""Local reparametrisation: the plain model's expectations, with noise per datum."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_forget.guides import GaussianWeight, MeanField, local_reparametrization
from pyro_forget.models import SoftmaxRegression


def gaussian(*shape: int) -> GaussianWeight:
    return GaussianWeight(torch.randn(shape), torch.rand(shape) + 0.1)


# name -> (function of x and the weights, shape of x, shapes of the weights)
LINEAR_MAPS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], list[tuple[int, ...]]]] = {
    "F.linear": (lambda x, w: F.linear(x, w), (5, 3), [(4, 3)]),
    "F.linear with bias": (lambda x, w, b: F.linear(x, w, b), (5, 3), [(4, 3), (4,)]),
    "F.linear with keyword bias": (lambda x, w, b: F.linear(x, w, bias=b), (5, 3), [(4, 3), (4,)]),
    "F.linear of a sequence": (lambda x, w: F.linear(x, w), (5, 2, 3), [(4, 3)]),
    "x @ W": (lambda x, w: x @ w, (5, 3), [(3, 4)]),
    "x @ w": (lambda x, w: x @ w, (5, 3), [(3,)]),
    "x @ W.T": (lambda x, w: x @ w.T, (5, 3), [(4, 3)]),
    "x @ W.mT": (lambda x, w: x @ w.mT, (5, 3), [(4, 3)]),
    "x @ W.t()": (lambda x, w: x @ w.t(), (5, 3), [(4, 3)]),
    "x @ W.transpose": (lambda x, w: x @ w.transpose(-1, -2), (5, 3), [(4, 3)]),
    "torch.t": (lambda x, w: x @ torch.t(w), (5, 3), [(4, 3)]),
    "torch.transpose": (lambda x, w: x @ torch.transpose(w, 0, 1), (5, 3), [(4, 3)]),
    "torch.matmul": (torch.matmul, (5, 3), [(3, 4)]),
    "torch.mm": (torch.mm, (5, 3), [(3, 4)]),
    "torch.mv": (torch.mv, (5, 3), [(3,)]),
    "x.matmul": (lambda x, w: x.matmul(w), (5, 3), [(3, 4)]),
    "h + b": (lambda x, b: x + b, (5, 3), [(3,)]),
    "b + h": (lambda x, b: b + x, (5, 3), [(3,)]),
    "torch.add": (torch.add, (5, 3), [(3,)]),
    "scalar bias": (lambda x, b: x + b, (5,), [()]),
    "F.conv2d": (lambda x, w: F.conv2d(x, w), (5, 2, 6, 6), [(3, 2, 3, 3)]),
    "F.conv2d with bias": (lambda x, w, b: F.conv2d(x, w, b), (5, 2, 6, 6), [(3, 2, 3, 3), (3,)]),
    "F.conv2d with options": (
        lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1, dilation=2, groups=2),
        (5, 2, 8, 8),
        [(4, 1, 3, 3), (4,)],
    ),
    "F.conv2d, same padding": (lambda x, w: F.conv2d(x, w, padding="same"), (5, 2, 6, 6), [(3, 2, 3, 3)]),
}


@pytest.mark.parametrize("name", LINEAR_MAPS)
def test_output_has_the_moments_of_the_plain_map(name: str) -> None:
    function, shape, weight_shapes = LINEAR_MAPS[name]
    x, weights = torch.randn(shape), [gaussian(*weight_shape) for weight_shape in weight_shapes]
    at_noise = [
        function(
            x, *(GaussianWeight(w.loc, w.scale, noise=lambda out, names, v=v: torch.full_like(out, v)) for w in weights)
        )
        for v in (0.0, 1.0, -2.0)
    ]

    locs = tuple(weight.loc for weight in weights)
    jacobians = torch.func.jacrev(lambda *values: function(x, *values), argnums=tuple(range(len(locs))))(*locs)
    variance = sum(
        (jacobian * weight.scale).square().reshape(*at_noise[0].shape, -1).sum(-1)
        for jacobian, weight in zip(jacobians, weights, strict=True)
    )
    torch.testing.assert_close(at_noise[0], function(x, *locs))
    torch.testing.assert_close(at_noise[1] - at_noise[0], variance.sqrt())
    torch.testing.assert_close(at_noise[2] - at_noise[0], -2 * variance.sqrt())


@pytest.mark.parametrize("gaussian_operand", ["weight", "bias"])
def test_a_plain_tensor_beside_a_gaussian_has_no_variance(gaussian_operand: str) -> None:
    weight, bias, x = gaussian(4, 3), gaussian(4), torch.randn(1, 3)
    operands = (weight, bias.loc) if gaussian_operand == "weight" else (weight.loc, bias)
    outputs = torch.stack([F.linear(x, *operands) for _ in range(4000)])
    variance = (
        F.linear(x.square(), weight.scale.square()) if gaussian_operand == "weight" else bias.scale.square()[None]
    )
    torch.testing.assert_close(outputs.mean(0), F.linear(x, weight.loc, bias.loc), rtol=0.0, atol=0.1)
    torch.testing.assert_close(outputs.var(0), variance, rtol=0.12, atol=0.0)


class Answer(Messenger):
    """Answers noise sites with given values, and notes their shapes."""

    def __init__(self, noise: dict[str, Tensor] | None = None):
        super().__init__()
        self.noise, self.shapes, self.weights = noise or {}, {}, {}

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"].startswith("_noise_"):
            self.shapes[msg["name"]] = msg["fn"].shape()
            self.weights[msg["name"]] = msg["infer"]["weights"]
            if msg["name"] in self.noise:
                msg["value"], msg["done"] = self.noise[msg["name"]], True


def substituted(model: Callable, gaussians: dict[str, tuple[Tensor, Tensor]]) -> Callable:
    """The model with each weight set to its mean and declared Gaussian, as an energy sets it."""

    class Substitute(Messenger):
        def _pyro_sample(self, msg: dict) -> None:
            if msg["name"] in gaussians:
                msg["value"], msg["done"] = gaussians[msg["name"]][0], True
                msg["infer"] = {**msg["infer"], "local_reparametrization": gaussians[msg["name"]]}

    return Substitute()(model)


def two_layers(x: Tensor, y: Tensor | None = None) -> Tensor:
    first = pyro.sample("first", dist.Normal(torch.zeros(3, 4), 1.0).to_event(2))
    second = pyro.sample("second", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    intercept = pyro.sample("intercept", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        mean = torch.tanh(x @ first) @ second + intercept
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)
    return mean


def gaussians_of_two_layers() -> dict[str, tuple[Tensor, Tensor]]:
    return {
        "first": (torch.full((3, 4), 0.3), torch.full((3, 4), 0.2)),
        "second": (torch.tensor([1.0, -1.0, 0.5, 2.0]), torch.full((4,), 0.1)),
        "intercept": (torch.tensor(0.7), torch.tensor(0.4)),
    }


def test_given_noise_makes_the_output_deterministic() -> None:
    x = torch.randn(6, 3)
    noise = {"_noise_0": torch.randn(6, 4), "_noise_1": torch.randn(6), "_noise_2": torch.randn(6)}
    gaussians = gaussians_of_two_layers()
    model = substituted(local_reparametrization(two_layers), gaussians)
    with Answer(noise):
        output, again = model(x), model(x)
    (m1, s1), (m2, s2), (m3, s3) = gaussians.values()
    hidden = torch.tanh(x @ m1 + (x.square() @ s1.square()).sqrt() * noise["_noise_0"])
    expected = hidden @ m2 + (hidden.square() @ s2.square()).sqrt() * noise["_noise_1"] + m3 + s3 * noise["_noise_2"]
    torch.testing.assert_close(output, expected)
    assert torch.equal(output, again), "the noise sites are counted anew in each run"


def test_noise_has_the_shape_of_the_output_inside_the_data_plate() -> None:
    with Answer() as answer:
        substituted(local_reparametrization(two_layers), gaussians_of_two_layers())(torch.randn(6, 3))
    assert answer.shapes == {"_noise_0": (6, 4), "_noise_1": (6,), "_noise_2": (6,)}
    assert answer.weights == {"_noise_0": ("first",), "_noise_1": ("second",), "_noise_2": ("intercept",)}


DIGITS = SoftmaxRegression(num_features=3, num_classes=3, bias=True)


def skewed_classes(num_rows: int) -> tuple[Tensor, Tensor]:
    """Rows of different lengths, most of them of class 0: no symmetry hides a wrong sign or a wrong variance."""
    x = torch.randn(num_rows, 3) * torch.tensor([0.5, 1.0, 3.0]) + 1.0
    return x, torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), num_rows, replacement=True)


def wide_guide(model: Callable, *args: Tensor) -> MeanField:
    guide = MeanField(model, init_scale=0.7)
    guide(*args)
    return guide


def losses_and_gradients(
    model: Callable, guide: MeanField, args: tuple[Tensor, ...], num: int
) -> tuple[Tensor, Tensor]:
    """(num,) ELBO losses and (num, size) gradients."""
    losses, gradients = [], []
    for _ in range(num):
        loss = Trace_ELBO().differentiable_loss(model, guide, *args)
        gradient = torch.autograd.grad(loss, list(guide.parameters()))
        losses.append(loss.detach())
        gradients.append(torch.cat([part.flatten() for part in gradient]))
    return torch.stack(losses), torch.stack(gradients)


def test_elbo_and_its_gradient_have_the_plain_expectations_and_less_variance() -> None:
    args = skewed_classes(40)
    guide = wide_guide(DIGITS, *args)
    plain, plain_gradients = losses_and_gradients(DIGITS, guide, args, 500)
    local, local_gradients = losses_and_gradients(local_reparametrization(DIGITS), guide, args, 500)

    error = ((plain.var() + local.var()) / 500).sqrt()
    assert error < 0.02 * plain.mean(), "without this the comparison says nothing"
    assert (plain.mean() - local.mean()).abs() < 5 * error
    gradient_error = ((plain_gradients.var(0) + local_gradients.var(0)) / 500).sqrt()
    assert ((plain_gradients.mean(0) - local_gradients.mean(0)).abs() < 5 * gradient_error).all()
    assert local_gradients.var(0).sum() < 0.3 * plain_gradients.var(0).sum()


def test_weights_are_scored_where_the_guide_drew_them_and_noise_leaves_no_trace() -> None:
    args = skewed_classes(10)
    guide = wide_guide(DIGITS, *args)
    guide_trace = poutine.trace(guide).get_trace(*args)
    trace = poutine.trace(poutine.replay(local_reparametrization(DIGITS), trace=guide_trace)).get_trace(*args)
    trace.compute_log_prob()
    assert not [name for name in trace.nodes if "noise" in name]
    assert trace.nodes["weight"]["value"] is guide_trace.nodes["weight"]["value"]
    expected = dist.Normal(0.0, 1.0).log_prob(guide_trace.nodes["weight"]["value"]).sum()
    torch.testing.assert_close(trace.nodes["weight"]["log_prob_sum"], expected)
    logits = args[0] @ guide_trace.nodes["weight"]["value"] + guide_trace.nodes["bias"]["value"]
    assert not torch.allclose(trace.nodes["_RETURN"]["value"], logits), "the noise is per datum, not the weight's"


def test_rows_of_zeros_have_finite_derivatives() -> None:
    x = torch.zeros(3, 2)
    x[2] = 1.0
    loc, log_scale = torch.randn(2, 4, requires_grad=True), torch.zeros(2, 4, requires_grad=True)
    output = (x @ GaussianWeight(loc, log_scale.exp())).square().sum()
    first = torch.autograd.grad(output, (loc, log_scale), create_graph=True)
    second = torch.autograd.grad(sum(part.square().sum() for part in first), (loc, log_scale))
    assert all(torch.isfinite(part).all() for part in (*first, *second))
    assert all((part != 0).any() for part in second)


def test_tiny_inputs_have_finite_second_derivatives_in_float32() -> None:
    x = torch.logspace(-25, 0, 26, dtype=torch.float32)[:, None]
    log_scale = torch.zeros(1, 1, dtype=torch.float32, requires_grad=True)
    output = (x @ GaussianWeight(torch.zeros(1, 1, dtype=torch.float32), log_scale.exp())).sum()
    (first,) = torch.autograd.grad(output, log_scale, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), log_scale)
    assert torch.isfinite(second).all()


def test_double_backward_through_vmap_over_noise_equals_the_loop() -> None:
    x, y = skewed_classes(8)
    noise = torch.randn(5, 8, 3)

    def loss(loc: Tensor, log_scale: Tensor, eps: Tensor) -> Tensor:
        gaussians = {"weight": (loc, log_scale.exp()), "bias": (torch.zeros(3), torch.full((3,), 0.2))}
        with Answer({"_noise_0": eps}):
            return F.cross_entropy(substituted(local_reparametrization(DIGITS), gaussians)(x, y), y)

    def derivatives(total: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        point = (torch.full((3, 3), 0.1, requires_grad=True), torch.zeros(3, 3, requires_grad=True))
        first = torch.autograd.grad(total(*point), point, create_graph=True)
        return *first, *torch.autograd.grad(sum(part.square().sum() for part in first), point)

    batched = derivatives(lambda *point: torch.func.vmap(lambda eps: loss(*point, eps))(noise).mean())
    looped = derivatives(lambda *point: torch.stack([loss(*point, eps) for eps in noise]).mean())
    for left, right in zip(batched, looped, strict=True):
        torch.testing.assert_close(left, right)


def seeded_trace(model: Callable, *args: Tensor) -> dict[str, Tensor]:
    pyro.set_rng_seed(1)
    nodes = poutine.trace(model).get_trace(*args).nodes
    return {name: node["value"] for name, node in nodes.items() if isinstance(node.get("value"), Tensor)}


@pytest.mark.parametrize("guide_family", [None, AutoNormal], ids=["prior", "AutoNormal"])
def test_without_the_key_the_model_is_the_plain_model(guide_family: type[AutoNormal] | None) -> None:
    x, y = skewed_classes(10)
    models: list[Callable] = [DIGITS, local_reparametrization(DIGITS)]
    if guide_family is not None:
        guide = guide_family(DIGITS)
        guide_trace = poutine.trace(guide).get_trace(x, y)
        models = [poutine.replay(model, trace=guide_trace) for model in models]
    plain, wrapped = (seeded_trace(model, x) for model in models)
    assert plain.keys() == wrapped.keys()
    assert all(torch.equal(plain[name], wrapped[name]) for name in plain)


def test_predictive_lets_all_rows_share_a_weight() -> None:
    x, y = skewed_classes(10)
    guide = wide_guide(DIGITS, x, y)
    model = local_reparametrization(DIGITS)
    draws = Predictive(model, guide=guide, num_samples=4, return_sites=("weight", "bias", "_RETURN"))(x)
    torch.testing.assert_close(draws["_RETURN"], x @ draws["weight"].squeeze(1) + draws["bias"])
    given = {name: draws[name].squeeze(1) for name in ("weight", "bias")}
    again = Predictive(model, posterior_samples=given, return_sites=("_RETURN",))(x)
    torch.testing.assert_close(again["_RETURN"], draws["_RETURN"])


REFUSED: dict[str, Callable[[Tensor, GaussianWeight], object]] = {
    "einsum": lambda x, w: torch.einsum("nd,dk->nk", x, w),
    "exp": lambda x, w: x @ w.exp(),
    "torch.functional.norm": lambda x, w: torch.norm(w),
    "__mul__": lambda x, w: x @ (w * 2),
    "__rmul__": lambda x, w: x @ (2 * w),
    "__getitem__": lambda x, w: x @ w[:, 0],
    "__rsub__": lambda x, w: x - w,
    "left": lambda x, w: torch.matmul(w, x),
    "__matmul__": lambda x, w: w @ x.T,
    "linear map of a weight": lambda x, w: F.linear(w, x),
    "torch.add": lambda x, w: w + 1.0,
    "softmax": lambda x, w: torch.softmax(w, -1),
    "addmm": lambda x, w: torch.addmm(torch.zeros(4), x, w),
    "conv1d": lambda x, w: F.conv1d(x, w),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_functions_are_refused_with_the_fix(name: str) -> None:
    with pytest.raises(TypeError, match=name) as refusal:
        REFUSED[name](torch.randn(5, 3), GaussianWeight(torch.randn(3, 4), torch.ones(3, 4), "kernel"))
    assert "'kernel'" in str(refusal.value)
    assert "sites=" in str(refusal.value)


def test_a_gaussian_weight_tells_its_shape_and_is_probed_like_any_object() -> None:
    weight = gaussian(3, 4)
    assert (weight.shape, weight.T.shape, weight.size(0), weight.dim(), weight.ndim) == ((3, 4), (4, 3), 3, 2, 2)
    assert (weight.dtype, weight.device) == (torch.float64, torch.device("cpu"))
    assert not hasattr(weight, "no_such_thing")
    with pytest.raises(TypeError, match="transpose"):
        _ = gaussian(3).T


def replayed(model: Callable, guide: Callable, *args: Tensor) -> Tensor:
    trace = poutine.trace(guide).get_trace(*args)
    return poutine.replay(model, trace=trace)(*args)


def siamese(x: Tensor) -> Tensor:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    return x @ weight - (1 - x) @ weight


def test_a_weight_used_twice_is_refused_and_can_be_left_out() -> None:
    x = torch.randn(5, 3)
    guide = wide_guide(siamese, x)
    with pytest.raises(ValueError, match=r"'weight' is used twice.*sites="):
        replayed(local_reparametrization(siamese), guide, x)
    trace = poutine.trace(guide).get_trace(x)
    left_out = poutine.replay(local_reparametrization(siamese, sites=[]), trace=trace)(x)
    torch.testing.assert_close(left_out, siamese_at(x, trace.nodes["weight"]["value"]))


def siamese_at(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight - (1 - x) @ weight


def test_vectorised_particles_are_refused() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((weight * x).sum(-1), 1.0), obs=y)

    x, y = torch.randn(5, 3), torch.randn(5)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    assert elbo.loss(model, wide_guide(model, x, y), x, y) > 0
    with pytest.raises(ValueError, match="vectorize_particles"):
        elbo.loss(local_reparametrization(model), wide_guide(model, x, y), x, y)


class LastLayer(PyroModule):
    """A learned layer under a Bayesian one."""

    def __init__(self) -> None:
        super().__init__()
        self.features = PyroModule[nn.Linear](3, 5)
        self.last = PyroModule[nn.Linear](5, 2)
        self.last.weight = PyroSample(dist.Normal(torch.zeros(2, 5), 1.0).to_event(2))
        self.last.bias = PyroSample(dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = self.last(torch.tanh(self.features(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits


def test_a_module_stays_a_module_whose_parameters_learn() -> None:
    x, y = torch.randn(20, 3), torch.randint(2, (20,))
    network = LastLayer()
    model = local_reparametrization(network)
    assert isinstance(model, nn.Module)
    assert dict(model.named_parameters()).keys() == {"model.features.weight", "model.features.bias"}
    before = network.features.weight.detach().clone()
    svi = SVI(model, MeanField(network), pyro.optim.Adam({"lr": 0.05}), TraceMeanField_ELBO())
    losses = [svi.step(x, y) for _ in range(30)]
    assert not torch.equal(network.features.weight, before)
    assert sum(losses[-5:]) < sum(losses[:5])
    with Answer() as answer:
        replayed(model, MeanField(network), x, y)
    assert answer.shapes == {"_noise_0": (20, 2)}, "weight and bias of one layer draw one noise"
    assert answer.weights == {"_noise_0": ("last.weight", "last.bias")}


def test_the_messenger_leaves_the_stack_clean_when_the_model_fails() -> None:
    def model(x: Tensor) -> Tensor:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        return x @ weight.exp()

    x = torch.randn(5, 3)
    guide, wrapped = wide_guide(model, x), local_reparametrization(model)
    for _ in range(2):
        with pytest.raises(TypeError, match="exp"):
            replayed(wrapped, guide, x)
    assert wrapped(x).shape == (5,)
