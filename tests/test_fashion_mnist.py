"""The study of images on a made-up data set: cells, what they leave, and how methods are compared."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.fashion_mnist.compare import Cell, compared, table
from experiments.fashion_mnist.descent import FinetuneDraws
from experiments.fashion_mnist.figures import summarise
from experiments.fashion_mnist.fits import fitted, initial_means, last_rule, rule
from experiments.fashion_mnist.settings import PRESETS, Settings, Task
from experiments.fashion_mnist.study import published_products as products
from experiments.fashion_mnist.study import run
from experiments.images import load_images
from pyro_forget.evaluation import neighbour_kl
from pyro_forget.inference.recursion import Recursion
from pyro_forget.inference.stochastic import SGHMC, SGLD
from pyro_forget.posterior import SampledPosterior
from pyro_forget.store import load_json, save_json

SMALL = Settings(num_train=300, num_test=50, num_steps=60, num_erased=10, finetune_steps=10, recursion_steps=4)


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose class shows in one bright row."""
    folder = tmp_path_factory.mktemp("data")
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", 400), ("t10k", 60)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = generator.integers(0, 120, (count, 28, 28), dtype=np.uint8)
        images[np.arange(count), 2 * labels + 3] = 255
        write_idx(raw / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte.gz", labels)
    (folder / "MNIST").symlink_to(folder / "FashionMNIST")
    colours = folder / "cifar10-jpeg"
    colours.mkdir()
    held = {}
    for part, count in (("train", 120), ("test", 30)):
        held[f"x_{part}"] = generator.integers(0, 120, (count, 32, 32, 3), dtype=np.uint8)
        held[f"y_{part}"] = np.arange(count, dtype=np.uint8) % 10
        held[f"x_{part}"][np.arange(count), 2 * held[f"y_{part}"] + 3, :, 1] = 255
    np.savez(colours / "cifar10_jpegq75_10k_2k.npz", **held)
    return folder


def cell(settings: Settings, seed: int, out: Path, overridden: str = "") -> Path:
    """Run a cell as the front end does."""
    folder = out / "fashion_mnist" / settings.data / settings.fit / settings.method / f"small-seed{seed}{overridden}"
    folder.mkdir(parents=True)
    about = {"experiment": "fashion_mnist", "seed": seed, "settings": settings.__dict__}
    save_json(folder / "settings.json", about)
    save_json(folder / "result.json", run(settings, seed, "cpu", folder))
    return folder


def test_images_are_read_as_they_lie(root: Path) -> None:
    images = load_images("fashion_mnist", root)
    assert images.x.shape == (400, 1, 28, 28)
    assert images.x_test.dtype == torch.get_default_dtype()
    rows = images.x[:, 0].mean(-1).argmax(-1)
    assert torch.equal((rows - 3) // 2, images.y)
    some = images.subset(30, 5, seed=1)
    assert (len(some.y), len(some.y_test)) == (30, 5)
    rows = some.x[:, 0].mean(-1).argmax(-1)
    assert torch.equal((rows - 3) // 2, some.y)


def test_colour_images_are_read_as_they_lie(root: Path) -> None:
    images = load_images("cifar10", root)
    assert images.x.shape == (120, 3, 32, 32) and images.x_test.shape == (30, 3, 32, 32)
    assert float(images.x.max()) == 1.0
    rows = images.x[:, 1].mean(-1).argmax(-1)
    assert torch.equal((rows - 3) // 2, images.y)


@pytest.mark.parametrize(
    ("data", "net"), [("mnist", "mlp"), ("mnist", "lenet"), ("cifar10", "mlp"), ("cifar10", "lenet")]
)
def test_every_network_takes_the_images_of_its_data(data: str, net: str, root: Path, tmp_path: Path) -> None:
    own = replace(SMALL, data=data, net=net, num_train=110, num_test=20, num_steps=3, data_root=str(root))
    folder = cell(replace(own, method="before"), 0, tmp_path)
    assert 0 <= load_json(folder / "result.json")["error_test"] <= 1


def test_the_published_recursion_has_its_scaling_by_fit() -> None:
    scalings = {fit: replace(SMALL, fit=fit).recursion.scaling for fit in ("svi", "sgld", "sghmc")}
    assert scalings == {"svi": 0.1, "sgld": 0.005, "sghmc": 0.05}
    assert replace(SMALL, fit="sgld", scaling=0.3).recursion.scaling == 0.3


def test_the_full_preset_is_the_published_one() -> None:
    full = PRESETS["full"]
    assert full.recursion == Recursion(scaling=0.1, num_steps=64, batch_size=128, num_draws=5, chunk=64)
    sgld, sghmc = (rule(replace(full, fit=fit), 60_000) for fit in ("sgld", "sghmc"))
    for sampler in (sgld, sghmc):
        assert sampler.batch_size == 128
        sizes = [60_000 * sampler.schedule.step_size(step) for step in (0, 3, 99)]
        assert sizes == pytest.approx([0.5, 0.25, 0.05])
    assert sghmc.friction == 0.4


def test_a_small_image_is_enlarged_for_lenet(root: Path) -> None:
    images = replace(SMALL, net="lenet", data_root=str(root)).task(0).images
    assert images.x.shape == (300, 1, 32, 32)
    assert float(images.x.min()) >= -0.5 and float(images.x.max()) <= 0.5
    rows = images.x[:, 0].mean(-1).argmax(-1)
    assert int(((rows * 28 / 32 - 3) / 2 - images.y).abs().max()) < 1


def test_plain_descent_lowers_the_energy(root: Path) -> None:
    own = replace(SMALL, optimiser="sgd", data_root=str(root), num_steps=1)
    data = own.task(0).data
    near, far = (fitted(replace(own, num_steps=steps), data, 0) for steps in (1, 60))
    energy = near.energy.with_noise(1)
    assert float(energy.total(far.params, data)) < 0.9 * float(energy.total(near.params, data))


def test_images_that_are_not_there_say_where_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="--data-root"):
        load_images("mnist", tmp_path)
    monkeypatch.delenv("PYRO_FORGET_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="PYRO_FORGET_DATA"):
        load_images("cifar10")


@pytest.mark.parametrize("fit", ["svi", pytest.param("sgld", marks=pytest.mark.slow)])
def test_cells_share_a_fit_and_are_compared_with_refits(fit: str, root: Path, tmp_path: Path) -> None:
    own = replace(SMALL, fit=fit, data_root=str(root), num_draws=3, thin=2)
    for method in ("before", "default", "published"):
        cell(replace(own, method=method), 0, tmp_path)
    for steps in (5, 10):
        cell(replace(own, method="finetune", finetune_steps=steps), 0, tmp_path, f"-{steps}")
    fits = list((tmp_path / "fashion_mnist" / "fashion_mnist" / fit / "fits").iterdir())
    assert len(fits) == 1
    for seed in (0, 1, 2):
        cell(replace(own, method="retrain"), seed, tmp_path)
    summarise(tmp_path)
    text = (tmp_path / "fashion_mnist" / "table.md").read_text()
    for method in ("before", "default", "published", "finetune, 5 steps", "finetune, 10 steps", "retrain"):
        assert f"| fashion_mnist-mlp-{fit} | 10 | {method} |" in text
    assert (tmp_path / "fashion_mnist" / f"fashion_mnist-mlp-{fit}.png").stat().st_size > 10_000
    assert (tmp_path / "fashion_mnist" / f"fashion_mnist-mlp-{fit}-seconds.png").stat().st_size > 10_000


def test_fine_tuning_of_draws_goes_on_with_each_of_them(root: Path) -> None:
    """The energies of the retained rows fall; the order of chains and draws stays."""
    own = replace(SMALL, fit="sgld", data_root=str(root), num_draws=3, thin=20)
    data = own.task(0).data
    posterior = fitted(own, data, 0)
    erased, retained = data.split(own.task(0).erased)
    edit = FinetuneDraws(30).edit(posterior, erased, retained)
    assert isinstance(posterior, SampledPosterior) and isinstance(edit.posterior, SampledPosterior)
    assert edit.posterior.shape == posterior.shape and torch.equal(edit.posterior.ids, retained.ids)
    before, after = (posterior.log_joint(each.params, retained) for each in (posterior, edit.posterior))
    assert bool((after > before).all())
    for name, value in posterior.params.items():
        steps = edit.posterior.params[name] - value
        assert float(steps.abs().max()) < 30 * 1.1e-3 + 1e-9, name
    with pytest.raises(ValueError, match="has no draws"):
        FinetuneDraws(1).edit(fitted(replace(own, fit="svi", num_steps=1), data, 0), erased, retained)


def test_fine_tuning_of_draws_that_diverges_is_refused(root: Path) -> None:
    own = replace(SMALL, fit="sgld", data_root=str(root), num_steps=2, num_draws=2, thin=1)
    data = own.task(0).data
    posterior = fitted(own, data, 0)
    edit = FinetuneDraws(5, learning_rate=1e200).edit(posterior, *data.split([1, 2]))
    assert edit.evidence.refused == "the energy is not finite: lower the rate" and edit.posterior is posterior


def test_the_sampler_goes_on_at_its_last_step_size() -> None:
    own = replace(SMALL, fit="sghmc", num_steps=90, num_draws=5, thin=2)
    last = last_rule(own)
    assert isinstance(last, SGHMC) and last.friction == own.friction and last.batch_size == 128
    assert [300 * last.schedule.step_size(step) for step in (0, 1_000)] == pytest.approx([0.05, 0.05])
    assert isinstance(last_rule(replace(own, fit="sgld")), SGLD)


@pytest.mark.parametrize("fit", ["sgld", "sghmc"])
def test_the_sampler_goes_on_with_the_retained_images(fit: str, root: Path, tmp_path: Path) -> None:
    own = replace(SMALL, fit=fit, method="sampler", data_root=str(root), num_draws=3, thin=2, sampler_steps=4)
    found = load_json(cell(own, 0, tmp_path) / "result.json")
    assert found["refused"] is None and found["seconds"] > 0
    assert "4 steps of" in found["method"] and "on the retained data" in found["method"]


@pytest.mark.parametrize("fit", ["sgld", "sghmc"])
def test_the_published_algorithm_goes_on_with_the_chain(fit: str, root: Path, tmp_path: Path) -> None:
    """Drawing again is timed apart; every product is of one state of the chain, five to a step of the recursion."""
    own = replace(SMALL, fit=fit, method="published", data_root=str(root), num_draws=3, thin=2)
    found = load_json(cell(own, 0, tmp_path) / "result.json")
    assert found["refused"] is None and found["seconds"] > 0 < found["draw_seconds"]
    assert found["num_products"] == 5 * SMALL.recursion_steps
    assert f"chain of {fit.upper()}" in found["method"] and "3 draws, 2 steps each" in found["method"]


def test_images_go_to_the_device_and_ids_do_not(root: Path) -> None:
    """On the device without values, which every machine has."""
    here = replace(SMALL, data_root=str(root)).task(0)
    there = here.to("meta")
    images = there.images
    assert {part.device.type for part in (images.x, images.y, images.x_test, images.y_test)} == {"meta"}
    (batch,) = there.data.split(there.erased)[0].batches()
    assert {value.device.type for value in batch.args} == {"meta"}
    assert torch.equal(there.erased, here.erased) and torch.equal(there.retained, here.retained)


def test_a_fit_starts_from_the_same_values_on_every_device() -> None:
    site = {"fn": torch.distributions.Normal(torch.zeros(3, 2), 1.0)}
    there = {"fn": torch.distributions.Normal(torch.zeros(3, 2, device="meta"), 1.0, validate_args=False)}
    states = []
    for one in (site, there):
        torch.manual_seed(3)
        assert initial_means(one).device == one["fn"].mean.device
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_the_study_runs_on_the_device_that_is_asked_for(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(Task, "to", lambda task, device: asked.append(device) or task)
    folder = tmp_path / "svi" / "before" / "seed0"
    folder.mkdir(parents=True)
    run(replace(SMALL, data_root=str(root), method="before", num_steps=2), 0, "abacus", folder)
    assert asked == ["abacus"]


@pytest.mark.gpu
@pytest.mark.parametrize("net", ["mlp", "lenet"])
@pytest.mark.parametrize("fit", ["svi", "sgld"])
def test_the_study_on_a_device(fit: str, net: str, root: Path, tmp_path: Path) -> None:
    own = replace(SMALL, fit=fit, net=net, data_root=str(root), num_draws=3, thin=2)
    for method in ("before", "default", "finetune", "published", "retrain"):
        folder = tmp_path / fit / method / "seed0"
        folder.mkdir(parents=True)
        found = run(replace(own, method=method), 0, "cuda", folder)
        assert 0 <= found["error_test"] <= 1
    task = own.task(0).to("cuda")
    assert {value.device.type for value in fitted(own, task.data, 0).params.values()} == {"cuda"}


def made_up(method: str, seed: int, log_probs: Tensor, products: int | None = None, steps: int = 7) -> Cell:
    parts = dict.fromkeys(("erased", "retained", "test"), log_probs)
    parts["log_odds"] = torch.randn(40, 2, generator=torch.Generator().manual_seed(seed)) + 9 * log_probs[:, 0]
    errors = dict.fromkeys(("error_erased", "error_retained", "error_test"), 0.25)
    settings = {"data": "d", "net": "mlp", "fit": "svi", "method": method, "num_erased": 5}
    settings |= {"finetune_steps": steps, "sampler_steps": steps}
    attack = {"erased_as_strangers": 0.5}
    return Cell(settings, seed, {"seconds": 2.0, "num_products": products, "attack": attack, **errors}, parts)


def test_gaps_are_to_the_mean_of_the_refits_and_the_floor_to_the_mean_of_the_others() -> None:
    first, second, third, mine = (torch.tensor([[p, 1 - p]]).log() for p in (0.6, 0.8, 0.7, 0.4))
    refits = [made_up("retrain", seed, value) for seed, value in enumerate((first, second, third))]
    default, retrain = compared([*refits, made_up("default", 5, mine, products=12)])
    target = torch.tensor([0.7, 0.3])
    expected = float((target * (target.log() - mine[0])).sum())
    assert default.values["kl_test"] == pytest.approx(expected)
    assert default.values["l1_test"] == pytest.approx(0.6)
    probs = [0.6, 0.8, 0.7]
    floors = []
    for p, others in zip(probs, (0.75, 0.65, 0.7), strict=True):
        target, own = (torch.tensor([q, 1 - q]) for q in (others, p))
        floors.append(float((target * (target / own).log()).sum()))
    assert retrain.values["kl_erased"] == pytest.approx(sorted(floors)[1])
    assert "| d-mlp-svi | 5 | default | 2 | 12 | 25.0 | 25.0 | 25.0 |" in table([default, retrain])
    assert "| d-mlp-svi | 5 | retrain | 2 | – | 25.0 |" in table([default, retrain])


def test_a_floor_needs_three_refits() -> None:
    value = torch.tensor([[0.5, 0.5]]).log()
    refits = [made_up("retrain", seed, value) for seed in range(3)]
    assert compared(refits[:2]) == []
    assert len(compared(refits)) == 1


def test_every_budget_has_a_row() -> None:
    value = torch.tensor([[0.5, 0.5]]).log()
    cells = [made_up(method, 9, value, steps=steps) for steps in (400, 50) for method in ("sampler", "finetune")]
    cells += [made_up("default", seed, value, steps=seed) for seed in (7, 8)]
    names = [row.name for row in compared([*cells, *(made_up("retrain", seed, value) for seed in range(3))])]
    rivals = [f"{method}, {steps} steps" for method in ("finetune", "sampler") for steps in (50, 400)]
    assert names == ["default", *rivals, "retrain"]


def test_draws_are_compared_with_those_of_every_refit() -> None:
    near, far = (torch.tensor([[p, 1 - p]]).log() for p in (0.5, 0.1))
    refits = [made_up("retrain", seed, near) for seed in range(3)]
    same, other = made_up("default", 7, near), made_up("default", 7, far)
    expected = [neighbour_kl(same.predictions["log_odds"], refit.predictions["log_odds"]) for refit in refits]
    default, _ = compared([*refits, same])
    assert default.values["neighbour_kl"] == pytest.approx(float(torch.stack(expected).mean()))
    assert compared([*refits, other])[0].values["neighbour_kl"] > default.values["neighbour_kl"] + 1
    repeated = replace(same, predictions=same.predictions | {"log_odds": same.predictions["log_odds"].repeat(2, 1)})
    assert compared([*refits, repeated])[0].values["neighbour_kl"] == default.values["neighbour_kl"]
    point = replace(same, predictions=same.predictions | {"log_odds": torch.ones(40, 2)})
    rows = compared([*refits, point])
    assert rows[0].values["neighbour_kl"] is None and "| – |" in table(rows[:1])


def test_the_products_of_the_published_recursion_are_counted(root: Path, tmp_path: Path) -> None:
    own = replace(SMALL, method="published", num_erased=30, data_root=str(root), num_steps=5)
    assert load_json(cell(own, 0, tmp_path) / "result.json")["num_products"] == SMALL.recursion_steps
    assert products(replace(own, num_erased=500)) == 8 * SMALL.recursion_steps


def test_settings_that_make_no_sense_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="`net` is 'vgg': choose from mlp, lenet"):
        replace(SMALL, net="vgg")
    with pytest.raises(ValueError, match="--num-erased 200 is more"):
        replace(SMALL, num_erased=200, data_root=str(root)).task(0)
    with pytest.raises(ValueError, match="have 400 images to train: --num-train 500 is more"):
        replace(SMALL, num_train=500, data_root=str(root)).task(0)
    with pytest.raises(ValueError, match="have 60 images to test: --num-test 70 is more"):
        replace(SMALL, num_test=70, data_root=str(root)).task(0)
    with pytest.raises(ValueError, match="A guide has no sampler to go on with: use --method finetune"):
        replace(SMALL, method="sampler")
