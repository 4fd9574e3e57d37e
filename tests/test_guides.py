"""The mean-field guide: what Pyro's own autoguides can do, with the Gaussian at the site."""

import copy
import gc
import math
import weakref
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.distributions import constraints

from pyro_forget.guides import MeanField, local_reparametrization
from pyro_forget.models import HierarchicalRegression, LinearRegression

SUPPORTS: dict[str, Callable[[], dist.TorchDistribution]] = {
    "real": lambda: dist.Normal(torch.zeros(3), 2.0).to_event(1),
    "real_scalar": lambda: dist.Cauchy(torch.tensor(0.0), 1.0),
    "real_vector": lambda: dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
    "positive": lambda: dist.LogNormal(torch.zeros(3), 1.0).to_event(1),
    "interval": lambda: dist.Uniform(torch.tensor(-1.0), torch.tensor(3.0)),
    "simplex": lambda: dist.Dirichlet(torch.ones(4)),
    "correlation": lambda: dist.LKJCholesky(3, torch.tensor(2.0)),
}
REAL = {"real", "real_scalar", "real_vector"}


def every_support() -> None:
    for name, prior in SUPPORTS.items():
        pyro.sample(name, prior())


def test_gaussians_stand_at_real_sites_and_are_pushed_onto_others() -> None:
    guide = MeanField(every_support, init_scale=0.3)
    trace = poutine.trace(guide).get_trace()
    for name, prior in SUPPORTS.items():
        site = trace.nodes[name]
        assert site["value"].shape == prior().shape()
        assert prior().support.check(site["value"]).all()
        assert ("local_reparametrization" in site["infer"]) == (name in REAL)
        if name in REAL:
            loc, scale = site["infer"]["local_reparametrization"]
            torch.testing.assert_close(site["fn"].mean, loc)
            torch.testing.assert_close(scale, torch.full_like(loc, 0.3))


def test_draws_and_densities_equal_those_of_pyros_normal_guide() -> None:
    ours, theirs = MeanField(every_support, init_scale=0.4), AutoNormal(every_support, init_scale=0.4)
    ours(), theirs()
    for name in SUPPORTS:
        loc = torch.randn_like(getattr(ours.loc, name))
        setattr(ours.loc, name, loc)
        setattr(theirs.locs, name, loc)
    traces = []
    for guide in (ours, theirs):
        pyro.set_rng_seed(3)
        traces.append(poutine.trace(guide).get_trace())
    for name in SUPPORTS:
        torch.testing.assert_close(traces[0].nodes[name]["value"], traces[1].nodes[name]["value"])
    torch.testing.assert_close(traces[0].log_prob_sum(), traces[1].log_prob_sum())


def test_the_density_of_a_saturated_draw_comes_from_its_preimage() -> None:
    def model() -> None:
        pyro.sample("probability", dist.Uniform(torch.tensor(0.0), torch.tensor(1.0)))

    guide = MeanField(model, init_scale=1e-3)
    guide()
    guide.loc.probability = torch.tensor(30.0)
    trace = poutine.trace(guide).get_trace()
    # Far out sigmoid′(u) = exp(−u), so log q(θ) = log N(u; 30, 1e-3) + u, u within a few thousandths of 30.
    assert trace.log_prob_sum().item() == pytest.approx(30 - math.log(1e-3) - 0.5 * math.log(2 * math.pi), abs=8.0)
    u = trace.nodes["probability"]["fn"].transforms[0].inv(trace.nodes["probability"]["value"])
    expected = dist.Normal(torch.tensor(30.0), 1e-3).log_prob(u) + u
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def test_kl_of_real_latents_is_in_closed_form() -> None:
    def model() -> None:
        pyro.sample("a", dist.Normal(torch.full((3,), 0.5), 2.0).to_event(1))
        with pyro.plate("groups", 4):
            pyro.sample("b", dist.Normal(0.0, 1.0))

    start = init_to_value(values={"a": torch.ones(3), "b": torch.full((4,), -2.0)})
    guide = MeanField(model, init_scale=0.2, init_loc_fn=start)
    losses = {TraceMeanField_ELBO().loss(model, guide) for _ in range(3)}

    def kl(loc: float, scale: float, prior_loc: float, prior_scale: float) -> float:
        ratio = scale / prior_scale
        return 0.5 * (ratio**2 + ((loc - prior_loc) / prior_scale) ** 2 - 1) - math.log(ratio)

    assert len(losses) == 1, "no draw enters"
    assert losses.pop() == pytest.approx(3 * kl(1.0, 0.2, 0.5, 2.0) + 4 * kl(-2.0, 0.2, 0.0, 1.0))


def test_quantiles_are_those_of_the_gaussians() -> None:
    class Below(dist.TransformedDistribution):
        """Support below 2, whose bijection falls."""

        support = constraints.less_than(2.0)

        def __init__(self) -> None:
            super().__init__(dist.Normal(torch.tensor(0.0), 1.0), torch.distributions.biject_to(self.support))

    def model() -> None:
        pyro.sample("real", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("positive", dist.LogNormal(torch.tensor(0.0), 1.0))
        pyro.sample("below", Below())

    guide = MeanField(model, init_scale=0.5)
    guide()
    levels = [0.1, 0.5, 0.9]
    quantiles = guide.quantiles(levels)
    real, positive = guide.loc.real.detach(), guide.loc.positive.detach()
    z = dist.Normal(torch.tensor(0.0), 1.0).icdf(torch.tensor(levels))
    torch.testing.assert_close(quantiles["real"], real + 0.5 * z[:, None])
    torch.testing.assert_close(quantiles["positive"], (positive + 0.5 * z).exp())
    assert (quantiles["below"].diff() > 0).all()
    draws = torch.stack([guide()["below"] for _ in range(2000)])
    assert (draws < quantiles["below"][0]).double().mean().item() == pytest.approx(0.1, abs=0.035)
    median = guide.median()
    assert all(torch.equal(median[name], quantiles[name][1]) for name in median)
    assert not any(value.requires_grad for value in median.values())


def test_parameters_start_where_asked() -> None:
    def model() -> None:
        pyro.sample("layer.weight", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))

    guide = MeanField(
        model, init_loc_fn=init_to_value(values={"layer.weight": torch.full((2, 3), 0.7)}), init_scale=0.05
    )
    guide()
    parameters = dict(guide.named_pyro_params())
    assert parameters.keys() == {"loc.layer.weight", "log_scale.layer.weight"}
    assert (parameters["loc.layer.weight"] == 0.7).all()
    torch.testing.assert_close(parameters["log_scale.layer.weight"].exp(), torch.full((2, 3), 0.05))


