import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure

from pyro_forget.export import from_netcdf, join, to_datatree, to_netcdf
from pyro_forget.page import figures, summary, words, write_page
from pyro_forget.page.section import Section, pictures, read_sections
from pyro_forget.page.write import render
from tests import requests
from tests.requests import POOR, REFUSED, STEPS, WEIGHTS, at, exact, report, request, values

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Reader(HTMLParser):
    """Checks that tags are balanced, and keeps what the tests ask about."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(" ".join(data.split()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert not reader.open
    return reader


def written(tree: xr.DataTree) -> str:
    """The words of the page; its figures are left out, for drawing takes time."""
    reader, sections = Reader(), read_sections(tree)
    reader.feed(render("Report", sections, {section.key: [] for section in sections}))
    return " ".join(filter(None, reader.text))


def exported(evidence, *, warnings=(), **attrs) -> xr.DataTree:
    tree = to_datatree(requests.weighted_cloud(), request().retained, report=report(evidence, warnings))
    tree.attrs |= attrs
    return tree


TABLE = [
    {"method": "before", "error_erased": 0.1, "error_test": 0.123},
    {"method": "default", "error_erased": 0.5, "error_test": 0.1222, "seconds": 0.31},
    {"method": "refit", "error_erased": 0.52, "error_test": 0.1219, "seconds": 12.0},
]


@pytest.fixture
def both() -> xr.DataTree:
    normal = requests.tree().copy()
    normal.attrs |= {"title": "Normal <mean>", "table": json.dumps(TABLE), "description": "Eight sensors were broken."}
    return join({"normal": normal, "breast_cancer": requests.weighted_tree()}, "Two requests")


def test_one_file_says_it_all(both, tmp_path):
    path, twin, *drawn = write_page(tmp_path / "report.html", both)
    page = read(path)
    assert page.all("title") and page.all("html") == [{"lang": "en"}]
    assert not page.all("script") and not page.all("link")
    images = page.all("img")
    assert len(images) == 5 and len(drawn) == 10
    assert all(image["src"].startswith("data:image/png;base64,") and len(image["alt"]) > 40 for image in images)
    assert "http" not in re.sub(r"http-equiv", "", path.read_text(encoding="utf-8"))
    anchors = [a["href"].removeprefix("#") for a in page.all("a")]
    assert set(anchors) <= {attrs.get("id") for _, attrs in page.tags}
    assert twin == tmp_path / "report.json"


def test_figures_beside_are_those_inside(both, tmp_path):
    path, _, *drawn = write_page(tmp_path / "report.html", both)
    inside = [base64.b64decode(image["src"].split(",")[1]) for image in read(path).all("img")]
    beside = [file.read_bytes() for file in drawn if file.suffix == ".png"]
    assert sorted(inside) == sorted(beside)
    assert {file.name for file in drawn} >= {"report-normal-forest.png", "report-breast_cancer-weights.svg"}
    assert all(b"<svg" in file.read_bytes() for file in drawn if file.suffix == ".svg")


def test_the_page_can_be_written_again_from_the_file_alone(both, tmp_path):
    first = write_page(tmp_path / "report.html", both)
    before = {file: file.read_bytes() for file in first if file.suffix != ".svg"}
    saved = to_netcdf(both, tmp_path / "forgetting.nc")
    for file in first:
        file.unlink()
    write_page(tmp_path / "report.html", from_netcdf(saved))
    assert {file: file.read_bytes() for file in before} == before


def test_a_mapping_of_trees_is_a_page_too(tmp_path):
    files = write_page(
        tmp_path / "a.html", {"normal": requests.tree(), "draws": requests.weighted_tree()}, title="Both"
    )
    assert json.loads(files[1].read_text())["title"] == "Both"
    assert [section["key"] for section in json.loads(files[1].read_text())["sections"]] == ["normal", "draws"]


def test_what_the_page_says(both):
    text = written(both)
    assert "Normal <mean>" in text and "Eight sensors were broken." in text
    assert "Erased 8 of 40 data (20.0 %)" in text
    for heading in ("What was erased", "What was done", "What the evidence is", "What this does not show"):
        assert text.count(heading) >= 2
    assert "Influence(solver=Lanczos, max_sweeps=6)" in text
    assert "5.54, 5.35, 5.24" in text
    assert "Below 0.67, the threshold for 1,000 draws: the weights are usable." in text
    assert "1.002" in text and "level trusted" in text
    assert "default 0.500 0.122 0.310" in text
    assert "method error erased error test seconds" in text


def test_the_twin_is_strict_json_with_the_same_numbers(both, tmp_path):
    twin = json.loads((write_page(tmp_path / "report.html", both)[1]).read_text(), parse_constant=pytest.fail)
    normal, draws = twin["sections"]
    assert normal["status"]["level"] == "done"
    assert normal["report"]["evidence"]["sweeps"][1]["held_out"] == 0.035
    assert normal["table"] == TABLE
    assert draws["report"]["evidence"]["khat"] == 0.32
    moved = normal["parameters"][0]
    assert moved["name"] == "mean"
    assert moved["marginals"]["after"]["mean"] == pytest.approx(float(requests.tree()["posterior/mean"].mean()))
    assert "by_datum" not in normal["likelihoods"]["after"]


def test_markup_in_names_stays_text(tmp_path):
    tree = exported(replace(WEIGHTS, method="<script>alert(1)</script>"), warnings=("<b>bold</b>",), title="<i>x</i>")
    page = read(write_page(tmp_path / "report.html", tree)[0])
    assert not page.all("script") and not page.all("b") and not page.all("i")
    assert "<b>bold</b>" in page.text and "<script>alert(1)</script>" in page.text


def test_a_refusal_is_said_first():
    text = written(exported(REFUSED))
    assert "Refused: nothing was changed" in text
    assert "no step lowered the energy under held-out noise." in text
    assert "8 of 40 data were to be erased; all remain" in text


def test_warnings_are_prominent_and_said_once():
    evidence = replace(POOR, warnings=("Few draws.", "The weights are poor."))
    text = written(exported(evidence, warnings=("Few draws.",)))
    assert "Erased 8 of 40 data (20.0 %), with 2 warnings" in text
    assert text.count("Few draws.") == 1
    assert text.index("The weights are poor.") < text.rindex("What was erased")
    assert "∞" in text and "do not rely on the weights" in text


def test_without_a_report():
    case = request()
    tree = to_datatree(case.after, case.retained, num_draws=20)
    assert "This tree was exported without the report of a request." in written(tree)


def test_what_is_not_shown_depends_on_what_was_done():
    def said(tree):
        return " ".join(only(tree).not_shown)

    assert "nobody refitted" in said(requests.weighted_tree()) and "nobody refitted" not in said(requests.tree())
    assert "mode that the draws never visited" in said(requests.weighted_tree())
    assert "mode that the draws never visited" not in said(requests.tree())
    assert "posterior_before" in said(requests.tree()) and "posterior_before" not in said(requests.weighted_tree())
    assert "small residual" in said(requests.tree())


def test_a_tree_without_posterior_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has the groups \['a'\] and no `posterior` in any"):
        write_page(tmp_path / "report.html", xr.DataTree.from_dict({"a": xr.Dataset()}))
    with pytest.raises(ValueError, match=r"got 'report.pdf': give it the ending .html"):
        write_page(tmp_path / "report.pdf", requests.tree())
    assert not list(tmp_path.iterdir())


def test_the_parameter_that_moved_most_comes_first():
    found = summary.parameters(requests.tree())
    assert [parameter.name for parameter in found][:2] == ["mean", "weight[0, 0]"]
    draws = {role: getattr(request(), role).draws(200)["mean"] for role in found[0].marginals}
    for role, marginal in found[0].marginals.items():
        assert marginal.mean == pytest.approx(float(draws[role].mean()))
        assert marginal.sd == pytest.approx(float(draws[role].std()))
        assert marginal.outer == pytest.approx(tuple(np.quantile(draws[role], (0.03, 0.97))))
    ratio = draws["after"].std() / draws["before"].std()
    shift = (draws["after"].mean() - draws["before"].mean()) / draws["before"].std()
    assert found[0].divergence == pytest.approx(float(0.5 * (ratio**2 + shift**2 - 1) - ratio.log()))
    assert found[1].divergence == 0
    assert [parameter.name for parameter in summary.parameters(requests.tree(), most=1)] == ["mean"]
    assert summary.num_parameters(requests.tree()) == 7


def test_log_predictive_density_is_the_exact_one():
    """Of a normal mean it is normal, with the variances added."""
    loc, sd = exact(values(request().retained))
    tree = to_datatree(request().refit, request().retained, num_draws=20_000)
    density = torch.distributions.Normal(loc, (1 + sd**2) ** 0.5).log_prob(values(request().retained))
    found = summary.likelihoods(tree)["after"]
    np.testing.assert_allclose(found.by_datum, density, atol=0.03)
    assert found.mean == pytest.approx(found.by_datum.mean())
    assert found.se == pytest.approx(found.by_datum.std(ddof=1) / 32**0.5)


def test_the_gap_to_the_refit_is_in_its_standard_deviations():
    found = summary.gap(requests.tree())
    _, sd = exact(values(request().retained))
    assert found.largest["after"] == pytest.approx(0.01 / sd, rel=0.1)
    before = exact(values(request().data))[0] - exact(values(request().retained))[0]
    assert found.largest["before"] == pytest.approx(before / sd, rel=0.1)
    assert found.typical["after"] == 0 and found.noise == pytest.approx(0.1)
    assert summary.gap(requests.weighted_tree()) is None


def test_worse_than_doing_nothing_is_said():
    case = request()
    loc, sd = exact(values(case.retained))
    away = at(case.refit, loc - 9 * sd, sd, case.retained.ids)
    tree = to_datatree(away, case.retained, before=case.before, refit=case.refit, num_draws=50)
    assert any("Farther from the refit than before" in finding.reading for finding in only(tree).findings)
    assert not any("Farther" in finding.reading for finding in only(requests.tree()).findings)


def test_a_point_mass_can_be_shown():
    """MAP by AutoDelta has no spread: nothing to divide by."""
    case = request()
    point = at(case.refit, 0.3, 1e-300, case.retained.ids)
    tree = to_datatree(point, case.retained, before=point, refit=point, num_draws=5)
    for role in ("posterior", "posterior_before", "posterior_refit"):
        tree[role]["weight"] = tree[role]["weight"] * 0 + 1
    assert "What the evidence is" in written(tree)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (0.0, "0"),
        (12345, "12,345"),
        (-0.5, "−0.500"),
        (1234.5, "1,234"),
        (0.00012, "1.20e−04"),
        (2.5e6, "2.50e+06"),
        (float("inf"), "∞"),
        (float("-inf"), "−∞"),
        (float("nan"), "nan"),
        (True, "yes"),
        (False, "no"),
        ("a-b", "a-b"),
    ],
)
def test_numbers(value, text):
    assert words.number(value) == text


def only(tree: xr.DataTree) -> Section:
    (section,) = read_sections(tree)
    return section


def test_figures_touch_no_global_state():
    before = dict(matplotlib.rcParams)
    drawn = [*pictures(only(requests.tree())), *pictures(only(requests.weighted_tree()))]
    assert len(drawn) == 5 and all(isinstance(picture.figure, Figure) for picture in drawn)
    assert dict(matplotlib.rcParams) == before


def test_parameters_of_unlike_scale_share_an_axis_in_standard_deviations():
    first, *others = summary.parameters(requests.tree())
    assert figures.forest([first, *others], 7).axes[0].get_xlabel() == "value"
    scaled = replace(first, marginals={role: _times(marginal, 1000.0) for role, marginal in first.marginals.items()})
    assert "standard deviations" in figures.forest([scaled, *others], 7).axes[0].get_xlabel()


def _times(marginal: summary.Marginal, factor: float) -> summary.Marginal:
    inner, outer = (tuple(end * factor for end in ends) for ends in (marginal.inner, marginal.outer))
    return summary.Marginal(marginal.mean * factor, marginal.sd * factor, inner, outer)


def test_labels_lie_on_the_figure():
    """Long names shrink the axes, they do not leave the paper."""
    first, *_ = summary.parameters(requests.tree())
    figure = figures.forest([replace(first, name="a_rather_long_site_name_in_a_network[12, 13]")], 7)
    renderer = figure.canvas.get_renderer()
    assert all(label.get_window_extent(renderer).x0 >= 0 for label in figure.axes[0].get_yticklabels())


def test_a_sweep_that_promised_nothing_can_be_drawn():
    figure = figures.sweeps([0.0, 1.0], [0.0, 50.0], [0.1, -50.0])
    low, high = figure.axes[0].get_xlim()
    assert low < -3 and high > 3


def test_evidence_of_every_kind_is_read():
    found = {finding.name for tree in (requests.tree(), requests.weighted_tree()) for finding in only(tree).findings}
    assert found >= {"Pareto k̂", "Relative residual", "Stationarity ν of the first fit", "KL(after ‖ before)"}
    poor = only(exported(replace(STEPS, stationarity=2.0, untilted_fall=-1.0))).findings
    read = {finding.name: finding.reading for finding in poor}
    assert "was not at its optimum" in read["Stationarity ν of the first fit"]
    assert "worse than before" in read["Fall of the plain retained energy"]
