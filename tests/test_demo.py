"""The demonstration: small, for its parts and promises; in full, marked slow, for its figures."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pyro
import pytest
import torch

from pyro_forget.cli import demo_breast_cancer, demo_digits
from pyro_forget.cli.comparison import score
from pyro_forget.cli.demo import Demo, Settings, run_demo
from pyro_forget.cli.demo_breast_cancer import BreastCancer
from pyro_forget.cli.demo_digits import Digits
from pyro_forget.cli.study import METHODS
from pyro_forget.data import Data
from pyro_forget.export import from_netcdf
from pyro_forget.page import write_page

SMALL = Settings(
    Digits(num_erased=20, num_steps=40, polish_pairs=2, polish_gradient=20.0, finetune_steps=3, num_draws=20),
    BreastCancer(num_erased=5, num_draws=60, num_warmup=40),
)
FIGURES = {"remaining_fraction", "floor", "seconds", "error_erased", "error_retained", "error_test"}


class Small(NamedTuple):
    demo: Demo
    out: Path
    changed: list[str]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A small demonstration under the default type that users have, its folder, and what it left changed."""
    out = tmp_path_factory.mktemp("demo")
    outside = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()
    pyro.param("mine", torch.ones(1))
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        demo = run_demo(out, settings=SMALL)
        kept = {
            "type": torch.get_default_dtype() == torch.float32,
            "threads": torch.get_num_threads() == 2,
            "random state": torch.equal(torch.get_rng_state(), random),
            "parameter store": list(pyro.get_param_store().keys()) == ["mine"],
        }
        return Small(demo, out, [name for name, same in kept.items() if not same])
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(outside)


def without_seconds(figures: dict) -> dict:
    return {
        method: {name: value for name, value in row.items() if name != "seconds"} for method, row in figures.items()
    }


class TestSmall:
    def test_the_figures_are_those_promised(self, small):
        figures = small.demo.figures
        assert set(figures) == {"digits", "breast_cancer"}
        for part, more in (("digits", set()), ("breast_cancer", {"khat", "ess"})):
            assert tuple(figures[part]) == METHODS
            assert all(set(row) == FIGURES | more for row in figures[part].values())
            assert figures[part]["before"]["remaining_fraction"] == pytest.approx(1)
            assert figures[part]["refit"]["remaining_fraction"] == 0
            assert len({row["floor"] for row in figures[part].values()}) == 1
            assert all(row["seconds"] > 0 for row in figures[part].values())
        json.dumps(figures, allow_nan=False)

    def test_only_draws_that_were_weighed_have_weights(self, small):
        rows = small.demo.figures["breast_cancer"]
        assert {method for method in METHODS if rows[method]["ess"] is not None} == {"default", "published"}

    def test_the_worst_explained_were_withdrawn(self, small):
        rows = small.demo.figures["breast_cancer"]
        assert rows["before"]["error_erased"] == 1.0

    def test_every_file_is_there(self, small):
        demo, out = small.demo, small.out
        assert demo.files[0] == out / "report.html"
        assert sorted(demo.files) == sorted(out.iterdir())
        assert {"report.html", "report.json", "forgetting.nc"} <= {path.name for path in demo.files}
        assert {"report-digits-forest.png", "report-breast_cancer-weights.svg"} <= {path.name for path in demo.files}

    def test_the_tree_holds_both_requests_as_they_are_exported(self, small):
        tree = from_netcdf(small.out / "forgetting.nc")
        assert set(tree.children) == {"digits", "breast_cancer"}
        for name, draws, erased in (("digits", 20, 20), ("breast_cancer", 120, 5)):
            branch = tree[name]
            assert {"posterior", "posterior_before", "posterior_refit", "log_likelihood", "forgetting"} <= set(branch)
            assert branch.attrs["num_erased"] == erased
            assert branch["posterior"].sizes["chain"] * branch["posterior"].sizes["draw"] == draws
            assert branch["log_likelihood"].sizes["datum"] == int(branch["forgetting"]["num_retained"])

    def test_weights_are_named(self, small):
        tree = from_netcdf(small.out / "forgetting.nc")
        labels = tree["breast_cancer/posterior_refit"]["weight_dim_0"].values
        assert list(labels[:2]) == ["mean radius", "mean texture"] and labels[-1] == "intercept"
        assert str(tree["digits/posterior"]["weight_dim_1"].values[3]) == "digit 3"

    def test_the_table_tells_the_gradient_norms_and_the_second_refit(self, small):
        table = json.loads(from_netcdf(small.out / "forgetting.nc")["digits"].attrs["table"])
        assert [row["method"] for row in table][-2:] == ["refit", "another refit"]
        assert table[-1]["remaining_fraction"] == table[0]["floor"]
        assert [row["gradient_norm"] is not None for row in table] == [True, False, False, False, True, True]

    def test_the_page_comes_from_the_saved_file_alone(self, small, tmp_path):
        out = small.out
        write_page(tmp_path / "report.html", from_netcdf(out / "forgetting.nc"))
        for name in ("report.html", "report.json"):
            assert (tmp_path / name).read_text() == (out / name).read_text()

    def test_nothing_global_is_left_changed(self, small):
        assert not small.changed

    def test_bars_go_to_standard_error(self, capsys):
        Digits(num_erased=3, num_steps=2, polish_pairs=2, polish_gradient=1e9, finetune_steps=1, num_draws=5).run(
            0, "cpu"
        )
        out, err = capsys.readouterr()
        assert out == ""
        assert "digits: another refit" in err and "100%" in err


