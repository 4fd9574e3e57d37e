"""The same numbers on a CUDA device as on the CPU, where noise does not matter, and near them where it does.

A posterior is fitted on the CPU, saved, and loaded beside data on the device, so both have the same parameters. Each
device draws its own noise. Linear models under frames of noise and logistic ones under quadrature do not see it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.infer import autoguide

from pyro_forget.cli.demo_digits import load
from pyro_forget.curvature import LinearOperator
from pyro_forget.curvature.gauss_newton import GaussNewton
from pyro_forget.curvature.hessian import MODES, Hessian
from pyro_forget.data import Batch, Data
from pyro_forget.energy import share_of, value_and_gradient
from pyro_forget.evaluation import gaussian_kl
from pyro_forget.export import to_datatree
from pyro_forget.forgetters import Finetune, Influence, Transport
from pyro_forget.forgetting import forget
from pyro_forget.guides import MeanField, local_reparametrization
from pyro_forget.models import LinearRegression, LogisticRegression, SoftmaxRegression
from pyro_forget.params import Params, map_params
from pyro_forget.posterior import SampledPosterior, VariationalPosterior
from tests import draws, fits

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
ERASED = list(range(12))
Make = Callable[[], tuple[Any, Any, Data]]


def linear(guide: Callable[..., Any]) -> Make:
    def make() -> tuple[Any, Any, Data]:
        _, model, data = fits.linear()
        return model, guide(model), data

    return make


def logistic_local() -> tuple[Any, Any, Data]:
    model, data = fits.logistic()
    return *fits.local_mean_field(model), data


NOISELESS: dict[str, Make] = {
    "linear, MeanField": linear(MeanField),
    "linear, AutoMultivariateNormal": linear(autoguide.AutoMultivariateNormal),
    "logistic, local MeanField": logistic_local,
}


def both(make: Make, folder: Path, **settings: Any) -> tuple[VariationalPosterior, VariationalPosterior, Data]:
    """(a fitted posterior on the CPU, the same on the device, the data)."""
    model, guide, data = make()
    here = fits.fitted(model, guide, data, **settings)
    path = here.save(folder / "posterior.safetensors")
    there = VariationalPosterior.load(path, model, make()[1], data.to(DEVICE))
    assert_there(there.params)
    return here, there, data


def assert_there(params: Params) -> None:
    assert {value.device.type for value in params.values()} == {DEVICE}


def assert_close(there: Params, here: Params, rtol: float = 1e-8, atol: float = 1e-9) -> None:
    assert_there(there)
    for name, value in here.items():
        torch.testing.assert_close(there[name].cpu(), value, rtol=rtol, atol=atol)


def moved(params: Params) -> Params:
    return map_params(lambda value: value.to(DEVICE), params)


def waves(like: Params) -> Params:
    """Any vector."""
    return map_params(lambda value: torch.arange(1.0, value.numel() + 1).cos().reshape(value.shape), like)


@pytest.mark.parametrize("name", NOISELESS)
def test_energies_and_gradients(name: str, tmp_path: Path) -> None:
    here, there, data = both(NOISELESS[name], tmp_path)
    data = data.with_batch_size(25)
    values = []
    for posterior, rows in ((here, data), (there, data.to(DEVICE))):
        energy, params = posterior.energy, posterior.params
        value, gradient = value_and_gradient(lambda leaves, e=energy, r=rows: e.total(leaves, r), params)
        values.append((value, float(energy.prior(params)), float(share_of(energy, params, rows)), gradient))
    assert values[1][:3] == pytest.approx(values[0][:3], rel=1e-9)
    assert_close(values[1][3], values[0][3], rtol=1e-7, atol=1e-7)


def assert_same_products(here: LinearOperator, there: LinearOperator, like: Params) -> None:
    vector = waves(like)
    assert_close(there.mv(moved(vector)), here.mv(vector), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("batch_size", [5, 60])
@pytest.mark.parametrize("name", NOISELESS)
def test_gauss_newton_products(name: str, batch_size: int, tmp_path: Path) -> None:
    here, there, data = both(NOISELESS[name], tmp_path)
    data = data.with_batch_size(batch_size)
    assert here.gaussian is not None and there.gaussian is not None
    operators = [
        GaussNewton(posterior.energy.gaussian, posterior.gaussian, rows)
        for posterior, rows in ((here, data), (there, data.to(DEVICE)))
    ]
    assert_same_products(*operators, here.gaussian.loc)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NOISELESS)
def test_hessian_products(name: str, mode: str, tmp_path: Path) -> None:
    here, there, data = both(NOISELESS[name], tmp_path)
    operators = [
        Hessian(posterior.energy, posterior.params, rows, mode)
        for posterior, rows in ((here, data), (there, data.to(DEVICE)))
    ]
    assert_same_products(*operators, here.params)


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("name", NOISELESS)
def test_forgetting_by_influence(name: str, curvature: str, tmp_path: Path) -> None:
    here, there, data = both(NOISELESS[name], tmp_path)
    forgetter = Influence(max_sweeps=2, curvature=curvature)
    after = [
        forget(posterior, *rows.split(ERASED), forgetter)
        for posterior, rows in ((here, data), (there, data.to(DEVICE)))
    ]
    assert_close(after[1][0].params, after[0][0].params, rtol=1e-4, atol=1e-4)
    assert after[1][0].ids.tolist() == after[0][0].ids.tolist()
    assert after[1][1].kl == pytest.approx(after[0][1].kl, rel=1e-3)


def digits(local: bool) -> Make:
    def make() -> tuple[Any, Any, Data]:
        everything, _ = load("cpu")
        images, labels = next(everything.split(range(300))[0].batches()).args
        softmax = SoftmaxRegression(images.shape[1], 10)
        model = local_reparametrization(softmax) if local else softmax
        return model, MeanField(model), Data(images, labels)

    return make


@pytest.mark.parametrize("local", [False, True])
def test_forgetting_digits(local: bool, tmp_path: Path) -> None:
    """Other noise leaves the results nearer to each other than to where they started."""
    here, there, data = both(digits(local), tmp_path, num_steps=200, polish_gradient=1e-2)
    assert float(there.energy.total(there.params, data.to(DEVICE))) == pytest.approx(
        float(here.energy.total(here.params, data)), rel=0.05
    )
    ids = data.ids[next(data.batches()).args[1] == 0][:15]
    after, _ = forget(here, *data.split(ids))
    other, report = forget(there, *data.to(DEVICE).split(ids))
    assert report.num_erased == 15
    loc, scale = (value.cpu() for value in fits.flat(other))
    apart = float(gaussian_kl(loc, scale, *fits.flat(after)))
    assert apart < 0.5 * fits.distance(here, after)


def test_training_goes_on(tmp_path: Path) -> None:
    here, there, data = both(NOISELESS["linear, MeanField"], tmp_path)
    forgetter = Finetune(num_steps=50, progress=False)
    after, _ = forget(here, *data.split(ERASED), forgetter)
    other, _ = forget(there, *data.to(DEVICE).split(ERASED), forgetter)
    assert_close(other.params, after.params, rtol=1e-3, atol=1e-3)


def test_what_leaves_the_device(tmp_path: Path) -> None:
    here, there, data = both(NOISELESS["logistic, local MeanField"], tmp_path)
    rows = data.to(DEVICE)
    assert there.digest == here.digest
    values = [posterior.log_likelihood(own, 4000) for posterior, own in ((here, data), (there, rows))]
    assert values[1].shape == (1, 4000, 60) and values[1].device.type == DEVICE
    error = values[0].std(1) * (2 / 4000) ** 0.5
    assert bool(((values[1].mean(1).cpu() - values[0].mean(1)).abs() < 5 * error).all())
    after, report = forget(there, *rows.split(ERASED))
    tree = to_datatree(after, rows.split(ERASED)[1], before=there, report=report, num_draws=20)
    assert tree["log_likelihood"].to_dataset().sizes["draw"] == 20
    path = after.save(tmp_path / "after.safetensors")
    model, guide, _ = NOISELESS["logistic, local MeanField"]()
    assert VariationalPosterior.load(path, model, guide).digest == after.digest


def clouds(folder: Path) -> tuple[SampledPosterior, SampledPosterior, Data]:
    """(1,000 draws of a logistic regression on the CPU, the same on the device, the data)."""
    exact = draws.Logistic.drawn(0, num_data=200, dim=3)
    model, data = LogisticRegression(3), Data(exact.x, exact.y)
    here = SampledPosterior(model, {"weight": exact.sample(1000, 1)[None]}, data)
    there = SampledPosterior.load(here.save(folder / "draws.safetensors"), model, data.to(DEVICE))
    assert_there(there.params)
    return here, there, data


def test_log_densities_of_draws(tmp_path: Path) -> None:
    here, there, data = clouds(tmp_path)
    rows = data.to(DEVICE)
    assert_close({"": there.log_likelihood(rows)}, {"": here.log_likelihood(data)})
    assert_close({"": there.log_joint(there.params, rows)}, {"": here.log_joint(here.params, data)})
    assert there.digest == here.digest


def test_forgetting_by_transport(tmp_path: Path) -> None:
    here, there, data = clouds(tmp_path)
    ids = data.ids[-15:]
    after, _ = forget(here, *data.split(ids), Transport())
    other, report = forget(there, *data.to(DEVICE).split(ids), Transport())
    assert_there(other.params)
    found = [posterior.draws(4000)["weight"].cpu() for posterior in (after, other)]
    torch.testing.assert_close(found[1].mean(0), found[0].mean(0), rtol=0, atol=0.3 * float(found[0].std(0).min()))
    torch.testing.assert_close(found[1].std(0), found[0].std(0), rtol=0.2, atol=0)
    tree = to_datatree(other, data.to(DEVICE).split(ids)[1], before=there, report=report)
    assert tree["log_likelihood"].to_dataset().sizes["draw"] == 1000
    path = other.save(tmp_path / "other.safetensors")
    assert SampledPosterior.load(path, LogisticRegression(3)).digest == other.digest


def test_batches_move_one_at_a_time() -> None:
    """160 MB of rows on the CPU; the device never holds a quarter of them."""
    num_data, num_columns = 400_000, 50
    x = fits.normal(0, num_data, num_columns)
    data = Data(x, x.sum(1) + fits.normal(1, num_data)).to(DEVICE)
    model = LinearRegression(num_columns)
    posterior = fits.started(model, MeanField(model), data)
    assert_there(posterior.params)
    seen: list[Batch] = [next(data.batches())]
    assert seen[0].args[0].device.type == DEVICE and x.device.type == "cpu"
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    after, _ = forget(posterior, *data.split(range(100)), Influence(max_sweeps=1, num_products=5), throw=False)
    assert_there(after.params)
    assert torch.cuda.max_memory_allocated() - held < x.numel() * x.element_size() / 4
