"""Mini-batches, step sizes, control variates and guards of stochastic-gradient samplers, and Pyro's door to them."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC
from torch import Tensor

from pyro_forget import SampledPosterior
from pyro_forget.data import Data
from pyro_forget.inference.stochastic import (
    PSGLD,
    SGHMC,
    SGLD,
    SGNHT,
    SVRG,
    Cyclic,
    Diverged,
    FixedMode,
    MiniBatchKernel,
    RobbinsMonro,
    ScaleAdaptedSGHMC,
)
from pyro_forget.inference.stochastic import rule as rules
from pyro_forget.inference.stochastic.potential import potential_of
from pyro_forget.inference.stochastic.rule import MOMENTUM, POSITION, PRECISION, Normals
from pyro_forget.inference.stochastic.stream import BatchStream
from pyro_forget.models import MLP
from tests.draws import Logistic
from tests.stochastic import assert_same_law, chains_of, correlated, ends, linear_model, logistic_model, moved

RULES = {
    "sgld": SGLD(1e-4, batch_size=8),
    "psgld": PSGLD(1e-4, batch_size=8),
    "psgld, corrected": PSGLD(1e-4, correction=True, batch_size=8),
    "sghmc": SGHMC(1e-4, batch_size=8),
    "scale-adapted sghmc": ScaleAdaptedSGHMC(1e-2, batch_size=8, hyperprior=(10.0, 10.0)),
    "sgnht": SGNHT(1e-4, batch_size=8),
    "svrg": SGLD(1e-4, batch_size=8, control=SVRG(7)),
    "cyclic": SGHMC(Cyclic(1e-4, 20, 0.5), batch_size=8),
    "clipped": SGLD(1e-4, batch_size=8, max_gradient_norm=300.0),
}


def rows() -> Data:
    target = correlated()
    return Data(target.x, target.y)


def constrained_model(x: Tensor, y: Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), scale).to_event(1))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + shares[0], 0.8), obs=y)


MODELS = {"linear": linear_model, "constrained": constrained_model}


@pytest.mark.parametrize("num_chains", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_the_log_joint(name, num_chains):
    """Closed-form priors and vectorised chains change nothing: beside autograd through the posterior's log joint."""
    data, model = rows(), MODELS[name]
    chains = chains_of(SGLD(1e-4, batch_size=None), data, model, num_chains=num_chains)
    potential, position = chains.potential, chains.state[POSITION]
    posterior = SampledPosterior(model, {k: v[:, None] for k, v in chains.latents().items()}, data)
    leaves = {name: value.clone().requires_grad_() for name, value in posterior.params.items()}
    energy = -posterior.log_joint(leaves, data)
    slopes = torch.autograd.grad(energy.sum(), list(leaves.values()))
    found, gradient = potential.gradient(position, next(data.batches()), torch.empty_like(position))
    torch.testing.assert_close(found, energy.flatten())
    views = potential.layout.views(gradient)
    for name, slope in zip(leaves, slopes, strict=True):
        torch.testing.assert_close(views[name], slope.squeeze(1))


def test_chains_of_a_network_are_those_run_alone():
    """Weights are kept the other way round where several chains are run at once; that is nobody's business."""
    x, y = torch.randn(20, 5), torch.randint(3, (20,))
    data, model = Data(x, y), MLP((5, 7, 3))
    potential = potential_of(model, data, num_chains=2)
    assert potential.layout.turned == {"layer0.weight", "layer1.weight"}
    chains = chains_of(SGLD(1e-4, batch_size=None), data, model, num_chains=2)
    gradient = chains.potential.gradient(chains.state[POSITION], next(data.batches()), torch.empty(2 * 66))[1]
    both, latents = chains.potential.layout.views(gradient), chains.latents()
    for chain in range(2):
        alone = potential_of(model, data)
        position = alone.layout.join({name: value[chain : chain + 1] for name, value in latents.items()})
        one = alone.gradient(position, next(data.batches()), torch.empty_like(position))[1]
        for name, value in alone.layout.views(one).items():
            torch.testing.assert_close(value[0], both[name][chain])


