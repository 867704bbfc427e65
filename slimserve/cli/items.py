"""`slimserve items add` and `slimserve items export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Add items to a variant that reads items as tokens, or write a workload's items to a file.")


@app.command()
def add(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Variant that was trained with --items.")],
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help='New items, one {"id": …, "text": …} per line.')],
    text_model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Language model that read the items' texts in training (default: where it was then)."
        ),
    ] = None,
) -> None:
    """Give new items tokens and rows in a variant, from their texts alone and without training.

    A running server reads the catalogue when it starts. Several calls at once wait for each other.
    """
    from slimserve.core.catalogue import read_catalogue
    from slimserve.distill.items import add_items

    num_added = add_items(directory, file, text_model)
    catalogue = read_catalogue(directory)
    assert catalogue is not None
    typer.echo(f"added {num_added} items; {len(catalogue.tokens)} of {catalogue.num_slots} slots are in use")


@app.command()
def export(
    workload: Annotated[str, typer.Argument(metavar="NAME|FILE", help="Workload whose items have ids.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.jsonl", help="File to write.")],
) -> None:
    """Write the id and the text of each item of a workload, as `distill --items` and `items add` read them."""
    from slimserve.core.errors import UserError
    from slimserve.core.storage import write_atomically
    from slimserve.workloads import load_workload

    texts = load_workload(workload).item_texts()
    if not texts:
        raise UserError("workload", workload, "has no ids of items", "write the file yourself")
    lines = [json.dumps({"id": item, "text": text}, ensure_ascii=False) for item, text in texts.items()]
    write_atomically(output, "".join(f"{line}\n" for line in lines))
    typer.echo(f"{len(lines)} items: {output}")
