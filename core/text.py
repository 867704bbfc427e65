"""Reads the text and JSONL files that users supply, with errors that name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimserve.core.errors import UserError


def read_text(file: Path, field: str, remedy: str = "give the path of a UTF-8 text file") -> str:
    """Return the text of a UTF-8 file; UserError names `field` if it cannot be read or decoded."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(field, file, f"cannot be read ({error})", remedy) from error


def read_jsonl(file: Path, field: str, remedy: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number (from 1) and the object of each non-empty line of a JSONL file.

    UserError names `field` and the file, or file:line for a line that is not a JSON object; `remedy` says what a line
    must look like.
    """
    for number, line in enumerate(read_text(file, field, remedy).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(field, f"{file}:{number}", f"is not JSON ({error})", remedy) from error
        if not isinstance(row, dict):
            raise UserError(field, f"{file}:{number}", "is not a JSON object", remedy)
        yield number, row
