import json
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from arviz_stats import loo
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

from pyro_forget.data import Data
from pyro_forget.energy import FunctionEnergy
from pyro_forget.export import ROLES, from_netcdf, join, plain, to_datatree, to_inferencedata, to_netcdf, variants
from pyro_forget.export.observed import observed
from pyro_forget.guides import MeanField
from pyro_forget.posterior import EnergyPosterior, SampledPosterior, VariationalPosterior
from tests import requests
from tests.requests import ERASED, POOR, PRECISION, STEPS, cloud, exact, model, report, request, values, weighted_cloud


@pytest.fixture
def tree() -> xr.DataTree:
    return requests.tree()


@pytest.fixture
def weighted() -> xr.DataTree:
    return requests.weighted_tree()


def test_draws_of_a_guide_are_one_chain(tree):
    assert tree["posterior/mean"].dims == ("chain", "draw")
    assert tree["posterior/weight"].dims == ("chain", "draw", "weight_dim_0", "weight_dim_1")
    assert tree["posterior/weight"].shape == (1, 200, 2, 3)
    np.testing.assert_array_equal(tree["posterior/mean"][0], request().after.draws(200)["mean"])


def test_before_and_refit_stand_beside(tree):
    for role, suffix in ROLES.items():
        expected = getattr(request(), role).draws(200)["mean"]
        np.testing.assert_array_equal(tree[f"posterior{suffix}/mean"][0], expected)


def test_log_likelihood_is_of_the_exported_draws_on_one_evaluation_set(tree):
    y = values(request().retained).numpy()
    for suffix in ROLES.values():
        found = tree[f"log_likelihood{suffix}/y"]
        assert found.dims == ("chain", "draw", "datum")
        np.testing.assert_array_equal(found.datum, request().retained.ids)
        mean = tree[f"posterior{suffix}/mean"].values[..., None]
        np.testing.assert_allclose(found, -0.5 * (y - mean) ** 2 - 0.5 * np.log(2 * np.pi))


def test_observed_values_carry_their_ids(tree):
    assert tree["observed_data/y"].dims == ("datum",)
    for row in request().retained.batches():
        np.testing.assert_array_equal(tree["observed_data/y"].sel(datum=row.ids.numpy()), row.args[0])


def test_nothing_of_an_erased_row_is_in_the_tree(tree):
    erased, _ = request().data.split(ERASED)
    for node in tree.subtree:
        for name, variable in node.variables.items():
            assert not np.isin(variable.values, list(ERASED)).any() or name == "draw", (node.path, name)
            assert not np.isin(variable.values, values(erased)).any(), (node.path, name)
    assert not any(str(row) in tree.attrs["report"] for row in ERASED)


def test_the_root_says_where_it_comes_from(tree):
    case = request()
    assert tree.attrs["creation_library"] == "pyro_forget"
    assert (tree.attrs["digest"], tree.attrs["parent"]) == (case.after.digest, case.before.digest)
    assert (tree.attrs["num_data"], tree.attrs["num_erased"], tree.attrs["method"]) == (32, 8, STEPS.method)
    assert json.loads(tree.attrs["report"]) == json.loads(json.dumps(report(STEPS).to_dict()))


def test_forgetting_holds_sweeps_and_steps(tree):
    group = tree["forgetting"]
    np.testing.assert_array_equal(group["sweep_held_out"], [4.9, 0.035])
    assert group["sweep_held_out"].dims == ("sweep",)
    assert group["step_norm"].sel(site="mean") == 0.6
    assert (group["residual"], group["num_erased"]) == (2e-7, 8)
    assert "khat" not in group


def test_without_a_report_there_is_no_group_about_it():
    found = to_datatree(request().after, request().retained, num_draws=5)
    assert set(found.children) == {"posterior", "log_likelihood", "observed_data"}
    assert "report" not in found.attrs