def test_products_are_those_of_the_hessian():
    data = rows()
    chains = chains_of(SGLD(1e-4, batch_size=None), data, num_chains=2)
    potential, vector = chains.potential, torch.randn(6)
    found = potential.product(chains.state[POSITION], next(data.batches()), vector)
    expected = potential.layout.views(vector)["w"] @ correlated().precision
    torch.testing.assert_close(potential.layout.views(found)["w"], expected)


@pytest.mark.parametrize("control", [None, SVRG(5), FixedMode({"w": torch.tensor([0.5, -1.0, 0.3])})])
def test_batches_of_an_epoch_average_to_the_full_gradient(control):
    data = rows()
    chains = chains_of(SGLD(1e-9, batch_size=8, control=control), data)
    position = chains.state[POSITION].clone() + 0.1
    chains.set_position(position)
    total = torch.zeros_like(position)
    for batch in [next(chains._stream) for _ in range(5)]:
        gradient = chains.potential.gradient(position, batch, torch.empty_like(position))[1]
        chains._control(batch, gradient)
        total += gradient / 5
    full = chains.potential.gradient(position, next(data.batches()), torch.empty_like(position))[1]
    torch.testing.assert_close(total, full)


def test_control_variates_take_out_the_noise_at_their_anchor():
    """There every batch gives the full gradient."""
    data = rows()
    mode = {"w": correlated().mean}
    chains = chains_of(SGLD(1e-9, batch_size=8, control=FixedMode(mode)), data, start=mode)
    for _ in range(6):
        batch = next(chains._stream)
        position = chains.state[POSITION]
        gradient = chains.potential.gradient(position, batch, torch.empty_like(position))[1]
        chains._control(batch, gradient)
        torch.testing.assert_close(gradient, torch.zeros(3), atol=1e-8, rtol=0)


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(SGLD(1e-4, batch_size=8), marks=pytest.mark.slow),
        SGHMC(3e-5, 0.2, batch_size=8),
        SGNHT(3e-5, 0.2, batch_size=8),
    ],
)
def test_mini_batches_agree_with_all_rows_in_small_steps(rule):
    """A batch of 8 of 40 rows: what it adds to the covariance falls with the step."""
    target, steps = correlated(), 3500 if isinstance(rule, SGLD) else 1500
    draws = ends(rule, Data(target.x, target.y), steps, 300, start={"w": target.mean})
    assert_same_law(draws, target.mean, target.covariance, bias=0.1)


def test_correction_of_psgld_is_the_derivative_of_its_metric():
    """Γ by finite differences of G along each axis."""
    curvature, position = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([0.3, -0.7, 0.2])
    past = torch.tensor([1.5, 1.2, 2.0])

    def metric(at: Tensor) -> Tensor:
        return 1 / ((0.9 * past + 0.1 * (curvature * at).square()).sqrt() + 0.1)

    def after(correction: bool) -> Tensor:
        rule = PSGLD(1e-2, 0.9, 0.1, correction=correction)
        return moved(rule, position, [past.sqrt(), curvature * position], 0, diagonal=lambda: curvature)[POSITION]

    steps = 1e-6 * torch.eye(3)
    gamma = torch.stack([(metric(position + step) - metric(position - step)) / 2e-6 for step in steps]).diagonal()
    torch.testing.assert_close(after(True) - after(False), 1e-2 * gamma)


def test_scales_are_bounded_at_a_mode():
    """Where the first gradient vanishes, a scale of its own making would be without bound."""
    for rule in (PSGLD(1e-3), ScaleAdaptedSGHMC(0.03)):
        state = moved(rule, torch.zeros(3), [torch.zeros(3)], 0)
        assert float(state[POSITION].abs().max()) < 1.0


