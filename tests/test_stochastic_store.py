"""Sampling to disk: what is written is there, whatever happens, and a stopped run goes on as if it had not been."""

import errno
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch import Tensor

from pyro_forget import SampledPosterior
from pyro_forget.data import Data
from pyro_forget.export import from_netcdf
from pyro_forget.inference.stochastic import (
    SGHMC,
    SGLD,
    SGNHT,
    Cyclic,
    Diverged,
    FixedMode,
    Sampling,
    ScaleAdaptedSGHMC,
    sample_posterior,
)
from pyro_forget.inference.stochastic import archive as archives
from pyro_forget.inference.stochastic import sample as samples
from pyro_forget.inference.stochastic.chains import Chains
from pyro_forget.inference.stochastic.lock import only_writer
from tests.stochastic import chains_of, correlated, hamiltonian_covariance, linear_model

ROOT = Path(__file__).parent.parent
RULES = {
    "sgld": SGLD(1e-4, batch_size=8),
    "scale-adapted sghmc": ScaleAdaptedSGHMC(1e-2, batch_size=8, hyperprior=(10.0, 10.0)),
    "cyclic": SGNHT(Cyclic(1e-4, 20, 0.5), batch_size=8),
    "clipped": SGLD(1e-4, batch_size=8, max_gradient_norm=150.0),
    "anchored": SGHMC(1e-4, batch_size=8, control=FixedMode({"w": torch.tensor([1.0, -2.0, 0.0])})),
}
SETTINGS = {"num_chains": 2, "num_samples": 23, "warmup": 11, "thin": 3, "seed": 5, "progress": False}


def rows() -> Data:
    target = correlated()
    return Data(target.x, target.y)


def sampled(store: Path, rule=RULES["sgld"], model=linear_model, **changed) -> Sampling:
    return sample_posterior(model, rule, rows(), store=store, **{**SETTINGS, **changed})


def draws_of(sampling: Sampling) -> dict[str, np.ndarray]:
    tree = sampling.tree
    found = {name: np.asarray(tree["posterior"][name]) for name in tree["posterior"].data_vars}
    return found | {name: np.asarray(tree["sample_stats"][name]) for name in tree["sample_stats"].data_vars}


def assert_same_draws(left: Sampling, right: Sampling) -> None:
    first, second = draws_of(left), draws_of(right)
    assert set(first) == set(second)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


class Stop(Exception):
    pass


def stopped_after(monkeypatch: pytest.MonkeyPatch, steps: int, error: type[BaseException]) -> None:
    """The next chains stop with `error` in the middle of a step."""
    step, left = Chains.step, iter(range(steps))

    def stopping(self, measure=False):
        if next(left, None) is None:
            self.state["position"].mul_(3.0)
            raise error
        step(self, measure)

    monkeypatch.setattr(Chains, "step", stopping)


