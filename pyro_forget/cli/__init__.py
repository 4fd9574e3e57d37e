"""The command `pyro-forget`."""

from pyro_forget.cli.app import app


def main() -> None:
    """Run the command with the arguments of the process."""
    app(prog_name="pyro-forget")