def test_noise_is_not_floored_where_gradients_are_noisy():
    """√V is 20 times 2α/ε²: the published sampler adds no noise there; here gradients bring half of it and no more."""
    rule, deviation = ScaleAdaptedSGHMC(0.1, 0.05, resample_every=0), 200.0
    generator = torch.Generator().manual_seed(0)
    gradients = [deviation * torch.randn(2000, generator=generator) for _ in range(400)]
    state = moved(rule, torch.zeros(2000), gradients, 1)
    # Momenta without a force are an autoregression; with s = ρ·2α/(ε²V) its variance is ε²s/(1 − α/2).
    variance = state[MOMENTUM].var()
    expected = 0.5 * 2 * 0.05 / deviation**2 / (1 - 0.05 / 2)
    assert abs(float(variance) / expected - 1) < 0.2


def test_scales_do_not_collapse_without_gradient_noise():
    """Gradients that pass through zero, as full batches have them: no scale above 10 times that of the rest."""
    rule = ScaleAdaptedSGHMC(1e-3, 0.05)
    gradients = [torch.tensor([1.0, math.cos(0.3 * step), 1e-9]) for step in range(300)]
    state = moved(rule, torch.zeros(3), gradients, 0)
    assert bool(torch.isfinite(state[POSITION]).all()) and float(state[POSITION].abs().max()) < 1.0


def test_hyperprior_draws_the_precision_that_weights_ask_for():
    """λ | w ~ Gamma(a + d/2, b + |w|²/2)."""
    chains = chains_of(
        ScaleAdaptedSGHMC(1e-6, hyperprior=(3.0, 2.0), gibbs_every=1, batch_size=None),
        rows(),
        num_chains=4000,
        start={"w": torch.tensor([1.0, -2.0, 0.5])},
    )
    chains.step()
    drawn = chains.potential.layout.views(chains.state[PRECISION])["w"]
    shape, rate = 3.0 + 1.5, 2.0 + 5.25 / 2
    assert bool((drawn == drawn[:, :1]).all())
    assert abs(float(drawn[:, 0].mean()) - shape / rate) < 5 * math.sqrt(shape) / rate / math.sqrt(4000)
    assert abs(float(drawn[:, 0].var()) / (shape / rate**2) - 1) < 0.2


def test_hyperprior_is_refused_where_there_is_no_normal_prior():
    with pytest.raises(ValueError, match=r"Normal priors of mean 0.*'scale', 'shares', 'w'"):
        chains_of(RULES["scale-adapted sghmc"], rows(), constrained_model)


def test_temperatures_are_one():
    """Equipartition: of the momenta, and of the positions by the virial theorem (about the origin)."""
    chains = chains_of(SGHMC(1e-5, 0.2, batch_size=None), rows(), num_chains=400, start={"w": correlated().mean})
    for _ in range(900):
        chains.step()
    chains.step(measure=True)
    kinetic = chains.statistics["kinetic_temperature"]
    assert abs(float(kinetic.mean()) - 1) < 5 * math.sqrt(2 / 1200)
    position = chains.state[POSITION]
    centred = position - chains.potential.layout.join({"w": correlated().mean.expand(400, 3)})
    gradient = chains.potential.gradient(position, next(rows().batches()), torch.empty_like(position))[1]
    virial = chains.potential.layout.dot(centred, gradient) / 3
    assert abs(float(virial.mean()) - 1) < 5 * math.sqrt(2 / 1200) + 0.02
    spread = chains.statistics["configurational_temperature"]
    assert abs(float(spread.mean()) - 1) < 5 * float(spread.std()) / 20


@pytest.mark.parametrize(
    ("schedule", "sizes"),
    [
        (RobbinsMonro(0.1, 0.5), {0: 0.1, 3: 0.05}),
        (RobbinsMonro(0.1, 1.0, 10), {0: 0.1, 30: 0.025}),
        (Cyclic(0.1, 10), {0: 0.1, 5: 0.05, 10: 0.1, 15: 0.05}),
    ],
)
def test_step_sizes(schedule, sizes):
    assert {step: schedule.step_size(step) for step in sizes} == pytest.approx(sizes)


