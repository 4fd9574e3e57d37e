"""Results as files: values in JSON, tables in Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_forget.store import save_json


@dataclass(frozen=True)
class Table:
    """A Markdown table.

    Attributes:
        head: names of the columns.
        rows: cells in words; the first column is the row's name.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [self.head, ["---"] + ["---:"] * (len(self.head) - 1), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value: float | None, digits: int = 2) -> str:
    """A number in so many significant digits; a dash where there is none."""
    if value is None:
        return "–"
    shown = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in shown and abs(value) < 1e6 else shown


def write(out: Path, name: str, values: Any, text: str) -> None:
    """OUT/NAME.json and OUT/NAME.md; the text is printed too."""
    out.mkdir(parents=True, exist_ok=True)
    save_json(out / f"{name}.json", values)
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
