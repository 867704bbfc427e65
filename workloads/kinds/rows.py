"""Reads the rows of a user's data: JSONL, CSV, TSV, Parquet or a Hugging Face dataset.

A row that cannot be read is kept with its place and the reason, so that one bad line does not end the work and is not
silently lost either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimserve.core.errors import UserError
from slimserve.core.text import BadLine, scan_jsonl, scan_table

_FORMATS = "write .jsonl, .csv, .tsv or .parquet"
_EVAL = 'run: pip install "slimserve[eval]"'


@dataclass(frozen=True)
class Row:
    """One row of data."""

    place: str
    """File and line number, or dataset and row number."""
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Unusable:
    """A row that cannot be used."""

    place: str
    reason: str


@dataclass
class Table:
    """The rows of all data files, and those that cannot be used."""

    rows: list[Row] = field(default_factory=list)
    unusable: list[Unusable] = field(default_factory=list)
    num_read: int | None = None
    """Number of rows in the files, if several of them were joined into one."""


def read_file(file: Path) -> Table:
    """Read one data file; UserError if the file itself cannot be read or has an unknown ending."""
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise UserError("data", file, "has an unknown ending", _FORMATS)
    table = Table()
    for row in reader(file):
        if isinstance(row, Unusable):
            table.unusable.append(row)
        else:
            table.rows.append(row)
    return table


def read_dataset(name: str, config: str | None, split: str) -> Table:
    """Read a split of a Hugging Face dataset from the hub or its local cache; UserError if it is not available."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("dataset", name, "needs the package `datasets`", _EVAL) from error
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub, the cache and the dataset's files raise errors of many kinds
        problem = f"cannot be loaded ({error})"
        raise UserError("dataset", name, problem, "check the name, or give local files with `data`") from error
    return Table([Row(f"{name}, row {number}", dict(row)) for number, row in enumerate(rows, start=1)])


def _read_jsonl(file: Path) -> Iterator[Row | Unusable]:
    yield from _in_table(file, scan_jsonl(file, "data", "give a file with one JSON object per line"))


def _read_csv(file: Path) -> Iterator[Row | Unusable]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    yield from _in_table(file, scan_table(file, "data", "name the columns in the first line", delimiter=delimiter))


def _in_table(file: Path, lines: Iterable[tuple[int, Mapping[str, Any] | BadLine]]) -> Iterator[Row | Unusable]:
    for number, line in lines:
        place = f"{file.name}:{number}"
        yield Unusable(place, line.reason) if isinstance(line, BadLine) else Row(place, line)


def _read_parquet(file: Path) -> Iterator[Row | Unusable]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("data", file, "needs the package `pyarrow`", _EVAL) from error
    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError("data", file, f"cannot be read ({error})", "give a Parquet file") from error
    yield from (Row(f"{file.name}, row {number}", row) for number, row in enumerate(rows, start=1))