def test_draws_keep_their_chains():
    found = to_datatree(cloud(), request().retained)
    assert found["posterior/mean"].sizes == {"chain": 4, "draw": 250}
    np.testing.assert_array_equal(found["posterior/mean"], cloud().latents["mean"])
    assert not {"posterior_weighted", "forgetting"} & set(found.children)


def test_lp_is_the_log_joint_on_all_data_and_absent_on_some():
    retained = request().retained
    found = to_datatree(cloud(), retained)
    lp = found["log_likelihood/y"].sum("datum") + sum(
        xr.apply_ufunc(lambda x, scale=scale: -0.5 * (x / scale) ** 2 - np.log(scale * np.sqrt(2 * np.pi)), value)
        for scale, value in (
            (10.0, found["posterior/mean"]),
            *((1.0, found["posterior/weight"][:, :, i, j]) for i in range(2) for j in range(3)),
        )
    )
    np.testing.assert_allclose(found["sample_stats/lp"], lp)
    some, _ = retained.split(retained.ids[:5])
    assert "sample_stats" not in to_datatree(cloud(), some).children


def test_weighted_draws_are_exported_equally_weighted_and_as_they_are(weighted):
    assert weighted["posterior/mean"].sizes == {"chain": 1, "draw": 1000}
    np.testing.assert_array_equal(weighted["posterior_weighted/mean"], cloud().latents["mean"])
    np.testing.assert_array_equal(weighted["forgetting/log_weights"], weighted_cloud().log_weights)
    loc, sd = exact(values(request().retained))
    weights = np.exp(weighted["forgetting/log_weights"])
    mean = float((weights * weighted["posterior_weighted/mean"]).sum())
    assert abs(mean - loc) < 0.1 * sd < abs(float(weighted["posterior_weighted/mean"].mean()) - loc)
    assert abs(float(weighted["posterior/mean"].mean()) - mean) < 0.03 * sd


def test_resampling_takes_the_same_draws_everywhere(weighted):
    np.testing.assert_array_equal(weighted["posterior/mean"][0], weighted_cloud().draws()["mean"])
    y = values(request().retained).numpy()
    expected = -0.5 * (y - weighted["posterior/mean"].values[..., None]) ** 2 - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(weighted["log_likelihood/y"], expected)
    weight = weighted["posterior/weight"].values
    prior = dist.Normal(0, 1).log_prob(torch.tensor(weight)).sum((-1, -2)).numpy()
    prior += dist.Normal(0, 10).log_prob(torch.tensor(weighted["posterior/mean"].values)).numpy()
    np.testing.assert_allclose(weighted["sample_stats/lp"], expected.sum(-1) + prior)


def test_rows_that_a_posterior_does_not_hold_are_refused():
    case = request()
    with pytest.raises(ValueError, match=r"after forgetting does not hold 8 of the 40 rows in `data`, such as id 100"):
        to_datatree(case.after, case.data)
    with pytest.raises(ValueError, match="of the refit does not hold 8"):
        to_datatree(case.before, case.data, refit=case.refit)


