"""One request as the page shows it: everything is read from the exported tree, nothing from memory."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from xarray import DataTree

from pyro_forget.importance import khat_threshold
from pyro_forget.outcome import Evidence
from pyro_forget.page import figures, summary, words
from pyro_forget.page.summary import Gap, Likelihood, Parameter
from pyro_forget.page.words import Finding, Status

_PROVENANCE = {
    "method": "Method",
    "digest": "Digest of the posterior",
    "parent": "Digest of its parent",
    "created_at": "Exported",
    "creation_library": "By",
    "creation_library_version": "Version",
}


@dataclass(frozen=True)
class Picture:
    """A figure with its text for those who do not see it."""

    name: str
    figure: Figure
    alt: str


@dataclass(frozen=True)
class Section:
    """A request.

    Attributes:
        key: of the branch in the tree, "" for a tree with one request.
        report: as `Report.to_dict` gave it, {} without one.
        evidence: the report's, with None for every field that is missing.
        table: rows of a comparison that the author of the tree put there; the first column names the row.
    """

    key: str
    title: str
    description: str
    report: dict[str, Any]
    evidence: dict[str, Any]
    warnings: list[str]
    status: Status
    findings: list[Finding]
    not_shown: list[str]
    parameters: list[Parameter]
    num_parameters: int
    likelihoods: dict[str, Likelihood]
    num_evaluated: int
    gap: Gap | None
    table: list[dict[str, Any]]
    provenance: dict[str, str]

    @property
    def columns(self) -> list[str]:
        """Of the table: all that occur, in the order of their first row."""
        return list(dict.fromkeys(name for row in self.table for name in row))


def read_sections(tree: DataTree) -> list[Section]:
    """The requests in a tree: its branches, or the tree itself.

    Raises:
        ValueError: there is no group `posterior`.
    """
    if "posterior" in tree.children:
        return [_read("", tree)]
    sections = [_read(name, branch) for name, branch in tree.children.items() if "posterior" in branch.children]
    if not sections:
        raise ValueError(
            f"The tree has the groups {sorted(tree.children)} and no `posterior` in any: export it by `to_datatree`."
        )
    return sections


def pictures(section: Section) -> list[Picture]:
    """The figures of a section, as far as it has what they show."""
    shown = [_forest(section)]
    if "refit" in section.likelihoods:
        shown.append(_agreement(section))
    if section.evidence["sweeps"]:
        shown.append(_sweeps(section.evidence["sweeps"]))
    if section.evidence["ess"] is not None and (section.evidence["num_draws"] or 0) >= 2:
        shown.append(_weights(section.evidence))
    return shown


def _read(key: str, tree: DataTree) -> Section:
    report = _revived(json.loads(tree.attrs.get("report", "{}")))
    evidence = asdict(Evidence(method="")) | report.get("evidence", {})
    warnings = list(dict.fromkeys([*report.get("warnings", ()), *evidence["warnings"]]))
    likelihoods, gap, roles = summary.likelihoods(tree), summary.gap(tree), summary.roles(tree)
    return Section(
        key=key,
        title=tree.attrs.get("title", key.replace("_", " ") or "Forgetting report"),
        description=tree.attrs.get("description", ""),
        report=report,
        evidence=evidence,
        warnings=warnings,
        status=words.status(report, warnings),
        findings=words.findings(report, evidence, likelihoods, gap),
        not_shown=words.not_shown(evidence, "before" in roles, "refit" in roles),
        parameters=summary.parameters(tree),
        num_parameters=summary.num_parameters(tree),
        likelihoods=likelihoods,
        num_evaluated=len(likelihoods["after"].by_datum),
        gap=gap,
        table=_revived(json.loads(tree.attrs.get("table", "[]"))),
        provenance={label: str(tree.attrs[name]) for name, label in _PROVENANCE.items() if name in tree.attrs},
    )


def _forest(section: Section) -> Picture:
    top = section.parameters[0]
    means = ", ".join(f"{figures.STYLES[role].label} {words.number(m.mean)}" for role, m in top.marginals.items())
    alt = f"Forest plot of {len(section.parameters)} of {section.num_parameters} parameters. {top.name}, mean: {means}."
    return Picture("forest", figures.forest(section.parameters, section.num_parameters), alt)


def _agreement(section: Section) -> Picture:
    found = section.likelihoods
    refit = found["refit"].by_datum
    away = {role: float(np.median(abs(found[role].by_datum - refit))) for role in found if role != "refit"}
    medians = ", ".join(f"{figures.STYLES[role].label} {words.number(value)}" for role, value in away.items())
    alt = f"Difference of each datum's log predictive density from the refit's; medians in nats: {medians}."
    return Picture("agreement", figures.agreement(found), alt)


def _sweeps(sweeps: list[dict[str, Any]]) -> Picture:
    promised, realised, held_out = (
        [float(sweep[kind]) + float(sweep[f"scale_{kind}"]) for sweep in sweeps]
        for kind in ("predicted", "realised", "held_out")
    )
    total = ", ".join(words.number(sum(falls)) for falls in (promised, realised, held_out))
    alt = f"Fall of the energy over {len(sweeps)} sweeps; promised, realised and held out in all: {total} nats."
    return Picture("sweeps", figures.sweeps(promised, realised, held_out), alt)


def _weights(evidence: Mapping[str, Any]) -> Picture:
    khat, ess, num_draws = evidence["khat"], evidence["ess"], evidence["num_draws"]
    alt = f"Pareto k-hat {words.number(khat)}, effective sample size {words.number(ess)} of {words.number(num_draws)}."
    return Picture("weights", figures.weights(khat, khat_threshold(num_draws), ess, num_draws), alt)


def _revived(value: Any) -> Any:
    """JSON values with the numbers that `to_json` had to write as strings."""
    if isinstance(value, dict):
        return {name: _revived(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_revived(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
