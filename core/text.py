"""Reads the text, JSONL and tables that users supply, with errors that name the file and the line.

Lines end with a line feed alone: `str.splitlines` also splits at U+2028, U+0085, form feeds and others, which occur
inside texts. A byte order mark at the start of a file is skipped. Text that UTF-8 cannot encode is refused.

A `scan_` function yields the lines that cannot be used as `BadLine`, for callers that count them; a `read_` function
raises a UserError for the first one.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from slimserve.core.errors import UserError

_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_MAX_FIELD_CHARACTERS = 64 * 2**20
_MAX_DEPTH = 64
_TOO_DEEP = f"is nested more than {_MAX_DEPTH} levels deep"
_SAVE_AS_UTF8 = "save it as UTF-8"
_HALF_A_PAIR = "holds half of a surrogate pair, which is no text"

T = TypeVar("T")


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be used, with the reason."""

    reason: str


def read_text(file: Path, field: str, remedy: str = "give the path of a UTF-8 text file") -> str:
    """Return the text of a UTF-8 file without its byte order mark and with line feeds for CRLF.

    UserError names `field` and the file if it cannot be read, and the line if it is not UTF-8.
    """
    return _decoded(file, field, remedy).replace("\r\n", "\n")


def split_lines(text: str, *, keepends: bool = False) -> list[str]:
    """Return the lines of a text, which end with a line feed alone; `keepends` keeps the line feeds."""
    *lines, last = text.split("\n")
    if keepends:
        lines = [f"{line}\n" for line in lines]
    return [*lines, last] if last else lines


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises ValueError if it is no JSON, is nested more than 64 levels deep, or holds half of a surrogate pair.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    reason = json_problem(value)
    if reason is not None:
        raise ValueError(reason)
    return value


def json_problem(value: Any) -> str | None:
    """Return why a value of JSON cannot be processed or sent as UTF-8, or None."""
    level, depth = [value], 0
    while level:
        if depth > _MAX_DEPTH:
            return _TOO_DEEP
        below: list[Any] = []
        for one in level:
            if isinstance(one, str):
                try:
                    one.encode()
                except UnicodeEncodeError:
                    return _HALF_A_PAIR
            elif isinstance(one, dict):
                below += one.keys()
                below += one.values()
            elif isinstance(one, list):
                below += one
        level, depth = below, depth + 1
    return None


def scan_jsonl(file: Path, field: str, remedy: str) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
    """Yield the line number (from 1) and the object of each non-empty line of a JSONL file.

    UserError names `field` and the file if it cannot be read.
    """
    for number, line in enumerate(_read_bytes(file, field, remedy).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.decode("utf-8"))
        except UnicodeDecodeError:
            yield number, BadLine("is not UTF-8")
        except ValueError as error:
            yield number, BadLine(_json_reason(line.strip(), error))
        else:
            yield number, row if isinstance(row, dict) else BadLine("is not a JSON object")


def read_jsonl(file: Path, field: str, remedy: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number (from 1) and the object of each non-empty line of a JSONL file.

    UserError names `field` and the file, or file:line for a line that is not a JSON object; `remedy` says what a line
    must look like.
    """
    yield from _strict(scan_jsonl(file, field, remedy), file, field, remedy)


def scan_fields(
    file: Path, field: str, remedy: str, *, delimiter: str, is_quoted: bool
) -> Iterator[tuple[int, list[str] | BadLine]]:
    """Yield the number of its first line and the fields of each record of a table, without empty lines.

    With `is_quoted` fields may be in double quotes, as in CSV, and then hold delimiters and line feeds. Raises
    UserError if the file cannot be read, is not UTF-8, or has a quote that is never closed.
    """
    lines = split_lines(_decoded(file, field, remedy), keepends=True)
    if not is_quoted:
        for number, line in enumerate(lines, start=1):
            if stripped := line.rstrip("\r\n"):
                yield number, stripped.split(delimiter)
        return
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                problem = "opens a quote that is never closed"
                raise UserError(field, f"{file}:{number}", problem, 'write each quote inside a field as ""') from error
            span = f" in the record of lines {number} to {reader.line_num}" if reader.line_num > number else ""
            yield number, BadLine(f"is not CSV ({error}{span})")
        else:
            if fields:
                yield number, fields


def scan_table(
    file: Path,
    field: str,
    remedy: str,
    *,
    delimiter: str,
    is_quoted: bool = True,
    needed: Collection[str] = (),
    column_of: Callable[[str], str] = str.strip,
) -> Iterator[tuple[int, dict[str, str] | BadLine]]:
    """Yield the line number and the fields by column of each record after the first, which names the columns.

    `column_of` turns a field of the first record into a column's name. Raises UserError if the file cannot be read,
    a column is named twice, or one of `needed` is missing.
    """
    names: list[str] | None = None
    for number, fields in scan_fields(file, field, remedy, delimiter=delimiter, is_quoted=is_quoted):
        if names is None:
            names = _column_names(fields, file, field, needed, column_of)
        elif isinstance(fields, BadLine):
            yield number, fields
        elif len(fields) != len(names):
            yield number, BadLine(f"does not have {len(names)} fields as the first line has")
        else:
            yield number, dict(zip(names, fields, strict=True))
    if names is None:
        raise UserError(field, file, "is empty", remedy)


def read_table(file: Path, field: str, remedy: str, **options: Any) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the records of `scan_table`, with the same options; UserError names file:line of a bad one."""
    yield from _strict(scan_table(file, field, remedy, **options), file, field, remedy)


def _column_names(
    fields: Sequence[str] | BadLine,
    file: Path,
    field: str,
    needed: Collection[str],
    column_of: Callable[[str], str],
) -> list[str]:
    if isinstance(fields, BadLine):
        raise UserError(field, f"{file}:1", fields.reason, "name the columns in the first line")
    names = [column_of(name) for name in fields]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(field, f"{file}:1", f"names the column {twice!r} twice", "give each column a name of its own")
    missing = [name for name in needed if name not in names]
    if missing:
        problem = f"has no column {', '.join(missing)} (it has {', '.join(names)})"
        raise UserError(field, f"{file}:1", problem, "add it to the first line")
    return names


def _strict(lines: Iterator[tuple[int, T | BadLine]], file: Path, field: str, remedy: str) -> Iterator[tuple[int, T]]:
    for number, line in lines:
        if isinstance(line, BadLine):
            raise UserError(field, f"{file}:{number}", line.reason, remedy)
        yield number, line


def _json_reason(line: bytes, error: ValueError) -> str:
    if str(error) in {_TOO_DEEP, _HALF_A_PAIR}:
        return str(error)
    if line in {b"[", b"{"}:
        return "is not JSON on one line (jq -c writes a document of several lines on one)"
    return f"is not JSON ({error})"


def _decoded(file: Path, field: str, remedy: str) -> str:
    content = _read_bytes(file, field, remedy)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(field, f"{file}:{number}", "is not UTF-8", _SAVE_AS_UTF8) from error


def _read_bytes(file: Path, field: str, remedy: str) -> bytes:
    try:
        content = file.read_bytes()
    except (OSError, ValueError) as error:  # ValueError for a null byte in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(field, file, f"cannot be read ({reason})", remedy) from error
    if content.startswith(_UTF16_BOMS):
        raise UserError(field, file, "is UTF-16, not UTF-8", _SAVE_AS_UTF8)
    return content.removeprefix(_BOM)
