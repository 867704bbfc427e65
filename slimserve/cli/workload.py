"""`slimserve workload`: tools for workload files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimserve.core.errors import UserError

if TYPE_CHECKING:
    from slimserve.workloads.check import WorkloadReport

app = typer.Typer(
    help="Check a workload file: a TOML file that describes your own data.",
    no_args_is_help=True,
    add_completion=False,
)
_NUM_SHOWN = 5


@app.callback()
def _group() -> None:
    """Typer needs a callback to keep the name of a single subcommand."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="Workload file; docs/workloads.md lists its keys.")],
    model: Annotated[
        str, typer.Option(help="Model whose tokenizer counts tokens and renders chats; empty counts none.")
    ] = "smollm2-135m-instruct",
) -> None:
    """Show rows, splits, lengths in tokens, three prompts, and baselines that use no language model.

    Exit code 1 means that prompts of the quality split also occur in another split.
    """
    from slimserve.core.model import resolve_model
    from slimserve.workloads.check import check_workload
    from slimserve.workloads.kinds import load_workload_file

    if not file.is_file():
        raise UserError("FILE", file, "does not exist", "give the path of a workload file")
    report = check_workload(load_workload_file(file), resolve_model(model) if model else None)
    for line in _lines(report):
        typer.echo(line)
    if report.leaks:
        raise typer.Exit(1)


def _lines(report: WorkloadReport) -> list[str]:
    lines = [
        f"{report.name}: kind {report.kind}, {report.num_rows:,} rows, {len(report.unusable):,} not usable, "
        f"{report.num_groups:,} groups",
        *(f"  {one.place} {one.reason}" for one in report.unusable[:_NUM_SHOWN]),
    ]
    if len(report.unusable) > _NUM_SHOWN:
        lines.append(f"  and {len(report.unusable) - _NUM_SHOWN:,} more")
    lines += ["", f"{'split':12} {'prompts':>8} {'tokens p50':>11} {'p90':>7} {'largest':>8}"]
    for split, count in report.num_prompts.items():
        lengths = report.lengths.get(split)
        tokens = f"{lengths.p50:>11,.0f} {lengths.p90:>7,.0f} {lengths.largest:>8,.0f}" if lengths else ""
        lines.append(f"{split:12} {count:>8,} {tokens}".rstrip())
    for number, text in enumerate(report.shown, start=1):
        lines += ["", f"--- prompt {number} ---", text]
    lines += ["", f"{report.metric} without a language model:"]
    if report.floor is not None:
        lines.append(f"  {'chance':24} {report.floor:.3f}")
    for name, value in report.baselines.items():
        lines.append(f"  {name.replace('_', ' '):24} {value.value:.3f} ({value.low:.3f} to {value.high:.3f})")
    if not report.baselines:
        lines.append("  none for this kind of prompts")
    lines.append("")
    if report.leaks:
        first, second = report.leaks[0]
        lines.append(
            f"LEAK: {len(report.leaks):,} prompts of the quality split also occur in another split, such as {first} "
            f"and {second}. Name the column that they share as `group`, or remove the copies."
        )
    else:
        lines.append("No prompt of the quality split occurs in another split.")
    return lines
