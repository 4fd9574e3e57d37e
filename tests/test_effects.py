"""The conventions by which Pyro programs are run: plates, sites, noise, parameters, and what is refused."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_forget.data import MADE_UP, Data
from pyro_forget.effects.noise import BLOCK, Noise, Quadrature, RowNoise, seeded
from pyro_forget.effects.plate import plate_rows
from pyro_forget.effects.program import over_draws, quiet
from pyro_forget.effects.site import Site
from pyro_forget.posterior import SampledPosterior, VariationalPosterior
from tests.guide_programs import adopted, data, fitted, model
from tests.programs import ADOPTED, linear, on, regression, weights

# --- the plate


def sizes(program: Any) -> dict[str, tuple[int, float]]:
    """(rows, scale) of each sample site."""
    nodes = poutine.trace(program).get_trace().nodes.values()
    sites = [node for node in nodes if node["type"] == "sample" and not node["name"].startswith("data")]
    return {node["name"]: (node["value"].numel(), float(node["scale"])) for node in sites}


def two_plates() -> None:
    with pyro.plate("data", 100, subsample_size=20):
        pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("other", 10, subsample_size=5):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_the_plate_has_the_rows_it_is_given_and_other_plates_their_own() -> None:
    with plate_rows("data", torch.tensor([4, 7, 8])) as asked:
        assert sizes(two_plates) == {"x": (3, 1.0), "other": (5, 1.0), "z": (5, 2.0)}
    assert asked == [100]
    assert sizes(two_plates) == {"x": (20, 5.0), "other": (5, 1.0), "z": (5, 2.0)}


def test_the_plate_is_pyros_again_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="broken"), plate_rows("data", torch.arange(3)):
        raise RuntimeError("broken")
    assert sizes(two_plates)["x"] == (20, 5.0)


def test_a_plate_that_is_open_around_a_call_is_refused() -> None:
    """It would broadcast every site of the model."""
    posterior = adopted("AutoNormal")
    with pyro.plate("outer", 3), pytest.raises(ValueError, match=r"plate 'outer' is open.*from outside"):
        posterior.energy.total(posterior.params, data())
    with pyro.plate("outer", 3), pytest.raises(ValueError, match=r"plate 'outer' is open"):
        adopted("AutoNormal")


def test_the_plate_hands_out_its_indices() -> None:
    with plate_rows("data", torch.tensor([4, 7])), pyro.plate("data", 100, subsample_size=20) as rows:
        assert rows.tolist() == [4, 7]
    with plate_rows("data", torch.tensor([4, 7])):
        assert list(pyro.plate("data", 100)) == [4, 7]


# --- sites


def frame(size: int, dim: int = -1) -> CondIndepStackFrame:
    return CondIndepStackFrame("data", dim, size, 0)


def test_a_site_without_rows_is_refused() -> None:
    site = Site("y", dist.Normal(torch.zeros(3), 1.0), torch.zeros(3), None, 1.0, frame(5), True)
    with pytest.raises(ValueError, match=r"Site 'y' has batch shape \(3,\).* 5 rows at dim -1: every row"):
        site.by_row(5)


@pytest.mark.parametrize("mask", [None, True, False, torch.tensor([True, False, True])])
def test_masks(mask: Any) -> None:
    value = torch.tensor([0.5, 2.0, -1.0])
    site = Site("y", dist.Normal(torch.zeros(3), 1.0), value, mask, 2.0, frame(3), True)
    kept = torch.ones(3) if mask is None else torch.as_tensor(mask).expand(3).double()
    torch.testing.assert_close(site.by_row(3), 2 * kept * dist.Normal(0.0, 1.0).log_prob(value))


@pytest.mark.parametrize("program", ["masked_nan", "masked_nan_of_a_distribution"])
def test_a_masked_nan_leaves_the_gradient_finite(program: str) -> None:
    """0 · NaN is NaN in the backward pass; the row without a value must have gradient 0."""
    posterior = ADOPTED[program]().variational()
    own = {name: value.clone().requires_grad_(True) for name, value in posterior.params.items()}
    missing, _ = ADOPTED[program]().data.split([0])
    share = posterior.energy.share(own, next(missing.batches()))
    found = torch.autograd.grad(share, list(own.values()), allow_unused=True, materialize_grads=True)
    assert share == 0 and all(torch.equal(value, torch.zeros_like(value)) for value in found)
    share = posterior.energy.total(own, ADOPTED[program]().data)
    assert all(value.isfinite().all() for value in torch.autograd.grad(share, list(own.values())))


def test_handlers_around_an_evaluation_see_nothing_of_it() -> None:
    posterior = adopted("AutoNormal")
    alone = posterior.energy.total(posterior.params, data())
    with poutine.trace() as outer, poutine.scale(scale=3.0), poutine.mask(mask=False):
        inside = posterior.energy.total(posterior.params, data())
        draws = posterior.draws(2)
    assert [name for name in outer.trace.nodes if name in ("weight", "noise", "y")] == []
    torch.testing.assert_close(inside, alone, rtol=0, atol=0)
    assert draws["weight"].shape == (2, 2)


def test_validation_is_off_while_a_program_is_evaluated_and_on_again_after() -> None:
    for validate in (True, False):
        with pyro.validation_enabled(validate):
            before = pyro.settings.get("validate_distributions_pyro"), pyro.settings.get("validate_poutine")
            with pytest.raises(KeyError), quiet():
                assert not pyro.settings.get("validate_distributions_pyro")
                raise KeyError
            assert before == (pyro.settings.get("validate_distributions_pyro"), pyro.settings.get("validate_poutine"))


@pytest.mark.parametrize("num_draws", [1, 3])
def test_draws_in_one_pass_equal_a_loop(num_draws: int) -> None:
    values = {"a": torch.arange(num_draws * 2.0).reshape(num_draws, 2), "b": torch.arange(float(num_draws))}

    def function(one: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return one["a"].sum() * one["b"], {"b": one["b"].sin()}

    first, second = over_draws(function, values, num_draws)
    loop = [function({name: value[place] for name, value in values.items()}) for place in range(num_draws)]
    assert torch.equal(first, torch.stack([one for one, _ in loop]))
    assert torch.equal(second["b"], torch.stack([other["b"] for _, other in loop]))


# --- what is refused of guides


def test_an_autoguide_that_never_ran() -> None:
    with pytest.raises(ValueError, match=r"AutoNormal was never fitted: it has no parameters yet.*Fit it first"):
        VariationalPosterior(model, AutoNormal(model), data())


def test_a_function_guide_that_never_ran() -> None:
    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"guide was never fitted: its first run made the parameters \['loc'\]"):
        VariationalPosterior(linear, guide, Data(*regression()))
    assert list(pyro.get_param_store()) == []


def test_a_model_whose_parameters_were_cleared() -> None:
    program = ADOPTED["learned_noise"]()
    guide = program.fitted()
    del pyro.get_param_store()["noise"]
    with pytest.raises(ValueError, match=r"was never fitted: its first run made the parameters \['noise'\]"):
        program.variational(guide)


def guide_of(fn: Any) -> Any:
    def guide(*args: Any, **kwargs: Any) -> None:
        pyro.sample("w", fn(*args))

    return guide


LOC = {"loc": lambda: pyro.param("loc", torch.tensor([0.1, 0.2]))}
OTHER_GUIDES = {
    "no latent": (lambda *args: None, r"only in the guide \{\}, only in the model \{'w': \(2,\)\}"),
    "another shape": (
        guide_of(lambda x, y: dist.Normal(LOC["loc"]()[0].expand(3), 1.0).to_event(1)),
        r"only in the guide \{'w': \(3,\)\}, only in the model \{'w': \(2,\)\}",
    ),
    "no rsample": (
        guide_of(lambda x, y: dist.Normal(LOC["loc"](), 1.0).has_rsample_(False).to_event(1)),
        "draws latent 'w' from a Independent, which has no reparametrised sample",
    ),
    "amortised": (
        guide_of(lambda x, y: dist.Normal(LOC["loc"]() * y.mean(), 1.0).to_event(1)),
        "draws latent 'w' from the data: an amortised guide",
    ),
    "amortised, without Normals": (
        guide_of(lambda x, y: dist.Laplace(LOC["loc"]() * y.mean(), 1.0).to_event(1)),
        "draws latent 'w' from the data: an amortised guide",
    ),
    "a parameter that does nothing": (
        guide_of(lambda x, y: dist.Normal(LOC["loc"]() + 0 * pyro.param("idle", torch.ones(2)), 1.0).to_event(1)),
        r"does not depend on the parameters \['idle'\]",
    ),
}


@pytest.mark.parametrize("name", OTHER_GUIDES)
def test_guides_that_are_refused(name: str) -> None:
    guide, words = OTHER_GUIDES[name]
    guide(*regression())
    with pytest.raises(ValueError, match=words):
        VariationalPosterior(linear, guide, Data(*regression()))


def test_the_guide_of_a_model_before_reparametrisation() -> None:
    guide = AutoNormal(linear)
    guide(*regression())
    program = poutine.reparam(linear, config={"w": LocScaleReparam(0.0)})
    with pytest.raises(ValueError, match=r"only in the model \{'w_decentered': \(2,\)\}.*same reparametrised model"):
        VariationalPosterior(program, guide, Data(*regression()))


def test_a_scale_that_is_not_there_cannot_be_taken_out() -> None:
    with pytest.raises(ValueError, match="depends on which other rows come along"):
        on(linear, options={"minibatch_scale": True}).variational()


def test_a_scale_around_the_prior_too() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with poutine.scale(scale=24 / len(x)):
            w = weights()
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)

    with pytest.raises(ValueError, match=r"mini-batch scale N/B"):
        on(model).variational()
    with pytest.raises(ValueError, match=r"prior depends on the data: site 'w'"):
        on(model, options={"minibatch_scale": True}).variational()


# --- learned parameters


def test_learned_parameters_are_part_of_the_posterior_unless_they_are_frozen() -> None:
    program = ADOPTED["learned_noise"]()
    guide = program.fitted()
    free = VariationalPosterior(program.model, guide, program.data)
    kept = VariationalPosterior(program.model, guide, program.data, freeze=("noise",))
    assert set(free.params) - set(kept.params) == {"model.noise"}
    torch.testing.assert_close(
        free.energy.total(free.params, program.data), kept.energy.total(kept.params, program.data)
    )
    changed = free.params | {"model.noise": free.params["model.noise"] + 1}
    assert abs(free.energy.total(changed, program.data) - free.energy.total(free.params, program.data)) > 1


def test_every_learned_parameter_has_a_gradient() -> None:
    """Plain submodules of a PyroModule are registered by `pyro.module`, which would cut it."""
    program = ADOPTED["bayesian_last_layer"]()
    posterior = program.variational()
    learned = {name for name in posterior.params if name.startswith("model.")}
    assert learned == {"model.features.weight", "model.features.bias"}
    own = {name: value.clone().requires_grad_(True) for name, value in posterior.params.items()}
    posterior.energy.total(own, program.data).backward()
    for name in learned:
        step = torch.zeros_like(own[name])
        step.view(-1)[0] = 1e-6
        ends = [posterior.params | {name: posterior.params[name] + sign * step} for sign in (1, -1)]
        slope = (posterior.energy.total(ends[0], program.data) - posterior.energy.total(ends[1], program.data)) / 2e-6
        torch.testing.assert_close(own[name].grad.view(-1)[0], slope, rtol=1e-5, atol=1e-6)


def test_a_module_with_a_parameter_of_the_models_name() -> None:
    """A nameless PyroModule calls its parameter in the store as a function would call its own."""

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = PyroParam(torch.tensor([0.1, 0.2]))

        def forward(self, x: Tensor, y: Tensor) -> None:
            pyro.sample("w", dist.Normal(self.loc, 0.1).to_event(1))

    guide = Guide()
    guide(*regression())
    posterior = VariationalPosterior(linear, guide, Data(*regression()))
    assert list(posterior.params) == ["loc_unconstrained"]
    assert "loc" in pyro.get_param_store()


# --- noise


def like(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros((), dtype=dtype)


@pytest.mark.parametrize(("pairs", "size"), [(1, 1), (5, 3), (8, 8), (40, 37)])
def test_frames_have_exact_moments(pairs: int, size: int) -> None:
    noise = Noise(3, pairs).normal(size, like())
    assert noise.shape == (2 * pairs, size)
    torch.testing.assert_close(noise.sum(0), torch.zeros(size), rtol=0, atol=1e-12)
    torch.testing.assert_close(noise.T @ noise / (2 * pairs), torch.eye(size), rtol=0, atol=1e-12)
    assert Noise(3, pairs).weights(like()).sum() == pytest.approx(1)


def test_too_few_pairs_are_antithetic_all_the_same() -> None:
    noise = Noise(3, 4).normal(9, like())
    assert torch.equal(noise[:4], -noise[4:])


def test_pairs_without_frames_are_independent() -> None:
    """Antithetic, so means are exact; second moments are those of a sample."""
    noise, ids = Noise(3, 8, framed=False), torch.arange(5)
    for drawn in (noise.normal(3, like()), RowNoise(noise, ids, 0, torch.Size([3]))(ids, like())[:, 2]):
        assert torch.equal(drawn[:8], -drawn[8:])
        assert (drawn.T @ drawn / 16 - torch.eye(3)).abs().max() > 0.01


def test_one_batch_draws_its_noise_once() -> None:
    rows, ids = RowNoise(Noise(3, 2), torch.arange(5), 0, torch.Size([2])), torch.tensor([4, 1])
    first = rows(ids, like())
    assert rows(ids, like()) is first and torch.equal(rows(ids.clone(), like()), first)
    assert rows(ids, like(torch.float32)).dtype == torch.float32


def test_frames_are_standard_normal_on_the_whole() -> None:
    """Each frame is random: over seeds, a coordinate has the moments of N(0, 1) up to the second, and no favourite."""
    found = torch.stack([Noise(seed, 2).normal(2, like())[:2] for seed in range(4000)])
    assert found.mean((0, 1)).abs().max() < 5 / math.sqrt(8000)
    assert (found[:, 0, 0] * found[:, 0, 1]).mean().abs() < 5 * 2 / math.sqrt(4000)
    assert (found[:, 0, 0] > 0).double().mean() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(4000))


def test_noise_is_pinned_by_its_seed_and_by_nothing_else() -> None:
    state = torch.get_rng_state()
    first, again, other = (Noise(seed, 3).normal(5, like()) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    cpu = torch.device("cpu")
    assert seeded(cpu, 1, 2).initial_seed() == seeded(cpu, 1, 2).initial_seed() != seeded(cpu, 2, 1).initial_seed()


IDS = torch.randperm(3 * BLOCK, generator=torch.Generator().manual_seed(0))[: 2 * BLOCK + 100] * 1000 - 5000


@pytest.mark.parametrize("pairs", [2, 6])
def test_the_noise_of_a_row_goes_by_its_id(pairs: int) -> None:
    """Keyed by a row's place in its batch, energies would not add."""
    shape = torch.Size([2, 2])
    rows = RowNoise(Noise(1, pairs), IDS, 0, shape)
    whole = rows(IDS, like())
    assert whole.shape == (2 * pairs, len(IDS), 2, 2)
    generator = torch.Generator().manual_seed(1)
    for size in (1, 7, BLOCK, BLOCK + 1, len(IDS)):
        chosen = torch.randperm(len(IDS), generator=generator)[:size]
        assert torch.equal(rows(IDS[chosen], like()), whole[:, chosen])
    for start in (0, 1, BLOCK - 1, BLOCK):
        assert torch.equal(rows(IDS[start : start + 5], like()), whole[:, start : start + 5])
    # Another instance, asked in another order, draws the same.
    twin = RowNoise(Noise(1, pairs), IDS, 0, shape)
    assert torch.equal(twin(IDS[-3:], like()), whole[:, -3:])


