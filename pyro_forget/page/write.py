"""Writing the page: an HTML file that needs nothing beside it, its JSON twin, and the figures as PNG and SVG."""

import base64
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from xarray import DataTree

from pyro_forget.export import join, plain
from pyro_forget.page.figures import STYLES
from pyro_forget.page.section import Picture, Section, pictures, read_sections
from pyro_forget.page.words import number
from pyro_forget.store import atomic_write, save_json

_TITLE = "Forgetting report"


@dataclass(frozen=True)
class _Inlined:
    """A figure as the page embeds it."""

    name: str
    alt: str
    png: bytes
    svg: bytes
    width: int
    height: int

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def write_page(path: str | Path, tree: DataTree | Mapping[str, DataTree], *, title: str | None = None) -> list[Path]:
    """Write the report of an exported tree, from nothing but the tree.

    A tree may hold one request, as `to_datatree` gives it, or several as branches. Each may carry the attributes
    `title`, `description` (plain text) and `table` (JSON: a list of rows, each a dict whose first entry names it).

    Args:
        path: of the HTML file; the JSON twin and the figures stand beside it under the same stem.
        tree: a tree, or several by name.
        title: of the page; by default what the tree says.

    Returns:
        The files written, the HTML first.

    Raises:
        ValueError: `path` does not end in .html, or the tree has no group `posterior`.
    """
    path = Path(path)
    if path.suffix != ".html":
        raise ValueError(f"The page is an HTML file, got '{path.name}': give it the ending .html.")
    tree = tree if isinstance(tree, DataTree) else join(tree, title or _TITLE)
    sections = read_sections(tree)
    heading = title or tree.attrs.get("title", _TITLE)
    drawn = {section.key: [_inline(picture) for picture in pictures(section)] for section in sections}
    html = render(heading, sections, drawn)
    return [
        atomic_write(path, lambda beside: beside.write_text(html, encoding="utf-8")),
        save_json(path.with_suffix(".json"), plain({"title": heading, "sections": list(map(_twin, sections))})),
        *(file for key, figures in drawn.items() for figure in figures for file in _save(path, key, figure)),
    ]


def render(title: str, sections: list[Section], drawn: Mapping[str, list[_Inlined]]) -> str:
    """The page as HTML text."""
    environment = Environment(
        loader=PackageLoader("pyro_forget.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "label": lambda role: STYLES[role].label}
    return environment.get_template("page.html.j2").render(title=title, sections=sections, drawn=drawn)


def _twin(section: Section) -> dict[str, Any]:
    """What the section says, without the density of every single datum."""
    twin = asdict(section)
    del twin["evidence"]  # stands in the report
    for likelihood in twin["likelihoods"].values():
        del likelihood["by_datum"]
    return twin


def _inline(picture: Picture) -> _Inlined:
    png, svg = io.BytesIO(), io.BytesIO()
    picture.figure.savefig(png, format="png", metadata={"Software": None})
    picture.figure.savefig(svg, format="svg", metadata={"Date": None})
    width, height = picture.figure.get_size_inches() * 100
    return _Inlined(picture.name, picture.alt, png.getvalue(), svg.getvalue(), round(width), round(height))


def _save(path: Path, key: str, figure: _Inlined) -> list[Path]:
    stem = "-".join(filter(None, (path.stem, key, figure.name)))
    return [
        atomic_write(path.with_name(f"{stem}.png"), lambda beside: beside.write_bytes(figure.png)),
        atomic_write(path.with_name(f"{stem}.svg"), lambda beside: beside.write_bytes(figure.svg)),
    ]