class TestData:
    def test_digits(self):
        fit, test = demo_digits.load("cpu")
        assert (len(fit), len(test)) == (1500, 297)
        images, digits = next(fit.batches()).args
        assert images.shape == (1500, 65) and images.dtype == torch.float64
        assert images.min() == 0 and images.max() == 1 and bool((images[:, -1] == 1).all())
        assert len(digits.unique()) == 10 and not torch.equal(digits.sort().values, digits)

    def test_breast_cancer(self):
        fit, test = demo_breast_cancer.load("cpu")
        assert (len(fit), len(test)) == (455, 114)
        x, y = next(fit.batches()).args
        torch.testing.assert_close(x[:, :8].mean(0), torch.zeros(8))
        torch.testing.assert_close(x[:, :8].std(0), torch.ones(8))
        assert x.shape == (455, 9) and bool((x[:, 8] == 1).all())
        assert y.unique().tolist() == [0, 1]


def test_score_is_of_the_mean_prediction():
    """Three of four named rightly, with the probabilities of the right class known."""
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    found = score(None, Data(probabilities.log(), torch.tensor([0, 0, 1, 0])), lambda _, x: x)  # type: ignore[arg-type]
    assert found.error == 0.25
    assert found.log_likelihood == pytest.approx(float(torch.tensor([0.9, 0.6, 0.8, 0.3]).log().mean()))


def test_of_several_settings_the_closest_is_shown_and_said_to_be_chosen(small):
    row = json.loads(from_netcdf(small.out / "forgetting.nc")["breast_cancer"].attrs["table"])[2]
    assert row["method"].endswith(", best of 3")


def test_the_text_has_a_line_for_each_method_and_says_how_to_read_it(small):
    text = small.demo.text
    assert text.count("\nanother refit") == 2
    assert "Remaining fraction:" in text and "report.html" in text
    assert max(map(len, text.splitlines()[:10])) <= 120


@pytest.mark.slow
def test_the_seed_says_it_all(small, tmp_path):
    """The same figures for the same seed, under another default type; others for another."""
    again = run_demo(tmp_path, settings=SMALL).figures
    other = Digits(**asdict(SMALL.digits)).run(1, "cpu").figures()
    for part, figures in again.items():
        assert without_seconds(figures) == without_seconds(small.demo.figures[part])
    assert without_seconds(other) != without_seconds(again["digits"])


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """As the command runs it."""
    return run_demo(tmp_path_factory.mktemp("full"))


@pytest.mark.slow
class TestFull:
    def test_the_floor_of_the_digits_is_low(self, full):
        assert full.figures["digits"]["refit"]["floor"] <= 0.1

    @pytest.mark.parametrize("part", ["digits", "breast_cancer"])
    def test_the_default_comes_close_to_the_refit(self, full, part):
        row = full.figures[part]["default"]
        assert row["remaining_fraction"] <= max(0.10, row["floor"] + 0.06)

    @pytest.mark.parametrize("part", ["digits", "breast_cancer"])
    def test_the_default_is_closer_than_the_published_recursion_and_faster_than_a_refit(self, full, part):
        rows = full.figures[part]
        assert rows["default"]["remaining_fraction"] < rows["published"]["remaining_fraction"] < 1
        assert rows["default"]["seconds"] < 0.5 * rows["refit"]["seconds"]

    def test_the_weights_are_good(self, full):
        row = full.figures["breast_cancer"]["default"]
        assert row["khat"] < 0.7 and row["ess"] > 1000
