"""Tests of catalogues: reading, adding, and one line for each way in which a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimserve.core.catalogue import CATALOGUE_FILE, ENCODER_FILE, Catalogue, read_catalogue, write_catalogue
from slimserve.core.errors import UserError
from slimserve.core.model_files import copy_companions


def make_directory(folder: Path, vocabulary: int = 128) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": vocabulary}))
    return folder


def write_lines(directory: Path, *lines: object) -> None:
    (directory / CATALOGUE_FILE).parent.mkdir(exist_ok=True)
    (directory / CATALOGUE_FILE).write_text("".join(f"{json.dumps(line)}\n" for line in lines))


HEAD = {"first_token": 100, "num_slots": 4, "tokens_per_item": 2}


def test_items_get_consecutive_tokens_and_are_read_back(tmp_path: Path) -> None:
    catalogue = Catalogue(100, 4, 2, {}).with_items(["a", "\u2028 b\n"])
    assert dict(catalogue.tokens) == {"a": 100, "\u2028 b\n": 102}
    assert catalogue.texts["\u2028 b\n"] == "<|item_2|><|item_3|>"
    write_catalogue(make_directory(tmp_path), catalogue)
    assert read_catalogue(tmp_path) == catalogue


def test_new_items_take_the_free_slots_and_keep_the_others() -> None:
    catalogue = Catalogue(100, 3, 2, {"a": 102}).with_items(["b", "c"])
    assert dict(catalogue.tokens) == {"a": 102, "b": 100, "c": 104}
    with pytest.raises(UserError, match="0 of the 3 slots are free"):
        catalogue.with_items(["d"])


@pytest.mark.parametrize(("ids", "message"), [(["a"], "already"), (["b", "b"], "occurs twice"), ([""], "is empty")])
def test_an_id_that_is_none_or_not_new_is_refused(ids: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Catalogue(100, 4, 2, {"a": 100}).with_items(ids)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"items.jsonl:1' cannot be read"),
        ([{**HEAD, "num_slots": 0}], "a number that is not above 0"),
        ([HEAD, {"id": "a", "token": 101}], r"items.jsonl:2' gives the item 'a' the token 101, where no slot begins"),
        ([HEAD, {"id": "a", "token": 108}], "the token 108, where no slot begins"),
        ([HEAD, {"id": "a", "token": 100}, {"id": "b", "token": 100}], "which another item has"),
        ([HEAD, {"id": "a", "token": 100}, {"id": "a", "token": 102}], "on an earlier line too"),
        ([HEAD, {"id": 5, "token": 100}], "cannot be read"),
        ([{**HEAD, "num_slots": 20}], "has tokens up to 139, but the vocabulary of config.json has 128"),
    ],
)
def test_a_catalogue_that_cannot_be_right_is_one_line(tmp_path: Path, lines: list[object], message: str) -> None:
    write_lines(make_directory(tmp_path), *lines)
    with pytest.raises(UserError, match=message) as caught:
        read_catalogue(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_without_items_has_no_catalogue(tmp_path: Path) -> None:
    assert read_catalogue(make_directory(tmp_path)) is None


def test_a_variant_takes_over_the_catalogue_of_its_model(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    for folder in (source, output):
        folder.mkdir()
        make_directory(folder)
    catalogue = Catalogue(100, 4, 1, {}).with_items(["a"])
    write_catalogue(source, catalogue)
    (source / ENCODER_FILE).write_bytes(b"rows")
    (source / "catalogue" / "lock").write_text("")
    copy_companions(source, output)
    assert read_catalogue(output) == catalogue
    assert sorted(file.name for file in (output / "catalogue").iterdir()) == ["encoder.safetensors", "items.jsonl"]