@pytest.mark.parametrize(("name", "block"), [*((name, 4) for name in RULES), ("sgld", 1), ("sgld", 256)])
def test_a_stopped_run_goes_on_bit_for_bit(name, block, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_BLOCK", block)
    whole = sampled(tmp_path / "whole", RULES[name])
    assert whole.num_draws == 23
    for stop in (5, 26, 47):
        with monkeypatch.context() as patch:
            patch.setattr(samples, "_SECONDS", 0.0 if stop == 47 else 10.0)
            stopped_after(patch, stop, KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                sampled(tmp_path / "part", RULES[name], resume=True)
    part = sampled(tmp_path / "part", RULES[name], resume=True)
    assert_same_draws(whole, part)
    assert whole.diagnostics == part.diagnostics


def test_a_finished_run_can_be_made_longer(tmp_path):
    sampled(tmp_path / "short", num_samples=9)
    longer = sampled(tmp_path / "short", resume=True)
    assert_same_draws(longer, sampled(tmp_path / "whole"))
    assert longer.tree["posterior"].sizes["draw"] == 23 and longer.diagnostics.num_draws == 23


def test_a_finished_run_is_left_as_it_is(tmp_path):
    first = sampled(tmp_path / "store")
    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("w/c/*") if path.is_file()}
    again = sampled(tmp_path / "store", resume=True)
    assert_same_draws(first, again)
    assert {path: path.read_bytes() for path in before} == before


CHILD = """
import sys, torch
torch.set_default_dtype(torch.float64)
from tests.test_stochastic_store import rows, linear_model, SETTINGS, RULES
from pyro_forget.inference.stochastic import archive, sample, sample_posterior
archive._MAX_BLOCK = 4
commit = archive.Archive.commit
def told(self, first, blocks, count, tensors, header):
    commit(self, first, blocks, count, tensors, header)
    print(count, flush=True)
archive.Archive.commit = told
settings = {**SETTINGS, "num_samples": 4000, "resume": True}
sample_posterior(linear_model, RULES["sgld"], rows(), store=sys.argv[1], **settings)
"""


@pytest.mark.slow
def test_ten_kills_lose_and_double_nothing(tmp_path):
    """SIGKILL at random moments: every draw that was reported is there at once, and the end is that of a whole run."""
    whole, chance = sampled(tmp_path / "whole", num_samples=4000), random.Random(0)
    for _ in range(10):
        reported = killed(tmp_path / "part", after=chance.randint(1, 60), delay=chance.random() * 0.01)
        there = Sampling.open(tmp_path / "part")
        assert there.num_draws >= reported
        found, expected = draws_of(there), draws_of(whole)
        for name, value in found.items():
            np.testing.assert_array_equal(value, expected[name][:, : there.num_draws], err_msg=name)
    assert_same_draws(sampled(tmp_path / "part", num_samples=4000, resume=True), whole)


def killed(store: Path, after: int, delay: float) -> int:
    """Run in a process of its own, kill it some time after so many reports; the last number it reported."""
    command, environment = [sys.executable, "-c", CHILD, str(store)], {**os.environ, "PYTHONPATH": "."}
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=environment)
    last = 0
    for _ in range(after):
        line = child.stdout.readline()
        last = int(line) if line.strip() else last
    try:
        child.wait(delay)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
    rest = child.communicate()[0].split()
    # A line that the kill cut short is no report.
    return max([last, *map(int, rest[:-1])])


