"""The command line. Each module here holds one command, which is imported only when it is called or asked for help."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from slimserve.core.allocator import restart_with_fast_allocator
from slimserve.core.errors import UserError


class _Entry(NamedTuple):
    """A command: its module in this package, the line that the list of commands shows, and whether it trains."""

    module: str
    summary: str
    trains: bool = False


_COMMANDS = {
    "distill": _Entry("distill", "Train a small model to imitate a teacher, or fine-tune it.", trains=True),
    "items": _Entry("items", "Add items to a variant that reads items as tokens."),
    "compress": _Entry("compress", "Prune and quantize a model by a recipe."),
    "inspect": _Entry("compress", "Show the steps, sizes, errors and kernels of a variant."),
    "check": _Entry("compress", "Check that transformers and vLLM load a variant and compute the same logits."),
    "calibrate": _Entry("calibrate", "Fit the map from a variant's label scores to probabilities."),
    "serve": _Entry("serve", "Serve one model, or several variants behind one address, on vLLM."),
    "workload": _Entry("workload", "Check a file that describes your own data as a workload."),
    "loadtest": _Entry("loadtest", "Load a running server through Locust and report latency and throughput."),
    "compare": _Entry("compare", "Build, serve, evaluate and load variants, and report which one to ship."),
    "pipeline": _Entry("pipeline", "Distill and compress a model in steps, then compare the results.", trains=True),
}


class _LazyCommands(TyperGroup):
    """A group that imports a command when it is used; listing all of them imports none."""

    is_listing = False

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        entry = _COMMANDS[cmd_name]
        return TyperCommand(cmd_name, help=entry.summary) if self.is_listing else _load(entry.module, cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.is_listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self.is_listing = False


def _load(module: str, name: str) -> Any:
    """Import a command: a group from a module's `app`, or a function of the command's name."""
    namespace = vars(importlib.import_module(f"slimserve.cli.{module}"))
    group = namespace.get("app")
    if group is None:
        group = typer.Typer(add_completion=False)
        group.command(cls=namespace.get("COMMAND_CLASS", TyperCommand))(namespace[name])
    command = typer.main.get_command(group)
    command.name = name
    return command


app = typer.Typer(
    cls=_LazyCommands,
    help="Make a small language model smaller, serve it on vLLM, load it with real traffic, and compare the variants.",
    epilog="MODEL is a Hugging Face directory or id, a .gguf file, or a built-in model: smollm2-135m-instruct, or "
    "smollm2-135m-tuned, which was trained on the built-in workloads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _group() -> None:
    """Typer needs a callback where no command is registered."""


def main() -> None:
    """Run the command line; a user error is one line and exit code 2, Ctrl-C exits with 130 and SIGTERM with 143."""
    command = _COMMANDS.get(next(iter(sys.argv[1:]), ""))
    if command and command.trains:
        restart_with_fast_allocator()
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)
    try:
        app()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def _leave(number: int, _frame: object) -> None:
    """Exit through SystemExit, so that every context manager cleans up."""
    sys.stderr.write(f"\nending on {signal.Signals(number).name} …\n")
    sys.exit(128 + number)