def conjugate(num_rows: int = 30) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of a linear regression (noise 0.5, prior 1), its posterior's mean and precision."""
    x = torch.randn(num_rows, 3) @ torch.tensor([[1.0, 0.8, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 2.0]])
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.5 * torch.randn(num_rows)
    precision = torch.eye(3) + x.T @ x / 0.25
    return x, y, torch.linalg.solve(precision, x.T @ y / 0.25), precision


def fit(svi: SVI, steps: int, *args: Tensor) -> None:
    for _ in range(steps):
        svi.step(*args)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("module_local", [False, True])
def test_svi_finds_the_mean_field_optimum_of_a_conjugate_model(elbo: type[Trace_ELBO], module_local: bool) -> None:
    x, y, mean, precision = conjugate()
    model = LinearRegression(num_features=3, noise_std=0.5)
    with pyro.settings.context(module_local_params=module_local):
        guide = MeanField(model)
        optimiser = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.99})
        fit(SVI(local_reparametrization(model), guide, optimiser, elbo()), 500, x, y)
        deviation = precision.diagonal().rsqrt()
        # The optimum of q(w) = ∏ N is the exact mean, with the inverse diagonal of the precision as variances.
        assert ((guide.median()["weight"] - mean).abs() < 0.5 * deviation).all()
        torch.testing.assert_close(guide.log_scale.weight.exp(), deviation, rtol=0.2, atol=0.0)
        draws = Predictive(model, guide=guide, num_samples=5)(x)
    assert draws["y"].shape == (5, 30)
    assert draws["weight"].shape[-1] == 3


def test_the_guide_keeps_nothing_of_its_arguments() -> None:
    x, y, *_ = conjugate()
    guide = MeanField(LinearRegression(num_features=3))
    guide(x, y=y)
    references = [weakref.ref(x), weakref.ref(y)]
    del x, y, _
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_a_copy_has_parameters_of_its_own_once_the_store_is_empty() -> None:
    x, y, *_ = conjugate()
    guide = MeanField(LinearRegression(num_features=3))
    guide(x, y)
    twin = copy.deepcopy(guide)
    pyro.clear_param_store()
    with torch.no_grad():
        twin.loc.weight_unconstrained.add_(100.0)
    assert (twin(x)["weight"] > 50).all()
    pyro.clear_param_store()
    assert (guide(x)["weight"] < 50).all()


def test_priors_with_learned_parameters_leave_no_graph_behind() -> None:
    def model() -> None:
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("weight", dist.Normal(torch.zeros(3), scale).to_event(1))

    guide = MeanField(model)
    guide()
    copy.deepcopy(guide)


def test_entries_within_a_plate_of_groups_are_independent_dimensions() -> None:
    model = HierarchicalRegression(num_features=2, num_groups=4)
    args = torch.randn(12, 2), torch.arange(12) % 4, torch.randn(12)
    guide = MeanField(model)
    guide(*args)
    assert guide.loc.effect.shape == (4, 2)
    site = poutine.trace(guide).get_trace(*args).nodes["effect"]
    assert [frame.name for frame in site["cond_indep_stack"]] == ["groups"]
    assert (site["fn"].batch_shape, site["fn"].event_shape) == ((4,), (2,))
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        assert math.isfinite(SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo).step(*args))


def test_it_is_a_part_of_pyros_guide_lists() -> None:
    guide = AutoGuideList(every_support)
    guide.append(MeanField(poutine.block(every_support, expose=["real"])))
    guide.append(AutoDelta(poutine.block(every_support, hide=["real"])))
    assert guide().keys() == SUPPORTS.keys()
    assert guide.median().keys() == SUPPORTS.keys()


def test_float32_models_get_float32_parameters() -> None:
    model, x = LinearRegression(num_features=3), torch.randn(5, 3, dtype=torch.float32)
    guide = MeanField(model)
    assert guide(x, x[:, 0])["weight"].dtype == torch.float32


def discrete(x: Tensor, y: Tensor | None = None) -> None:
    pyro.sample("coin", dist.Bernoulli(torch.tensor(0.5)))


def local(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("data", len(x), subsample_size=2):
        pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(("model", "message"), [(discrete, "'coin' is discrete"), (local, "'z' is in plate 'data'")])
def test_latents_it_cannot_hold_are_refused(model: Callable[..., None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeanField(model)(torch.zeros(5, 1))


def test_an_observation_left_out_at_the_first_call_is_named() -> None:
    def model(y: Tensor | None = None) -> None:
        pyro.sample("y", dist.Bernoulli(torch.tensor(0.5)), obs=y)

    with pytest.raises(ValueError, match=r"'y' is discrete.*give its data at the guide's first call"):
        MeanField(model)()


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="`init_scale` must be positive, got 0"):
        MeanField(every_support, init_scale=0.0)
    with pytest.raises(RuntimeError, match="call it once"):
        MeanField(every_support).median()