def test_two_writers_are_refused(tmp_path):
    """Neither in this process nor in another; readers are welcome, and a writer that was killed leaves no lock."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "part")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": "."},
    )
    try:
        assert child.stdout.readline().strip()
        with pytest.raises(ValueError, match=rf"is being written to by process {child.pid} on .*: wait for its end"):
            sampled(tmp_path / "part", num_samples=4000, resume=True)
        assert Sampling.open(tmp_path / "part").num_draws >= 4
    finally:
        child.kill()
        child.communicate()
    there = Sampling.open(tmp_path / "part").num_draws
    longer = sampled(tmp_path / "part", num_samples=4000, resume=True)
    assert longer.num_draws == 4000 > there


def test_a_run_that_ends_gives_its_lock_back(tmp_path, monkeypatch):
    """However it ends; while it runs there is no second one in the same process."""
    with monkeypatch.context() as patch:
        stopped_after(patch, 5, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            sampled(tmp_path / "store")
    with only_writer(tmp_path / "store"):
        with pytest.raises(ValueError, match=rf"is being written to by process {os.getpid()} on "):
            sampled(tmp_path / "store", resume=True)
    assert sampled(tmp_path / "store", resume=True).num_draws == 23
    assert sampled(tmp_path / "store", resume=True).num_draws == 23


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def unknown(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unknown)
    assert sampled(tmp_path / "store").num_draws == 23


def test_a_full_disk_leaves_the_store_readable(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_BLOCK", 4)
    commits = iter(range(10))
    save = archives.save_tensors

    def full(path, tensors, header):
        if next(commits) == 3:
            Path(path).with_name(".half.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(path, tensors, header)

    with monkeypatch.context() as patch:
        patch.setattr(archives, "save_tensors", full)
        with pytest.raises(OSError, match=r"No space left.*The first 12 of each chain are safe.*resume=True") as caught:
            sampled(tmp_path / "part")
    assert caught.value.errno == errno.ENOSPC
    assert Sampling.open(tmp_path / "part").num_draws == 12
    assert np.isfinite(draws_of(Sampling.open(tmp_path / "part"))["w"]).all()
    assert_same_draws(sampled(tmp_path / "part", resume=True), sampled(tmp_path / "whole"))


def test_a_full_disk_while_draws_are_written(tmp_path, monkeypatch):
    import zarr.storage._local as local

    monkeypatch.setattr(archives, "_MAX_BLOCK", 4)
    put, writes = local._put, []

    def full(path, value, exclusive=False):
        writes.append(path)
        if "posterior" in str(path) and str(path).endswith("/2/0"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(path, value, exclusive)

    with monkeypatch.context() as patch:
        patch.setattr(local, "_put", full)
        with pytest.raises(OSError, match=r"The first 8 of each chain are safe"):
            sampled(tmp_path / "part")
    assert Sampling.open(tmp_path / "part").num_draws == 8
    assert_same_draws(sampled(tmp_path / "part", resume=True), sampled(tmp_path / "whole"))


@pytest.mark.parametrize("part", ["create", "annotate"])
def test_a_full_disk_before_the_first_draw(part, tmp_path, monkeypatch):
    """What was begun is no run yet, or one without draws: the next call begins it."""

    def full(self, *args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        where = "zarr.Group.create_array" if part == "create" else "zarr.core.attributes.Attributes.update"
        patch.setattr(where, full)
        with pytest.raises(OSError, match="No space left") as caught:
            sampled(tmp_path / "part")
    assert caught.value.errno == errno.ENOSPC
    assert_same_draws(sampled(tmp_path / "part", resume=True), sampled(tmp_path / "whole"))


def test_a_full_disk_at_the_very_end(tmp_path, monkeypatch):
    """All draws are there, the diagnostics are not: the next call adds them."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(samples, "diagnose", full)
        with pytest.raises(OSError, match="No space left"):
            sampled(tmp_path / "part")
    assert Sampling.open(tmp_path / "part").num_draws == 23 and Sampling.open(tmp_path / "part").diagnostics is None
    assert sampled(tmp_path / "part", resume=True).diagnostics == sampled(tmp_path / "whole").diagnostics


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"thin": 4}, r"thin is 3 there, 4 here"),
        ({"seed": 6, "warmup": 3}, r"warmup is 11 there, 3 here; seed is 5 there, 6 here"),
        ({"rule": SGLD(2e-4, batch_size=8)}, r"kernel is .*0\.0001.* there, .*0\.0002.* here"),
        ({"rule": SGHMC(1e-4, batch_size=8)}, r"kernel is .*'SGLD'.* there, .*'SGHMC'.* here"),
        ({"num_samples": 22}, r"num_samples is 23 there, 22 here"),
        ({"start": {"w": torch.zeros(3)}}, r"start is"),
    ],
)
def test_a_store_of_another_run_is_refused(changed, said, tmp_path):
    sampled(tmp_path / "store")
    for resume in (True, False):
        with pytest.raises(ValueError, match=rf"holds another run: {said}.*Choose another `store`"):
            sampled(tmp_path / "store", resume=resume, **changed)


def test_a_store_of_this_run_wants_leave_to_go_on(tmp_path):
    sampled(tmp_path / "store")
    with pytest.raises(ValueError, match=r"holds 23 draws of this very run: `resume=True` goes on"):
        sampled(tmp_path / "store")


def test_other_data_are_another_run(tmp_path):
    sampled(tmp_path / "store")
    data = rows().split(range(39))[0]
    with pytest.raises(ValueError, match=r"num_data is 40 there, 39 here; ids"):
        sample_posterior(linear_model, RULES["sgld"], data, store=tmp_path / "store", **SETTINGS)
    target = correlated()
    with pytest.raises(ValueError, match=r"holds another run: start is"):
        other = Data(target.x, target.y + 1)
        sample_posterior(linear_model, RULES["sgld"], other, store=tmp_path / "store", **SETTINGS)


def test_the_tree_is_what_arviz_knows(tmp_path):
    sampling = sampled(tmp_path / "store", SGHMC(1e-4, batch_size=8))
    tree = sampling.tree
    assert dict(tree["posterior"].sizes) == {"chain": 2, "draw": 23, "w_dim_0": 3}
    assert tree["posterior"]["w"].variable._in_memory is False
    expected = {"energy", "step_size", "kinetic_temperature", "configurational_temperature", "gradient_norm"}
    assert set(tree["sample_stats"].data_vars) == expected
    assert np.asarray(tree["constant_data"]["row_id"]).tolist() == list(range(40))
    assert tree["posterior"]["chain"].values.tolist() == [0, 1]
    assert np.isfinite(tree["sample_stats"]["energy"]).all()


