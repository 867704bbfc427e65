"""The command line. Each module here holds one command; a part of the project is imported when its command runs."""

from __future__ import annotations

import signal
import sys

import typer

from slimserve.cli.compare import compare
from slimserve.cli.compress import check, compress, inspect
from slimserve.cli.distill import app as distill_app
from slimserve.cli.loadtest import loadtest
from slimserve.cli.pipeline import pipeline
from slimserve.cli.serve import WithVllmArguments, serve
from slimserve.core.errors import UserError

app = typer.Typer(
    help="Make a small language model smaller, serve it on vLLM, load it with real traffic, and compare the variants.",
    epilog="MODEL is a Hugging Face directory or id, a .gguf file, or the built-in smollm2-135m-instruct.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(distill_app, name="distill")
app.command()(compress)
app.command()(inspect)
app.command()(check)
app.command(cls=WithVllmArguments)(serve)
app.command()(loadtest)
app.command()(compare)
app.command()(pipeline)


def main() -> None:
    """Run the command line; a user's mistake is one line and exit status 2, Ctrl-C 130, SIGTERM 143."""
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)
    try:
        app()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def _leave(number: int, _frame: object) -> None:
    """End through SystemExit, so that every context manager on the way out cleans up."""
    sys.stderr.write(f"\nending on {signal.Signals(number).name} …\n")
    sys.exit(128 + number)