def test_the_noise_of_a_row_has_exact_moments_and_is_its_own() -> None:
    rows = RowNoise(Noise(1, 6), IDS, 0, torch.Size([2, 2]))
    noise = rows(IDS[:600], like()).flatten(2)
    torch.testing.assert_close(noise.sum(0), torch.zeros(600, 4), rtol=0, atol=1e-12)
    second = torch.einsum("sri,srj->rij", noise, noise) / 12
    torch.testing.assert_close(second, torch.eye(4).expand(600, 4, 4), rtol=0, atol=1e-11)
    # Rows are uncorrelated with one another, as far as 6 draws of 4 numbers for 600 rows tell.
    flat = noise[:6].permute(1, 0, 2).flatten(1)
    pairs = (flat[:300] * flat[300:]).sum(1) / 24
    assert pairs.mean().abs() < 5 * pairs.std() / math.sqrt(300)
    assert pairs.std() == pytest.approx(1 / math.sqrt(24), rel=0.3)
    assert len(flat[:, 0].unique()) == 600


def test_sites_and_seeds_have_noise_of_their_own() -> None:
    def draw(seed: int, site: int) -> Tensor:
        return RowNoise(Noise(seed, 3), IDS, site, torch.Size([2]))(IDS[:4], like())

    assert torch.equal(draw(0, 0), draw(0, 0))
    assert not torch.isclose(draw(0, 0), draw(0, 1)).any()
    assert not torch.isclose(draw(0, 0), draw(1, 0)).any()


