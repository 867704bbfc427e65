"""Reads the rows of a user's data: JSONL, CSV, TSV, Parquet or a Hugging Face dataset.

A row that cannot be read is kept with its place and the reason, so that one bad line does not end the work and is not
silently lost either. Lines end with a line feed alone: other characters that Unicode calls line ends occur in texts.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimserve.core.errors import UserError

_BOM = b"\xef\xbb\xbf"
_MAX_FIELD_BYTES = 64 * 2**20
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
        elif (reason := _unencodable(row.values)) is not None:
            table.unusable.append(Unusable(row.place, reason))
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


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes().removeprefix(_BOM)
    except OSError as error:
        raise UserError("data", file, f"cannot be read ({error.strerror})", "give the path of a data file") from error


def _read_jsonl(file: Path) -> Iterator[Row | Unusable]:
    for number, line in enumerate(_read_bytes(file).split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{file.name}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            yield Unusable(place, "is not UTF-8")
        except (ValueError, RecursionError) as error:
            yield Unusable(place, f"is not JSON ({error})")
        else:
            yield Row(place, row) if isinstance(row, dict) else Unusable(place, "is not a JSON object")


def _read_csv(file: Path) -> Iterator[Row | Unusable]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    try:
        text = _read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError("data", file, f"is not UTF-8 ({error})", "convert it to UTF-8") from error
    csv.field_size_limit(_MAX_FIELD_BYTES)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names = reader.fieldnames or []
    if len(set(names)) < len(names):
        raise UserError("data", file, "names a column twice in its first line", "give each column a name of its own")
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Unusable(f"{file.name}:{reader.line_num}", f"is not CSV ({error})")
            continue
        place = f"{file.name}:{reader.line_num}"
        if None in row or None in row.values():
            yield Unusable(place, f"does not have {len(names)} fields as the first line has")
        else:
            yield Row(place, row)


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


def _unencodable(value: Any) -> str | None:
    """Return why a value cannot be sent as UTF-8, or None. JSON may hold half of a surrogate pair."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return "holds half of a surrogate pair, which is no text"
    elif isinstance(value, Mapping):
        return next((reason for item in value.items() for one in item if (reason := _unencodable(one))), None)
    elif isinstance(value, list):
        return next((reason for one in value if (reason := _unencodable(one))), None)
    return None
