"""The demonstration: two posteriors, a request to each, and what every method makes of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pyro_forget.cli.demo_breast_cancer import BreastCancer
from pyro_forget.cli.demo_digits import Digits
from pyro_forget.cli.study import HOW_TO_READ
from pyro_forget.export import join, to_netcdf
from pyro_forget.page import write_page

_TITLE = "pyro-forget: two posteriors made to forget"


@dataclass(frozen=True)
class Settings:
    """Sizes of both parts."""

    digits: Digits = field(default_factory=Digits)
    breast_cancer: BreastCancer = field(default_factory=BreastCancer)


@dataclass(frozen=True)
class Demo:
    """What the demonstration found.

    Attributes:
        figures: by part and method, JSON types only.
        text: the same for a terminal.
        files: those written, the page first.
    """

    figures: dict[str, Any]
    text: str
    files: list[Path]


def run_demo(out: Path, *, seed: int = 0, device: str = "cpu", settings: Settings | None = None) -> Demo:
    """Run both parts; write report.html, report.json, forgetting.nc and the figures.

    Progress goes to standard error. Random state, default type and parameter store are left as they were.

    Args:
        out: an existing folder.
        seed: of initial values, noise and draws.
        device: of all tensors.
        settings: sizes; by default those of the published figures.
    """
    settings = settings or Settings()
    where = torch.device(device)
    with _one_thread(), torch.random.fork_rng([where.index or 0] if where.type == "cuda" else []):
        studies = [settings.digits.run(seed, device), settings.breast_cancer.run(seed, device)]
    tree = join({study.key: study.branch() for study in studies}, _TITLE)
    files = [*write_page(out / "report.html", tree), to_netcdf(tree, out / "forgetting.nc")]
    last = f"Wrote {files[0]}, to be opened in a browser, and {len(files) - 1} files beside it."
    text = "\n\n".join([*(study.text() for study in studies), "\n".join(HOW_TO_READ), last])
    return Demo({study.key: study.figures() for study in studies}, text, files)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are taken in one order, so that the seed gives the same chains on any number of cores.

    Matrices this small gain little from more threads, and on a busy machine threads wait for each other.
    """
    outside = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(outside)
