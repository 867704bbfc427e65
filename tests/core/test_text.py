"""Tests of reading users' text and JSONL files."""

from pathlib import Path

import pytest

from slimserve.core.errors import UserError
from slimserve.core.text import read_jsonl, read_text


def test_rows_come_with_their_line_numbers(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n\n{"b": 2}\n')
    assert list(read_jsonl(file, "--data", "remedy")) == [(1, {"a": 1}), (3, {"b": 2})]


@pytest.mark.parametrize(("text", "message"), [("{", ":1' is not JSON"), ("{}\n[1]", ":2' is not a JSON object")])
def test_a_bad_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        list(read_jsonl(file, "--data", "remedy"))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"a\nb\n\xe9")
    (tmp_path / "windows").write_bytes("a".encode("utf-16"))
    for name, message in {"missing": "cannot be read", "latin": ":3' is not UTF-8", "windows": "is UTF-16"}.items():
        with pytest.raises(UserError, match=message):
            read_text(tmp_path / name, "--data")
