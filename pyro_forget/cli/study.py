"""What a part of the demonstration finds, and how it is shown: as JSON, as a table in the page, as text."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xarray import DataTree

from pyro_forget.cli.comparison import Row, Score

METHODS = ("before", "default", "published", "finetune", "refit")

HOW_TO_READ = (
    "Remaining fraction: what is left of the distance to the refit; 0 is the refit, 1 is nothing done.",
    "Floor: what another refit scores. A method that is near it cannot be told from a refit.",
    "Errors and mean log likelihoods: on the erased / the retained / the test data.",
    "Seconds: of the method alone; one that takes less than a second is timed when it runs for the second time.",
    "The published recursion was run with three scalings, and the one that came closest to the refit is shown: a "
    "choice that nobody could make without the refit.",
)


@dataclass(frozen=True)
class Study:
    """One part of the demonstration.

    Attributes:
        key: its name in files.
        description: what was done, for a reader who knows nothing of it.
        rows: of the table.
        tree: what `to_datatree` gave.
        weighted: whether the methods leave importance weights, with k̂ and an effective sample size.
    """

    key: str
    title: str
    description: str
    rows: Sequence[Row]
    tree: DataTree
    weighted: bool = False

    def branch(self) -> DataTree:
        """The tree with title, description and table, as the page reads them."""
        tree = self.tree.copy()
        table = [{"method": row.label, **self._figures(row), **self._extras(row)} for row in self.rows]
        tree.attrs |= {
            "title": self.title,
            "description": " ".join([self.description, *HOW_TO_READ]),
            "table": json.dumps(table, ensure_ascii=False),
        }
        return tree

    def figures(self) -> dict[str, dict[str, float | None]]:
        """By method, what a program reads."""
        return {row.method: self._figures(row) for row in self.rows if row.method in METHODS}

    def text(self) -> str:
        """The table for a terminal."""
        lines = [self._headers(), *map(self._cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = ["  ".join(_padded(line, widths)).rstrip() for line in lines]
        return "\n".join([self.title, "=" * len(self.title), "", *shown])

    def _figures(self, row: Row) -> dict[str, float | None]:
        figures: dict[str, float | None] = {
            "remaining_fraction": row.distance.value,
            "floor": row.distance.floor,
            "seconds": row.seconds,
            "error_erased": row.erased.error,
            "error_retained": row.retained.error,
            "error_test": row.test.error,
        }
        evidence = row.report.evidence if row.report else None
        weights = {"khat": evidence.khat if evidence else None, "ess": evidence.ess if evidence else None}
        return figures | (weights if self.weighted else {})

    def _extras(self, row: Row) -> dict[str, float | None]:
        extras: dict[str, float | None] = {
            "log_lik_erased": row.erased.log_likelihood,
            "log_lik_retained": row.retained.log_likelihood,
            "log_lik_test": row.test.log_likelihood,
        }
        return extras | ({} if self.weighted else {"gradient_norm": row.gradient_norm})

    def _headers(self) -> list[str]:
        last = ["k-hat", "ESS"] if self.weighted else ["gradient"]
        return ["method", "remaining", "floor", "seconds", "errors, %", "log likelihoods", *last]

    def _cells(self, row: Row) -> list[str]:
        figures = self._figures(row) | self._extras(row)
        shown = [row.label, *(f"{figures[name]:.3f}" for name in ("remaining_fraction", "floor")), f"{row.seconds:.2f}"]
        shown += [_three(row, lambda score: f"{100 * score.error:.1f}")]
        shown += [_three(row, lambda score: f"{score.log_likelihood:.3f}")]
        last = [("khat", "{:.2f}"), ("ess", "{:.0f}")] if self.weighted else [("gradient_norm", "{:.0e}")]
        return shown + ["-" if figures[name] is None else form.format(figures[name]) for name, form in last]


def _three(row: Row, show: Callable[[Score], str]) -> str:
    return " / ".join(map(show, (row.erased, row.retained, row.test)))


def _padded(line: Sequence[Any], widths: Sequence[int]) -> list[str]:
    """The first column to the left, the others to the right."""
    return [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