def test_a_cycle_explores_without_noise():
    schedule = Cyclic(1e-3, 10, 0.3)
    assert [schedule.exploring(step) for step in range(11)] == [True] * 3 + [False] * 7 + [True]
    chains = chains_of(SGLD(schedule, batch_size=None), rows(), start={"w": torch.zeros(3)})
    gradient = chains.potential.gradient(torch.zeros(3), next(rows().batches()), torch.empty(3))[1]
    chains.step()
    torch.testing.assert_close(chains.state[POSITION], -1e-3 * gradient)


@pytest.mark.parametrize("name", RULES)
def test_chains_go_on_where_they_were_saved(name):
    """Bit for bit, in the middle of an epoch and of an adaptation."""
    whole, part, other = (chains_of(RULES[name], rows(), num_chains=2, num_warmup=15, seed=4) for _ in range(3))
    for _ in range(23):
        whole.step()
    for _ in range(12):
        part.step()
    tensors, header = part.save()
    other.load({key: value.clone() for key, value in tensors.items()}, header)
    for _ in range(11):
        other.step()
    assert other.number == whole.number
    assert all(torch.equal(value, whole.state[key]) for key, value in other.state.items())


@pytest.mark.parametrize("name", RULES)
def test_a_seed_is_a_run(name):
    runs = [chains_of(RULES[name], rows(), num_chains=2, seed=seed) for seed in (1, 1, 2)]
    outside = torch.get_rng_state()
    for chains in runs:
        for _ in range(4):
            chains.step()
    first, second, third = (chains.state[POSITION] for chains in runs)
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), outside)


def test_draws_of_pyros_mcmc_become_a_posterior():
    data, target = rows(), correlated()
    kernel = MiniBatchKernel(linear_model, SGHMC(2e-4, 0.3, batch_size=8), data, thin=3, start={"w": target.mean})
    mcmc = MCMC(kernel, num_samples=800, warmup_steps=50, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)
    posterior = SampledPosterior(linear_model, draws, data)
    assert posterior.shape == (1, 800)
    assert bool(((draws["w"].mean((0, 1)) - target.mean).abs() < 0.6 * target.covariance.diagonal().sqrt()).all())
    assert mcmc.diagnostics()["steps"] == {"chain 0": 3 * 850}


def test_pyros_mcmc_gets_constrained_draws_of_chains_that_differ():
    kernel = MiniBatchKernel(constrained_model, SGLD(1e-5, batch_size=8), rows())
    with pytest.warns(UserWarning, match="drawn sequentially"):
        mcmc = MCMC(kernel, num_samples=6, warmup_steps=2, num_chains=40, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)
    assert bool((draws["scale"] > 0).all())
    torch.testing.assert_close(draws["shares"].sum(-1), torch.ones(40, 6))
    assert len(draws["w"][:, -1, 0].unique()) == 40
    assert SampledPosterior(constrained_model, draws, rows()).shape == (40, 6)