def test_posteriors_of_different_models_are_refused():
    def other(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(1), 10.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    stranger = SampledPosterior(other, {"mean": torch.randn(1, 5, 1)}, request().data)
    with pytest.raises(ValueError, match="before forgetting has the sites"):
        to_datatree(request().after, request().retained, before=stranger, num_draws=5)


def test_a_hand_written_energy_has_nothing_to_export():
    energy = FunctionEnergy(lambda params, data: params["x"].sum(), lambda params, batch: params["x"].sum())
    posterior = EnergyPosterior({"x": torch.zeros(2)}, energy, request().data)
    with pytest.raises(ValueError, match="EnergyPosterior has no draws to export"):
        to_datatree(posterior, request().retained)


def two_sites(x, y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        pyro.sample("x", dist.Normal(mean * torch.ones(3), 1.0).to_event(1), obs=x)
        pyro.factor("penalty", -(y**2) * mean)


def test_several_sites_are_summed_into_one_log_likelihood():
    x, y = torch.randn(6, 3), torch.randn(6)
    data = Data.of((x, y), batch_size=4)
    posterior = SampledPosterior(two_sites, {"mean": torch.randn(2, 3)}, data)
    found = to_datatree(posterior, data)
    np.testing.assert_array_equal(found["observed_data/x"], x)
    np.testing.assert_array_equal(found["observed_data/y"], y)
    assert found["observed_data/x"].dims == ("datum", "x_dim_0")
    assert list(found["log_likelihood"].data_vars) == ["y"]
    np.testing.assert_array_equal(found["log_likelihood/y"], posterior.log_likelihood(data))
    assert found["log_likelihood/y"].dims == ("chain", "draw", "datum")


def nested(y):
    with pyro.plate("groups", 3, dim=-2):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", y.shape[-1], dim=-1):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def test_the_data_plate_may_stand_anywhere():
    y = torch.randn(3, 5)
    data = Data.of((y,), dims={0: 1}, num_data=5, batch_size=2)
    posterior = SampledPosterior(nested, {"mean": torch.randn(1, 4, 3, 1)}, data)
    torch.testing.assert_close(observed(posterior, data)["y"], y.T)


def test_names_with_a_slash():
    def scoped(y):
        mean = pyro.sample("part/mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    data = Data(torch.randn(4))
    found = to_datatree(SampledPosterior(scoped, {"part/mean": torch.randn(1, 5)}, data), data)
    assert "part.mean" in found["posterior"]


def test_round_trip(tree, weighted, tmp_path):
    both = join({"normal": tree, "draws": weighted}, "Two requests")
    for name, each in {"tree": tree, "weighted": weighted, "both": both}.items():
        path = to_netcdf(each, tmp_path / f"{name}.nc")
        xr.testing.assert_identical(from_netcdf(path), each)
        to_netcdf(from_netcdf(path), path)  # the file is not held open
        xr.testing.assert_identical(from_netcdf(path), each)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["both.nc", "tree.nc", "weighted.nc"]


def test_a_failed_write_leaves_the_old_file(tree, tmp_path):
    path = to_netcdf(tree, tmp_path / "a.nc")
    broken = tree.copy()
    broken.attrs["no netCDF type"] = {"a": object()}
    with pytest.raises(TypeError):
        to_netcdf(broken, path)
    xr.testing.assert_identical(from_netcdf(path), tree)
    assert [file.name for file in tmp_path.iterdir()] == ["a.nc"]


def test_plain_numbers():
    assert plain({"a": (1.0, float("nan")), 2: [float("-inf"), None, True]}) == {
        "a": [1.0, "nan"],
        "2": ["-inf", None, True],
    }
    account = json.loads(to_datatree(cloud(), request().retained, report=report(POOR)).attrs["report"])
    assert (account["evidence"]["khat"], account["evidence"]["ess_held_out"]) == ("inf", "nan")


def test_variants(tree, weighted):
    found = variants(tree)
    assert list(found) == ["before", "after", "refit"]
    for role, suffix in ROLES.items():
        assert set(found[role].children) == {"posterior", "log_likelihood"}
        xr.testing.assert_identical(found[role]["posterior"].to_dataset(), tree[f"posterior{suffix}"].to_dataset())
    assert list(variants(weighted)) == ["after"]


def test_nothing_of_torch_is_changed(tree):
    state = torch.random.get_rng_state()
    case = request()
    again = to_datatree(case.after, case.retained, before=case.before, refit=case.refit, num_draws=200)
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(again["posterior/mean"], tree["posterior/mean"])
    other = to_datatree(case.after, case.retained, num_draws=200, seed=1)
    assert not np.array_equal(other["posterior/mean"], tree["posterior/mean"])


@pytest.fixture(scope="module")
def arviz():
    return pytest.importorskip("arviz")


def test_arviz_summarises_scores_and_plots(arviz, tree, weighted, tmp_path):
    """What a user does first, on the InferenceData of ArviZ 0.x and on the tree itself in 1.x."""
    old = int(arviz.__version__.split(".")[0]) == 0
    for number, each in enumerate((tree, weighted)):
        path = to_netcdf(each, tmp_path / f"{number}.nc")
        for data in [to_inferencedata(each), arviz.from_netcdf(path)] if old else [each, arviz.from_netcdf(path)]:
            summary = arviz.summary(data)
            assert list(summary.index[:2]) == ["mean", "weight[0, 0]"]
            assert np.isfinite(arviz.loo(data)["elpd_loo"] if old else arviz.loo(data).elpd)
    models = variants(tree)
    if old:
        arviz.plot_forest([to_inferencedata(each) for each in models.values()], model_names=list(models), combined=True)
    else:
        arviz.plot_forest(models, combined=True, backend="matplotlib")


def test_loo_is_near_the_exact_leave_one_out(tree):
    """It has a closed form for a normal mean: each datum under the posterior of the rest."""
    y = values(request().retained)
    precision = PRECISION + len(y) - 1
    elpd = dist.Normal((y.sum() - y) / precision, (1 + 1 / precision) ** 0.5).log_prob(y).sum()
    refit = variants(tree)["refit"]
    assert abs(loo(refit).elpd - float(elpd)) < 0.3


def test_arviz_that_cannot_take_it_says_so(tree, monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install 'arviz<1'"):
        to_inferencedata(tree)
    monkeypatch.setitem(sys.modules, "arviz", type(sys)("arviz"))
    monkeypatch.setattr(sys.modules["arviz"], "__version__", "1.3.0", raising=False)
    with pytest.raises(ImportError, match=r"ArviZ 1.3.0 works on the tree itself"):
        to_inferencedata(tree)


def test_inferencedata_keeps_every_group(arviz, tree):
    if not arviz.__version__.startswith("0."):
        pytest.skip("ArviZ 1.x has no InferenceData")
    data = to_inferencedata(tree)
    assert set(data.groups()) == set(tree.children)
    assert data.attrs["digest"] == request().after.digest


def test_to_datatree_of_a_saved_posterior_is_the_same(tmp_path):
    case = request()
    case.before.save(tmp_path / "a.safetensors")
    loaded = type(case.before).load(tmp_path / "a.safetensors", model, case.before.guide, case.data)
    one, two = (to_datatree(posterior, case.retained, num_draws=7) for posterior in (case.before, loaded))
    np.testing.assert_array_equal(one["log_likelihood/y"], two["log_likelihood/y"])
    assert one.attrs["digest"] == two.attrs["digest"]


def test_neither_arviz_nor_pyplot_is_imported_on_the_way():
    code = "import sys, pyro_forget.page; print('arviz' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def regression(x, y):
    """Every kind of site: a vector, a positive scalar, and a name that PyroModule would give."""
    weight = pyro.sample("layer.weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ weight, noise), obs=y)


@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal, AutoDelta, MeanField])
def test_any_guide_is_exported_in_the_sites_own_shapes(family):
    """The draws of the two groups are the same ones, although each is drawn on its own."""
    x, y = torch.randn(20, 3), torch.randn(20)
    data = Data.of((x, y), batch_size=7)
    guide = family(regression)
    guide(x, y)
    found = to_datatree(VariationalPosterior(regression, guide, data), data, num_draws=30)
    weight, noise = found["posterior/layer.weight"].values, found["posterior/noise"].values
    assert (weight.shape, noise.shape) == ((1, 30, 3), (1, 30)) and (noise > 0).all()
    residual = (y.numpy() - weight @ x.numpy().T) / noise[..., None]
    expected = -0.5 * residual**2 - np.log(noise[..., None] * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(found["log_likelihood/y"], expected)
