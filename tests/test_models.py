"""Every model against its formula: scipy's densities stand in for Pyro's."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, TraceMeanField_ELBO
from pyro.poutine.util import prune_subsample_sites
from scipy import stats
from scipy.special import expit, log_softmax
from torch import Tensor, nn

from pyro_forget.guides import MeanField, local_reparametrization
from pyro_forget.models import (
    MLP,
    HierarchicalRegression,
    LeNet,
    LinearRegression,
    LogisticRegression,
    PoissonRegression,
    SoftmaxRegression,
)
from pyro_forget.models.prior import normal_prior

Latents = dict[str, np.ndarray]
NUM_ROWS, NUM_FEATURES, NUM_CLASSES, NUM_GROUPS = 12, 3, 4, 5


def features() -> Tensor:
    return torch.randn(NUM_ROWS, NUM_FEATURES)


def classes() -> Tensor:
    return torch.arange(NUM_ROWS) % NUM_CLASSES


def groups() -> Tensor:
    return torch.arange(NUM_ROWS) % (NUM_GROUPS - 1)  # the last group has no rows


@dataclass(frozen=True)
class Case:
    """A model, its arguments, the shapes of its latents and its log joint by hand."""

    model: Callable[..., Tensor]
    args: Callable[[], tuple[Tensor, ...]]
    shapes: dict[str, tuple[int, ...]]
    log_joint: Callable[..., float]


def normal(value: np.ndarray, loc: np.ndarray | float, scale: np.ndarray | float) -> float:
    return stats.norm(loc, scale).logpdf(value).sum()


def half_normal(value: np.ndarray, scale: float) -> float:
    return stats.halfnorm(0, scale).logpdf(value).sum()


def categorical(y: np.ndarray, logits: np.ndarray) -> float:
    return log_softmax(logits, -1)[np.arange(len(y)), y].sum()


def linear_joint(t: Latents, x: np.ndarray, y: np.ndarray) -> float:
    return normal(t["weight"], 0, 2) + normal(y, x @ t["weight"], 0.5)


def learned_noise_joint(t: Latents, x: np.ndarray, y: np.ndarray) -> float:
    prior = normal(t["weight"], 0, 1) + half_normal(t["noise_std"], 3)
    return prior + normal(y, x @ t["weight"], t["noise_std"])


def logistic_joint(t: Latents, x: np.ndarray, y: np.ndarray) -> float:
    return normal(t["weight"], 0, 2) + stats.bernoulli(expit(x @ t["weight"])).logpmf(y).sum()


def softmax_joint(t: Latents, x: np.ndarray, y: np.ndarray) -> float:
    prior = normal(t["weight"], 0, 2) + normal(t["bias"], 0, 2)
    return prior + categorical(y, x @ t["weight"] + t["bias"])


def poisson_joint(t: Latents, x: np.ndarray, y: np.ndarray) -> float:
    return normal(t["weight"], 0, 0.5) + stats.poisson(np.exp(x @ t["weight"])).logpmf(y).sum()


def hierarchical_prior(t: Latents) -> float:
    return normal(t["location"], 0, 2) + half_normal(t["spread"], 1.5) + half_normal(t["noise_std"], 1.5)


def centred_joint(t: Latents, x: np.ndarray, group: np.ndarray, y: np.ndarray) -> float:
    mean = (x * t["effect"][group]).sum(-1)
    return hierarchical_prior(t) + normal(t["effect"], t["location"], t["spread"]) + normal(y, mean, t["noise_std"])


def non_centred_joint(t: Latents, x: np.ndarray, group: np.ndarray, y: np.ndarray) -> float:
    effect = t["location"] + t["spread"] * t["offset"]
    mean = (x * effect[group]).sum(-1)
    return hierarchical_prior(t) + normal(t["offset"], 0, 1) + normal(y, mean, t["noise_std"])


def mlp_joint(t: Latents, x: np.ndarray, y: np.ndarray) -> float:
    hidden = np.maximum(x @ t["layer0.weight"].T + t["layer0.bias"], 0)
    hidden = np.maximum(hidden @ t["layer1.weight"].T + t["layer1.bias"], 0)
    logits = hidden @ t["layer2.weight"].T + t["layer2.bias"]
    return sum(normal(value, 0, 0.5) for value in t.values()) + categorical(y, logits)


def lenet_joint(t: Latents, x: np.ndarray, y: np.ndarray) -> float:
    layers = [nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    network = nn.Sequential(*layers)
    latents = [
        f"{name}.{kind}" for name in ("conv1", "conv2", "linear1", "linear2", "linear3") for kind in ("weight", "bias")
    ]
    weights = {name: torch.tensor(t[latent]) for name, latent in zip(network.state_dict(), latents, strict=True)}
    logits = torch.func.functional_call(network, weights, torch.tensor(x))
    return sum(normal(value, 0, 0.15) for value in t.values()) + categorical(y, logits.detach().numpy())


HIERARCHICAL = {"location": (NUM_FEATURES,), "spread": (NUM_FEATURES,), "noise_std": ()}
EFFECTS = (NUM_GROUPS, NUM_FEATURES)
CASES = {
    "linear": Case(
        LinearRegression(NUM_FEATURES, prior_std=2.0, noise_std=0.5),
        lambda: (features(), torch.randn(NUM_ROWS)),
        {"weight": (NUM_FEATURES,)},
        linear_joint,
    ),
    "linear, learned noise": Case(
        LinearRegression(NUM_FEATURES, noise_std=None, noise_prior_std=3.0),
        lambda: (features(), torch.randn(NUM_ROWS)),
        {"weight": (NUM_FEATURES,), "noise_std": ()},
        learned_noise_joint,
    ),
    "logistic": Case(
        LogisticRegression(NUM_FEATURES, prior_std=2.0),
        lambda: (features(), torch.arange(NUM_ROWS) % 3 == 0),
        {"weight": (NUM_FEATURES,)},
        logistic_joint,
    ),
    "softmax": Case(
        SoftmaxRegression(NUM_FEATURES, NUM_CLASSES, prior_std=2.0, bias=True),
        lambda: (features(), classes()),
        {"weight": (NUM_FEATURES, NUM_CLASSES), "bias": (NUM_CLASSES,)},
        softmax_joint,
    ),
    "poisson": Case(
        PoissonRegression(NUM_FEATURES, prior_std=0.5),
        lambda: (features(), classes()),
        {"weight": (NUM_FEATURES,)},
        poisson_joint,
    ),
    "hierarchical": Case(
        HierarchicalRegression(NUM_FEATURES, NUM_GROUPS, prior_std=2.0, scale_prior_std=1.5),
        lambda: (features(), groups(), torch.randn(NUM_ROWS)),
        {**HIERARCHICAL, "effect": EFFECTS},
        centred_joint,
    ),
    "hierarchical, not centred": Case(
        HierarchicalRegression(NUM_FEATURES, NUM_GROUPS, centred=False, prior_std=2.0, scale_prior_std=1.5),
        lambda: (features(), groups(), torch.randn(NUM_ROWS)),
        {**HIERARCHICAL, "offset": EFFECTS},
        non_centred_joint,
    ),
    "mlp": Case(
        MLP((NUM_FEATURES, 6, 5, NUM_CLASSES), prior_std=0.5),
        lambda: (features(), classes()),
        {
            "layer0.weight": (6, NUM_FEATURES),
            "layer0.bias": (6,),
            "layer1.weight": (5, 6),
            "layer1.bias": (5,),
            "layer2.weight": (NUM_CLASSES, 5),
            "layer2.bias": (NUM_CLASSES,),
        },
        mlp_joint,
    ),
    "lenet": Case(
        LeNet(),
        lambda: (torch.randn(NUM_ROWS, 1, 32, 32), classes()),
        {
            "conv1.weight": (6, 1, 5, 5),
            "conv1.bias": (6,),
            "conv2.weight": (16, 6, 5, 5),
            "conv2.bias": (16,),
            "linear1.weight": (120, 400),
            "linear1.bias": (120,),
            "linear2.weight": (84, 120),
            "linear2.bias": (84,),
            "linear3.weight": (10, 84),
            "linear3.bias": (10,),
        },
        lenet_joint,
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def latents_of(trace: poutine.Trace) -> dict[str, Tensor]:
    nodes = prune_subsample_sites(trace).nodes.items()
    return {
        name: node["value"]
        for name, node in nodes
        if node["type"] == "sample" and not node["is_observed"] and not node["infer"].get("_deterministic")
    }


def test_latents_and_outputs_have_their_shapes(case: Case) -> None:
    *inputs, y = case.args()
    trace = poutine.trace(case.model).get_trace(*inputs, y)
    assert {name: tuple(value.shape) for name, value in latents_of(trace).items()} == case.shapes
    assert trace.nodes["y"]["is_observed"]
    assert [frame.name for frame in trace.nodes["y"]["cond_indep_stack"]] == ["data"]
    assert len(trace.nodes["_RETURN"]["value"]) == NUM_ROWS


def test_log_joint_equals_the_formula(case: Case) -> None:
    args = case.args()
    trace = poutine.trace(case.model).get_trace(*args)
    values = {name: value.numpy() for name, value in latents_of(trace).items()}
    expected = case.log_joint(values, *(arg.numpy() for arg in args))
    assert trace.log_prob_sum().item() == pytest.approx(expected, rel=1e-10)


def test_types_follow_the_inputs(case: Case) -> None:
    args = [arg.float() if arg.is_floating_point() else arg for arg in case.args()]
    trace = poutine.trace(case.model).get_trace(*args)
    trace.compute_log_prob()
    assert {value.dtype for value in latents_of(trace).values()} == {torch.float32}
    assert {trace.nodes[name]["log_prob"].dtype for name in ("y", *case.shapes)} == {torch.float32}
    assert trace.nodes["_RETURN"]["value"].dtype == torch.float32


def test_outputs_under_vmap_over_draws_equal_the_loop(case: Case) -> None:
    args = case.args()
    draws = [latents_of(poutine.trace(case.model).get_trace(*args)) for _ in range(3)]
    stacked = {name: torch.stack([draw[name] for draw in draws]) for name in case.shapes}

    def output(latents: dict[str, Tensor]) -> Tensor:
        with pyro.validation_enabled(False):
            return poutine.condition(case.model, data=latents)(*args)

    looped = torch.stack([output({name: value[i] for name, value in stacked.items()}) for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(output)(stacked), looped)


def test_svi_and_predictive_take_the_model_as_it_is(case: Case) -> None:
    args = case.args()
    *inputs, _ = args
    hierarchical = isinstance(case.model, HierarchicalRegression)
    model = case.model if hierarchical else local_reparametrization(case.model)
    guide = MeanField(case.model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), TraceMeanField_ELBO())
    losses = [svi.step(*args) for _ in range(40)]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-8:]) < sum(losses[:8])
    draws = Predictive(case.model, guide=guide, num_samples=2, return_sites=("y", "_RETURN"))(*inputs)
    assert draws["y"].shape == (2, NUM_ROWS)
    assert draws["_RETURN"].shape[:2] == (2, NUM_ROWS)


def test_nuts_finds_the_posterior_of_a_linear_regression() -> None:
    x, y = features(), torch.randn(NUM_ROWS)
    precision = torch.eye(NUM_FEATURES) + x.T @ x / 0.25
    mean, deviation = torch.linalg.solve(precision, x.T @ y / 0.25), torch.linalg.inv(precision).diagonal().sqrt()
    kernel = NUTS(LinearRegression(NUM_FEATURES, noise_std=0.5), max_tree_depth=5)
    mcmc = MCMC(kernel, num_samples=150, warmup_steps=60, disable_progbar=True)
    mcmc.run(x, y)
    draws = mcmc.get_samples()["weight"]
    # Five standard errors at a third of the draws' number.
    assert ((draws.mean(0) - mean).abs() < 5 * deviation / math.sqrt(50)).all()


@pytest.mark.parametrize(("channels", "count"), [(1, 61_706), (3, 62_006)])
def test_lenet_has_the_published_number_of_weights(channels: int, count: int) -> None:
    trace = poutine.trace(LeNet()).get_trace(torch.zeros(2, channels, 32, 32), torch.zeros(2, dtype=torch.int64))
    assert sum(trace.nodes[name]["value"].numel() for name in CASES["lenet"].shapes) == count


def test_a_softmax_regression_without_bias_has_none() -> None:
    trace = poutine.trace(SoftmaxRegression(65, 10)).get_trace(torch.zeros(2, 65), torch.tensor([0, 9]))
    assert latents_of(trace).keys() == {"weight"}
    assert trace.nodes["weight"]["value"].numel() == 650


def test_hierarchical_effects_are_reported_when_not_centred() -> None:
    model = HierarchicalRegression(NUM_FEATURES, NUM_GROUPS, centred=False)
    nodes = poutine.trace(model).get_trace(features(), groups(), torch.randn(NUM_ROWS)).nodes
    expected = nodes["location"]["value"] + nodes["spread"]["value"] * nodes["offset"]["value"]
    torch.testing.assert_close(nodes["effect"]["value"], expected)


def test_networks_flatten_images_and_refuse_other_sizes() -> None:
    assert MLP((4, 3))(torch.zeros(5, 1, 2, 2)).shape == (5, 3)
    with pytest.raises(ValueError, match=r"\(num_rows, channels, 32, 32\), got \(5, 1, 28, 28\)"):
        LeNet()(torch.zeros(5, 1, 28, 28))
    with pytest.raises(ValueError, match="`widths`"):
        MLP((4,))


def test_mlp_is_what_a_sequence_of_layers_computes() -> None:
    model, x = MLP((784, 40, 30, 10)), torch.randn(3, 784)
    trace = poutine.trace(model).get_trace(x)
    hidden = x
    for depth in range(3):
        weight, bias = (trace.nodes[f"layer{depth}.{kind}"]["value"] for kind in ("weight", "bias"))
        hidden = F.linear(torch.relu(hidden) if depth else hidden, weight, bias)
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], hidden)


def test_priors_made_in_inference_mode_do_not_leak_out():
    """Priors are kept from call to call, but tensors of inference mode cannot be differentiated through."""
    x = torch.ones(2, 3)
    with torch.inference_mode():
        inside = normal_prior(x, 0.37, 4)
    weight = torch.ones(4, requires_grad=True)
    normal_prior(x, 0.37, 4).log_prob(weight).backward()
    torch.testing.assert_close(weight.grad, torch.full((4,), -1 / 0.37**2))
    assert inside.mean.is_inference() and normal_prior(x, 0.37, 4) is normal_prior(x, 0.37, 4)
    assert normal_prior(x.float(), 0.37, 4).mean.dtype is torch.float32
