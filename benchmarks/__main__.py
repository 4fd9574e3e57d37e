"""Run benchmarks by name, or all of them: python -m benchmarks [NAME ...]."""

import importlib
import re
from pathlib import Path
from typing import Annotated

import typer

NAMES = (
    "overhead",
    "exactness",
    "closeness",
    "draws",
    "networks",
    "paired",
    "paired_lenet",
    "stochastic",
    "products",
    "memory",
    "chain_memory",
)


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Any of {', '.join(NAMES)}; all by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the values and the tables.")] = Path("runs/benchmarks"),
    page: Annotated[Path | None, typer.Option(help="Put the tables into this page, between their marks.")] = None,
) -> None:
    """Speed, memory and closeness, always beside a rival in the same run."""
    unknown = sorted(set(names or ()) - set(NAMES))
    if unknown:
        raise typer.BadParameter(f"There is no benchmark {', '.join(unknown)}: choose from {', '.join(NAMES)}.")
    for name in names or NAMES:
        print(f"{name} ...", flush=True)
        importlib.import_module(f"benchmarks.{name}").run(out)
        if page is not None:
            text = inserted(page.read_text(encoding="utf-8"), name, (out / f"{name}.md").read_text(encoding="utf-8"))
            page.write_text(text, encoding="utf-8")


def inserted(page: str, name: str, table: str) -> str:
    """The page with `table` between <!-- begin NAME --> and <!-- end NAME -->."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    marked = re.compile(f"({re.escape(begin)}\n).*?({re.escape(end)})", re.DOTALL)
    if not marked.search(page):
        raise ValueError(f"The page has no place for {name}: write {begin} and {end} on lines of their own.")
    return marked.sub(lambda found: found[1] + table.rstrip("\n") + "\n" + found[2], page)


if __name__ == "__main__":
    typer.run(main)