def test_made_up_rows_have_no_noise_and_unknown_rows_are_refused() -> None:
    rows = RowNoise(Noise(1, 2), IDS, 0, torch.Size([2]))
    assert torch.equal(rows(torch.tensor([MADE_UP, MADE_UP]), like()), torch.zeros(4, 2, 2))
    with pytest.raises(ValueError, match="not in the posterior: erased before, or never there"):
        rows(torch.tensor([IDS.max() + 1]), like())


def test_noise_in_single_precision() -> None:
    noise = RowNoise(Noise(1, 4), IDS, 0, torch.Size([3]))(IDS[:9], like(torch.float32))
    assert noise.dtype == torch.float32
    second = torch.einsum("sri,srj->rij", noise, noise) / 8
    torch.testing.assert_close(second, torch.eye(3, dtype=torch.float32).expand(9, 3, 3), rtol=0, atol=1e-5)


def test_quadrature_is_exact_for_polynomials() -> None:
    points, weights_ = Quadrature().points_and_weights(like())
    moments = [float(weights_ @ points**power) for power in range(14)]
    exact = [0.0 if power % 2 else float(math.prod(range(1, power, 2))) for power in range(14)]
    assert moments == pytest.approx(exact, abs=1e-9)


# --- draws


def test_supports_may_depend_on_other_latents_of_the_same_draw() -> None:
    """NUTS freezes a site's transform at its prototype; the posterior looks at each draw."""

    def model(y: Tensor) -> None:
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        level = pyro.sample("level", dist.Uniform(torch.zeros(()), top))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(level, 1.0), obs=y)

    top = torch.tensor([[0.5, 1.0, 4.0]])
    draws = {"top": top, "level": top * torch.tensor([[0.1, 0.5, 0.9]])}
    y = torch.tensor([0.3, -1.0, 0.4, 2.0])
    posterior = SampledPosterior(model, draws, Data(y))
    expected = {"top": top.log(), "level": torch.tensor([[0.1, 0.5, 0.9]]).logit()}
    torch.testing.assert_close(posterior.params, expected)
    torch.testing.assert_close(posterior.latents, draws)
    # log p(top, level, y) and the logarithms of d top / d u = top and of d level / d v = top · s (1 − s).
    ratio = draws["level"] / top
    jacobian = top.log() + (top * ratio * (1 - ratio)).log()
    joint = dist.LogNormal(0.0, 1.0).log_prob(top) - top.log()
    joint = joint + dist.Normal(draws["level"][..., None], 1.0).log_prob(y).sum(-1) + jacobian
    torch.testing.assert_close(posterior.log_joint(posterior.params, Data(y)), joint)


def test_a_point_guide_has_no_normals_and_others_say_how_many() -> None:
    assert adopted("AutoDelta").energy.whole.guide.num_normals == 0
    assert adopted("AutoNormal").energy.whole.guide.num_normals == 3
    assert adopted("AutoMultivariateNormal").energy.whole.guide.num_normals == 3
    assert adopted("gamma").energy.whole.guide.num_normals is None
    assert isinstance(fitted("AutoDelta"), AutoDelta)
