"""What can be asked of the command: a demonstration, and the report of a saved tree."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from pyro_forget import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes break words of an error in two
    help="Make a fitted Bayesian model in Pyro forget data, with evidence of how close the result is to a refit.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"pyro-forget {__version__}")
        raise typer.Exit


def _device(name: str) -> str:
    try:
        torch.zeros((), device=name).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"device {name!r} is not there: {reason} Use cpu, cuda or cuda:N.") from error
    return name


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the report; made if it is not there.", file_okay=False)] = Path(
        "demo-report"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of initial values, noise and draws.")] = 0,
    device: Annotated[str, typer.Option(callback=_device, help="A torch device, such as cpu or cuda:0.")] = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as one JSON object and nothing else.")
    ] = False,
) -> None:
    """Make two posteriors forget, beside refits.

    Fits two Bayesian models, forgets some of their data, refits both without them, and reports how close forgetting
    came. Takes one to two minutes.
    """
    from pyro_forget.cli.demo import run_demo  # the report's libraries take a while to load

    out.mkdir(parents=True, exist_ok=True)
    shown = run_demo(out, seed=seed, device=device)
    if as_json:
        typer.echo(json.dumps(shown.figures, indent=2))
    else:
        typer.echo(shown.text)


@app.command()
def report(
    file: Annotated[
        Path, typer.Argument(help="A forgetting.nc of the demo, or any tree saved by `to_netcdf`.", exists=True)
    ],
    out: Annotated[Path | None, typer.Option(help="The page to write.", show_default="report.html beside FILE")] = None,
) -> None:
    """Write the report of a saved file again.

    The page, its JSON twin and its figures, from the file alone.
    """
    from pyro_forget.export import from_netcdf
    from pyro_forget.page import write_page

    try:
        tree = from_netcdf(file)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{file} is not a netCDF file that can be read: {error}") from error
    try:
        written = write_page(out or file.with_name("report.html"), tree)
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"Wrote {written[0]} and {len(written) - 1} files beside it.")