def test_a_kernel_starts_where_it_is_told():
    kernel = MiniBatchKernel(linear_model, SGLD(1e-12, batch_size=None), rows())
    start = {"w": torch.tensor([3.0, 2.0, 1.0])}
    mcmc = MCMC(kernel, num_samples=1, warmup_steps=0, initial_params=start, disable_progbar=True)
    mcmc.run()
    torch.testing.assert_close(mcmc.get_samples()["w"][0], start["w"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_chains", [1, 3])
def test_long_gradients_are_cut_chain_by_chain(num_chains):
    """Without noise a step is the gradient: of full length where that is short, of the given one where it is long."""
    starts = torch.tensor([[0.9, -1.9, 0.4], [5.0, 5.0, 5.0], [-9.0, 0.0, 2.0]])[-num_chains:]
    plain = chains_of(SGLD(1e-4, batch_size=None), rows(), num_chains=num_chains, start={"w": starts})
    position = plain.state[POSITION].clone()
    layout = plain.potential.layout
    gradient = plain.potential.gradient(position, next(rows().batches()), torch.empty_like(position))[1]
    whole = layout.views(gradient)["w"]
    most = 1.5 * float(whole[0].norm()) if num_chains == 3 else 0.5 * float(whole[0].norm())
    rule = SGLD(Cyclic(1e-4, 10, 0.5), batch_size=None, max_gradient_norm=most)
    chains = chains_of(rule, rows(), num_chains=num_chains, start={"w": starts})
    chains.step(measure=True)
    steps = layout.views(chains.state[POSITION] - position)["w"] / -1e-4
    lengths = whole.norm(dim=1)
    cut = lengths > most
    assert cut.tolist() == ([False, True, True] if num_chains == 3 else [True])
    torch.testing.assert_close(steps, whole * torch.where(cut, most / lengths, 1.0)[:, None])
    torch.testing.assert_close(chains.statistics["gradient_norm"], lengths)
    assert chains.statistics["clipped"].tolist() == cut.double().tolist()


@pytest.mark.parametrize("name", ["sgld", "psgld", "sghmc", "scale-adapted sghmc", "sgnht"])
def test_a_length_that_no_gradient_has_changes_nothing(name):
    """For every rule; and one that all have stops them from running away."""
    rule = RULES[name]
    plain, loose = (chains_of(one, rows(), num_chains=2) for one in (rule, replace(rule, max_gradient_norm=1e9)))
    for _ in range(6):
        plain.step()
        loose.step(measure=True)
    assert torch.equal(plain.state[POSITION], loose.state[POSITION])
    assert loose.statistics["clipped"].tolist() == [0.0, 0.0] and "clipped" not in plain.statistics
    tight = chains_of(replace(rule, max_gradient_norm=1e-3), rows(), num_chains=2)
    for _ in range(6):
        tight.step(measure=True)
    assert tight.statistics["clipped"].tolist() == [1.0, 1.0]
    assert not torch.equal(plain.state[POSITION], tight.state[POSITION])


def test_the_share_of_cut_steps_is_that_after_the_warm_up():
    """A start so far out that the first steps are cut; later ones are not."""
    rule = SGLD(5e-4, batch_size=None, max_gradient_norm=2000.0)
    start = {"w": torch.tensor([60.0, 0.0, 0.0])}
    counted, warmed = (chains_of(rule, rows(), start=start, num_warmup=warmup) for warmup in (0, 90))
    for _ in range(100):
        counted.step(measure=True)
        warmed.step(measure=True)
    assert 0.1 < float(counted.statistics["clipped"]) < 0.9 and float(warmed.statistics["clipped"]) == 0.0


def test_noise_part_by_part_is_fresh_for_every_number(monkeypatch):
    """Parts cover all arrays once, in step with each other, and share no numbers."""
    monkeypatch.setattr(rules, "_PART", 1000)
    left, right = torch.zeros(10_300), torch.arange(10_300.0)
    noise = Normals(left, torch.Generator().manual_seed(0))
    for numbers, one, other in noise.beside(3.0, left, right):
        one.add_(numbers).add_(other)
    drawn = (left - right) / 3.0
    assert drawn.unique().numel() == 10_300
    assert abs(float(drawn.mean())) < 5 / 10_300**0.5 and abs(float(drawn.var()) - 1) < 5 * (2 / 10_300) ** 0.5


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match=r"`batch_size` is 41, the data have 40 rows: give at most 40, or None"):
        chains_of(SGLD(1e-4, batch_size=41), rows())


def test_an_epoch_has_every_row_once():
    stream = BatchStream(rows(), 8, 0)
    for _ in range(3):
        ids = torch.cat([next(stream).ids for _ in range(5)])
        assert ids.sort().values.tolist() == list(range(40))


@pytest.mark.parametrize("num_chains", [1, 2])
@pytest.mark.parametrize("rule", [SGLD(1.0, batch_size=None), SGHMC(1.0, batch_size=8), SGNHT(1.0)])
def test_a_chain_that_runs_away_is_stopped_with_advice(rule, num_chains):
    data = Data(*(value.repeat(4, *[1] * (value.ndim - 1)) for value in (correlated().x, correlated().y)))
    chains = chains_of(rule, data, num_chains=num_chains, start={"w": torch.zeros(3)})
    with pytest.raises(Diverged, match=r"not finite any more at step \d+: .* step size of .*Try") as caught:
        for _ in range(2000):
            chains.step()
    assert caught.value.number == chains.number and 0 < caught.value.suggested < rule.schedule.step_size(0)
    assert caught.value.suggested < 2 / float(torch.linalg.eigvalsh(4 * correlated().precision)[-1])


def test_a_kernel_that_runs_away_stops_pyros_mcmc():
    """At once, and not after all its samples."""
    kernel = MiniBatchKernel(linear_model, SGLD(1.0, batch_size=None), rows(), start={"w": torch.zeros(3)})
    with pytest.raises(Diverged, match=r"at step (\d+): the chain ran away with a step size of 1. Try") as caught:
        MCMC(kernel, num_samples=10**6, warmup_steps=0, disable_progbar=True).run()
    assert caught.value.number < 1000


def test_the_first_energy_that_is_not_finite_stops_one_chain_of_many():
    """The others stand well; the step at which it is seen is the first after the position went wrong."""
    chains = chains_of(SGLD(1e-5, batch_size=None), rows(), num_chains=3)
    chains.step()
    position = chains.state[POSITION].clone()
    chains.potential.layout.views(position)["w"][1] = torch.inf
    chains.set_position(position)
    with pytest.raises(Diverged, match=r"at step 1: the chain ran away with a step size of 1e-05\. Try 2\.5e-06"):
        chains.step()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SGLD(0.0), "`size` must be positive"),
        (lambda: SGLD(float("nan")), "`size` must be positive"),
        (lambda: SGLD(1e-3, batch_size=0), "`batch_size` must be at least 1"),
        (lambda: SGHMC(1e-3, 0.0), "`friction` must be above 0"),
        (lambda: SGHMC(1e-3, 0.1, 0.1), "`noise_estimate`"),
        (lambda: PSGLD(1e-3, decay=1.0), "`decay`"),
        (lambda: ScaleAdaptedSGHMC(1e-3, hyperprior=(0.0, 1.0)), "`hyperprior`"),
        (lambda: RobbinsMonro(0.1, 1.5), "`decay`"),
        (lambda: Cyclic(0.1, 1), "`period`"),
        (lambda: Cyclic(0.1, 10, 1.0), "`exploration`"),
        (lambda: SVRG(0), "`every`"),
        (lambda: SGLD(1e-3, max_gradient_norm=0.0), "`max_gradient_norm` must be positive.*got 0.0"),
        (lambda: SGNHT(1e-3, max_gradient_norm=-1.0), "`max_gradient_norm`"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_start_of_other_shape_is_refused():
    with pytest.raises(ValueError, match=r"`start` has shape \(2,\) for 'w'"):
        chains_of(SGLD(1e-4, batch_size=None), rows(), start={"w": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"latents \['w'\], got \['v'\]"):
        chains_of(SGLD(1e-4, batch_size=None), rows(), start={"v": torch.zeros(3)})


def test_logistic_gradient_has_no_sign_error():
    """A long descent without noise ends at the mode."""
    target = Logistic.drawn(0)
    chains = chains_of(SGLD(Cyclic(4e-3, 10**6, 0.9), batch_size=None), Data(target.x, target.y), logistic_model)
    for _ in range(3000):
        chains.step()
    torch.testing.assert_close(chains.latents()["w"][0], target.laplace()[0], atol=1e-3, rtol=0)