def test_a_netcdf_file_is_the_same_tree(tmp_path, monkeypatch):
    """Written in several blocks, the last one shorter, under the names that zarr has."""
    monkeypatch.setattr(archives, "_MAX_BLOCK", 4)
    sampling = sampled(tmp_path / "store", SGHMC(1e-5, batch_size=8), scoped_model)
    path = sampling.to_netcdf(tmp_path / "draws.nc")
    assert path == tmp_path / "draws.nc" and {file.name for file in tmp_path.iterdir()} == {"store", "draws.nc"}
    again = from_netcdf(path)
    xr.testing.assert_identical(again, sampling.tree.load())
    assert set(again.children) == {"posterior", "sample_stats", "constant_data"}
    assert set(again["posterior"].data_vars) == {"net.scale", "net.w"}


def test_a_netcdf_file_of_a_run_that_was_stopped(tmp_path, monkeypatch):
    """As many draws as count; before the first there is nothing to write."""
    monkeypatch.setattr(archives, "_MAX_BLOCK", 4)
    with monkeypatch.context() as patch:
        stopped_after(patch, 11 + 3 * 9, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            sampled(tmp_path / "part")
    tree = from_netcdf(Sampling.open(tmp_path / "part").to_netcdf(tmp_path / "part.nc"))
    assert tree["posterior"].sizes["draw"] == tree["sample_stats"].sizes["draw"] == 8
    with monkeypatch.context() as patch:
        stopped_after(patch, 2, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            sampled(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no draws yet: go on with"):
        Sampling.open(tmp_path / "none").to_netcdf(tmp_path / "none.nc")


def test_a_netcdf_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    sampling = sampled(tmp_path / "store")

    def full(self, *args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("h5netcdf.Group.create_variable", full)
    with pytest.raises(OSError, match="No space left"):
        sampling.to_netcdf(tmp_path / "draws.nc")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_memory_of_a_netcdf_file_does_not_grow_with_the_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_BLOCK", 16)
    peaks = []
    for num_samples in (100, 400):
        sampling = sampled(tmp_path / str(num_samples), model=wide_model, num_samples=num_samples, thin=1)
        sampling.to_netcdf(tmp_path / "warm.nc")
        tracemalloc.start()
        sampling.to_netcdf(tmp_path / "draws.nc")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.25 * peaks[0] + 100_000 < 400 * 2 * 500 * 8


def test_the_draws_become_a_posterior(tmp_path):
    sampling = sampled(tmp_path / "store")
    posterior = sampling.posterior(linear_model, rows())
    assert isinstance(posterior, SampledPosterior) and posterior.shape == (2, 23)
    np.testing.assert_array_equal(posterior.latents["w"].numpy(), draws_of(sampling)["w"])
    few = sampling.posterior(linear_model, rows(), num_draws=5)
    assert few.shape == (2, 5)
    with pytest.raises(ValueError, match=r"has 23 draws of each chain, 24 are asked for"):
        sampling.posterior(linear_model, rows(), num_draws=24)
    with pytest.raises(ValueError, match="other ids"):
        sampling.posterior(linear_model, rows().split(range(39))[0])


def wide_model(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(500), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w[:3], 0.8), obs=y)


def scoped_model(x: Tensor, y: Tensor) -> None:
    scale = pyro.sample("net/scale", dist.HalfNormal(1.0))
    w = pyro.sample("net/w", dist.Normal(torch.zeros(3), scale).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.8), obs=y)


def test_constrained_sites_with_slashes(tmp_path):
    sampling = sampled(tmp_path / "store", SGLD(1e-5, batch_size=8), scoped_model)
    assert (draws_of(sampling)["net.scale"] > 0).all()
    assert sampling.posterior(scoped_model, rows()).shape == (2, 23)


def test_diagnostics_of_a_good_run(tmp_path):
    rule, start = SGHMC(2e-3, 0.3, batch_size=None), {"w": correlated().mean}
    sampling = sampled(tmp_path / "store", rule, num_samples=300, thin=10, warmup=100, num_chains=4, start=start)
    found = sampling.diagnostics
    assert found.num_draws == 300 and found.num_monitored == 3
    assert found.rhat < 1.05 and 100 < found.ess_bulk <= 2000 and found.ess_tail > 100
    exact = hamiltonian_covariance(correlated(), 2e-3, 0.3).diagonal()[3:].mean() / 2e-3
    assert abs(found.kinetic_temperature - float(exact)) < 0.1
    assert abs(found.configurational_temperature - 1) < 0.5
    assert found.gradient_noise_scale == pytest.approx(0.0, abs=1e-9)
    assert all("R-hat is 1.0" in warning for warning in found.warnings)
    assert sampling.tree.attrs["creation_library"] == "pyro_forget"


def test_too_few_draws_for_r_hat(tmp_path):
    found = sampled(tmp_path / "store", num_samples=3).diagnostics
    assert (found.rhat, found.ess_bulk, found.num_monitored) == (None, None, 0)
    assert found.warnings == ("R-hat and ESS need at least 4 draws of each chain, got 3: raise `num_samples`.",)


def test_one_chain_has_no_r_hat(tmp_path):
    found = sampled(tmp_path / "store", num_chains=1).diagnostics
    assert "at least 2 chains, got 1" in found.warnings[0] and found.rhat is None and found.ess_bulk > 0


def test_cut_gradients_are_said_to_be(tmp_path):
    """In the statistics of every draw, and in the diagnostics."""
    rule = SGLD(1e-4, batch_size=8, max_gradient_norm=150.0)
    sampling = sampled(tmp_path / "store", rule)
    shares = np.asarray(sampling.tree["sample_stats"]["clipped"])
    assert shares.shape == (2, 23) and 0 < shares[:, -1].mean() < 1
    assert sampling.diagnostics.clipped == pytest.approx(shares[:, -1].mean())
    assert "of the steps the gradient was cut to `max_gradient_norm`" in sampling.diagnostics.warnings[-1]
    never = sampled(tmp_path / "never", replace(rule, max_gradient_norm=1e9)).diagnostics
    assert never.clipped == 0.0 and not any("cut" in warning for warning in never.warnings)


def test_chains_that_do_not_mix_are_said_not_to(tmp_path):
    found = sampled(tmp_path / "store", SGLD(1e-7, batch_size=8)).diagnostics
    assert found.rhat > 1.5 and "the chains have not mixed" in found.warnings[0]


def test_the_noise_scale_is_that_of_all_batches():
    """tr Cov/|∇U|² of batches without replacement, from the rows' own gradients."""
    data = rows()
    chains = chains_of(SGLD(1e-4, batch_size=8), data, start={"w": torch.tensor([3.0, 0.0, 1.0])})
    position = chains.state["position"]
    each = [
        chains.potential.likelihood_gradient(position, next(data.split([row])[0].batches()), 40.0, torch.empty(3))
        for row in range(40)
    ]
    variance = torch.stack(each).var(0, correction=1).sum() / 8 * (1 - 8 / 40)
    full = chains.potential.gradient(position, next(data.batches()), torch.empty(3))[1]
    found = chains.noise_scale(2000)
    assert abs(float(found) / float(variance / full.square().sum()) - 1) < 0.15
    assert torch.equal(chains.state["position"], position)


def test_a_chain_that_runs_away_leaves_its_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_BLOCK", 2)
    rule = SGLD(3.0 / float(torch.linalg.eigvalsh(correlated().precision)[-1]), batch_size=None)
    with pytest.raises(Diverged, match=r"step \d+"):
        sampled(tmp_path / "store", rule, num_samples=4000)
    there = Sampling.open(tmp_path / "store")
    assert there.num_draws > 0 and np.isfinite(draws_of(there)["w"]).all() and there.diagnostics is None


def test_memory_does_not_grow_with_the_draws(tmp_path):
    """Python's own and NumPy's arrays; torch's are in the chains, whose number does not change."""
    peaks = []
    for num_samples in (200, 600):
        tracemalloc.start()
        sampled(tmp_path / str(num_samples), num_samples=num_samples, thin=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.25 * peaks[0] + 200_000


@pytest.mark.parametrize("name", ["num_samples", "num_chains", "thin", "warmup"])
def test_counts_are_checked(name, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}` must be at least"):
        sampled(tmp_path / "store", **{name: -1})
    assert not (tmp_path / "store").exists()


def test_a_batch_larger_than_the_plate_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`batch_size` is 128, the data have 40 rows"):
        sampled(tmp_path / "store", SGLD(1e-4))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no sampling run"):
        Sampling.open(tmp_path)
