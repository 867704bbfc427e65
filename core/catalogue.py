"""Catalogues: the items that a model reads as tokens of their own, and the token of each item id.

A model with item tokens has `catalogue/items.jsonl` beside its weights. The first line states where the item tokens
lie in the vocabulary; every other line is an item:

    {"first_token": 49152, "num_slots": 1856, "tokens_per_item": 1}
    {"id": "50", "token": 49153}

A slot has as many consecutive tokens as an item, and `token` is the first of them. Slots without an item are free for
`slimserve items add`. In a text, the token with the number n from `first_token` is written `<|item_n|>`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from slimserve.core.errors import UserError
from slimserve.core.model_config import CONFIG_FILE, read_config, text_config_of
from slimserve.core.storage import write_atomically
from slimserve.core.text import read_text, split_lines

CATALOGUE_FILE = "catalogue/items.jsonl"
"""File in a model directory with the item ids and their tokens."""
ENCODER_FILE = "catalogue/encoder.safetensors"
"""File in a model directory with the encoder that gives new items their rows."""
_RESTORE = "restore the catalogue that belongs to the weights"


class _Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line of a catalogue's file."""

    first_token: int
    num_slots: int
    tokens_per_item: int


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The line of an item."""

    id: str
    token: int


@dataclass(frozen=True)
class Catalogue:
    """The items of a model and the tokens that stand for them."""

    first_token: int
    num_slots: int
    """Number of items that the vocabulary has room for."""
    tokens_per_item: int
    tokens: Mapping[str, int]
    """First token of each item id, in the order in which the items were added."""

    @property
    def num_tokens(self) -> int:
        """Number of item tokens, free slots included."""
        return self.num_slots * self.tokens_per_item

    @cached_property
    def texts(self) -> dict[str, str]:
        """Text of each item id: what a tokenizer turns into the item's tokens."""
        numbers = range(-self.first_token, self.tokens_per_item - self.first_token)
        return {item: "".join(token_text(token + number) for number in numbers) for item, token in self.tokens.items()}

    def with_items(self, ids: Iterable[str]) -> Catalogue:
        """Return the catalogue with new items in the first free slots.

        Raises UserError if an id is empty, is there already or occurs twice, or if there are too few free slots.
        """
        tokens = dict(self.tokens)
        used = set(self.tokens.values())
        every = range(self.first_token, self.first_token + self.num_tokens, self.tokens_per_item)
        free = [token for token in every if token not in used]
        added = list(ids)
        if len(added) > len(free):
            raise UserError(
                "items",
                len(added),
                f"are too many: {len(free)} of the {self.num_slots} slots are free",
                "add fewer items, or train again with a larger items.num_slots",
            )
        for item, token in zip(added, free, strict=False):
            if not item or item in tokens:
                problem = "is in the catalogue already, or occurs twice" if item else "is empty"
                raise UserError("item id", item, problem, "give each new item an id of its own")
            tokens[item] = token
        return replace(self, tokens=tokens)


def token_text(number: int) -> str:
    """Return the text of an item token by its number from the first item token."""
    return f"<|item_{number}|>"


def write_catalogue(directory: Path, catalogue: Catalogue) -> None:
    """Write the catalogue of a model directory; a reader sees the old file or the complete new one."""
    head = {name: value for name, value in asdict(catalogue).items() if name != "tokens"}
    lines = [head, *({"id": item, "token": token} for item, token in catalogue.tokens.items())]
    file = directory / CATALOGUE_FILE
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, "".join(json.dumps(line) + "\n" for line in lines))


def read_catalogue(directory: Path) -> Catalogue | None:
    """Return the catalogue of a model directory; None if the model has no item tokens.

    Raises UserError if the file is broken, or if it does not fit the vocabulary of config.json.
    """
    file = directory / CATALOGUE_FILE
    if not file.is_file():
        return None
    first, *rows = split_lines(read_text(file, "catalogue")) or [""]
    head = _decoded(first, _Head, f"{file}:1")
    if min(head.first_token, head.num_slots, head.tokens_per_item) < 1:
        raise UserError("catalogue", f"{file}:1", "has a number that is not above 0", _RESTORE)
    tokens: dict[str, int] = {}
    taken: set[int] = set()
    end = head.first_token + head.num_slots * head.tokens_per_item
    for number, row in enumerate(rows, start=2):
        line = _decoded(row, _Line, f"{file}:{number}")
        place = line.token - head.first_token
        if not head.first_token <= line.token < end or place % head.tokens_per_item:
            problem = f"gives the item {line.id!r} the token {line.token}, where no slot begins"
        elif not line.id or line.id in tokens:
            problem = f"has the id {line.id!r}, which is empty or on an earlier line too"
        elif line.token in taken:
            problem = f"gives the item {line.id!r} the token {line.token}, which another item has"
        else:
            tokens[line.id] = line.token
            taken.add(line.token)
            continue
        raise UserError("catalogue", f"{file}:{number}", problem, _RESTORE)
    vocabulary = text_config_of(read_config(directory)).get("vocab_size", 0)
    if end > vocabulary:
        problem = f"has tokens up to {end - 1}, but the vocabulary of {CONFIG_FILE} has {vocabulary}"
        raise UserError("catalogue", file, problem, _RESTORE)
    return Catalogue(head.first_token, head.num_slots, head.tokens_per_item, tokens)


def check_tokens(tokenizer: Any, catalogue: Catalogue, directory: Path) -> None:
    """Raise UserError unless the tokenizer turns the text of every item token into that token alone."""
    vocabulary, first = tokenizer.get_vocab(), catalogue.first_token
    numbers = range(catalogue.num_tokens)
    wrong = next((number for number in numbers if vocabulary.get(token_text(number)) != first + number), None)
    if wrong is None:
        few = numbers[:2]
        read = tokenizer("".join(map(token_text, few)), add_special_tokens=False)["input_ids"]
        if list(read) == [first + number for number in few]:
            return
        wrong = 0
    raise UserError(
        "catalogue",
        directory / CATALOGUE_FILE,
        f"needs the token {first + wrong} for the text {token_text(wrong)}, which the tokenizer does not give",
        "restore the tokenizer that belongs to the catalogue",
    )


def _decoded(row: str, kind: Any, place: str) -> Any:
    try:
        return msgspec.json.decode(row, type=kind)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise UserError("catalogue", place, f"cannot be read ({error})", _RESTORE) from error
