"""Item tokens: what a training needs to learn them, and `slimserve items add`, which gives new items their rows.

A new item gets its row from the encoder alone. The rows are written before the catalogue, whose replacement is the
moment at which the items exist. A process that is killed in between leaves rows of free slots, which nothing reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimserve.core.catalogue import Catalogue, read_catalogue, write_catalogue
from slimserve.core.errors import UserError
from slimserve.core.model import resolve_model
from slimserve.core.model_files import model_hash
from slimserve.core.storage import atomic_file
from slimserve.core.text import read_jsonl
from slimserve.core.tokenizer import load_tokenizer
from slimserve.distill.data import Examples, is_validation_user, sources_of
from slimserve.distill.item_checkpoint import (
    add_item_tokens,
    check_catalogue,
    replace_rows,
    write_item_tokens,
)
from slimserve.distill.item_embedding import ItemEmbedding
from slimserve.distill.item_encoder import (
    ItemEncoder,
    count_ratings,
    first_map,
    fold_of,
    folded_features,
    load_encoder,
    piece_means,
    text_states,
)
from slimserve.distill.models import load_model
from slimserve.distill.recipe import ItemSettings
from slimserve.distill.sections import Example
from slimserve.workloads import is_workload, load_workload
from slimserve.workloads.interface import Interaction, ScoringPrompt

_STATES_FILE = "item-states.safetensors"
_FREE_OF = 8
"""By default one of this many slots is free."""
_LINE = 'write {"id": "…", "text": "…"} in every line'


@dataclass(frozen=True)
class TextModel:
    """The language model that reads the items' texts."""

    argument: str
    sha256: str
    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class ItemTask:
    """The items that a training learns."""

    settings: ItemSettings
    texts: dict[str, str]
    catalogue: Catalogue
    interactions: list[Interaction]
    """Grades of the training users."""

    def as_tokens(self, prompt: ScoringPrompt) -> ScoringPrompt:
        """Return a prompt over these items as the student reads it."""
        return self.as_text(prompt).with_texts(self.catalogue.texts)

    def in_folds(self, examples: Examples) -> Examples:
        """Return the examples with the item tokens of each training user moved to the user's fold."""
        first, num_tokens = self.catalogue.first_token, self.catalogue.num_tokens

        def moved(example: Example, group: int) -> Example:
            offset = fold_of(group, self.settings.num_folds) * num_tokens
            return replace(example, tokens=tuple(one + offset * (one >= first) for one in example.tokens))

        training = [
            example if group is None else moved(example, group)
            for example, group in zip(examples.training, examples.training_groups, strict=True)
        ]
        return replace(examples, training=training)

    def as_text(self, prompt: ScoringPrompt) -> ScoringPrompt:
        """Return a prompt over these items as the teacher reads it; other items are left out."""
        return prompt.only_items(self.texts)

    def put_into(self, student: Any, tokenizer: Any, text_model: TextModel, folder: Path) -> None:
        """Give the student an embedding that learns the items; `folder` keeps the text model's states."""
        file, texts = folder / _STATES_FILE, list(self.texts.values())
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as partial:
                save_file({"states": text_states(text_model.model, text_model.tokenizer, texts)}, partial)
        states_NT = load_file(file)["states"]
        mean_T = states_NT.mean(0)
        scale = float((states_NT - mean_T).square().sum(1).mean().sqrt()) or 1.0
        text_NE = (states_NT - mean_T) / scale
        ratings_GNS = folded_features(
            list(self.texts), self.interactions, self.settings.num_factors, self.settings.num_folds
        )
        ordinary = student.get_input_embeddings().weight
        pieces = [
            piece_means(ordinary.detach(), tokens, self.settings.tokens_per_item)
            for tokens in tokenizer(texts, add_special_tokens=False)["input_ids"]
        ]
        weight_TKD, bias_KD = first_map(text_NE, torch.stack(pieces))
        # The weights of rating features start at 0, so the first rows depend on the texts alone.
        of_ratings_SKD = torch.zeros(ratings_GNS.shape[2], *bias_KD.shape)
        encoder = ItemEncoder(
            torch.cat((weight_TKD, of_ratings_SKD)), bias_KD, mean_T, scale, text_model.argument, text_model.sha256
        )
        student.set_input_embeddings(
            ItemEmbedding(
                ordinary,
                encoder,
                self._in_slots(text_NE),
                self._in_slots(ratings_GNS),
                self._in_slots(count_ratings(list(self.texts), self.interactions)[:, None])[:, 0],
                self.catalogue.first_token,
                self.settings.shrinkage,
                self.settings.unrated_frac,
            )
        )

    def _in_slots(self, values: Tensor) -> Tensor:
        """Return values of items, `[…, items, features]`, with zeros for the slots without an item."""
        num_free = self.catalogue.num_slots - values.shape[-2]
        return torch.nn.functional.pad(values, (0, 0, 0, num_free))


def start_items(settings: ItemSettings, student: Path, tokenizer: Any, source: str) -> ItemTask:
    """Return the items of a training, and add their tokens to the student's tokenizer in memory.

    Raises UserError if the file of items is broken, the student has item tokens, or the data source has no item ids.
    """
    assert settings.file is not None
    if read_catalogue(student) is not None:
        raise UserError("student", student, "has item tokens already", "add items to it with: slimserve items add")
    texts = read_items(settings.file)
    num_slots = settings.num_slots or -(-len(texts) * _FREE_OF // (_FREE_OF - 1))
    if num_slots < len(texts):
        raise UserError("items.num_slots", num_slots, f"is below the {len(texts)} items", "raise it or set it to 0")
    first_token = add_item_tokens(tokenizer, num_slots * settings.tokens_per_item)
    empty = Catalogue(first_token, num_slots, settings.tokens_per_item, {})
    workloads = [load_workload(name) for name in sources_of(source) if is_workload(name)]
    interactions = [one for workload in workloads for one in workload.interactions()]
    if not any(one.item in texts for one in interactions):
        problem = f"has no grades of the items in {settings.file}"
        raise UserError("data.source", source, problem, "give a workload whose items have the ids of that file")
    training = [one for one in interactions if one.item in texts and not is_validation_user(one.group)]
    return ItemTask(settings, texts, empty.with_items(texts), training)


def read_items(file: Path) -> dict[str, str]:
    """Return the text of each item id of a JSONL file; UserError names the line of an id or a text that is none."""
    texts: dict[str, str] = {}
    for number, row in read_jsonl(file, "items", _LINE):
        item, text = row.get("id"), row.get("text")
        place = f"{file}:{number}"
        for name, value in (("id", item), ("text", text)):
            if not isinstance(value, str) or not value.strip():
                raise UserError("items", place, f"has no {name}, or one that is no text or empty", _LINE)
        assert isinstance(item, str)
        assert isinstance(text, str)
        if item in texts:
            raise UserError("items", place, f"has the id {item!r} of an earlier line", "give each item once")
        texts[item] = text
    if not texts:
        raise UserError("items", file, "holds no items", _LINE)
    return texts


def write_items(output: Path, task: ItemTask, encoder: ItemEncoder) -> None:
    """Write tokenizer, encoder and catalogue beside the saved weights of a student, and check that all fit."""
    write_item_tokens(output, task.catalogue.num_tokens)
    encoder.save(output)
    write_catalogue(output, task.catalogue)
    check_catalogue(output, task.catalogue)


def add_items(directory: Path, file: Path, text_model: str | None = None) -> int:
    """Give the items of a JSONL file tokens and rows in a variant, and return their number.

    The encoder computes the rows from the texts, which the language model reads that it was trained with; `text_model`
    says where that model is now. Two calls at once wait for each other. Raises UserError, and changes nothing, if an
    item is there already, the file is broken, too few slots are free, or the model is another one.
    """
    texts = read_items(file)
    with FileLock(_lock_file(directory)):
        catalogue = read_catalogue(directory)
        if catalogue is None:
            raise UserError("model", directory, "has no item tokens", "train it with: slimserve distill --items FILE")
        encoder = load_encoder(directory)
        added = catalogue.with_items(texts)
        check_catalogue(directory, catalogue)
        reader = resolve_model(text_model or encoder.text_model)
        if model_hash(reader) != encoder.text_model_sha256:
            problem = "is not the model that read the texts in training"
            raise UserError("--text-model", reader, problem, "give the directory of that model")
        states_NT = text_states(load_model(reader, torch.float32), load_tokenizer(reader), list(texts.values()))
        rows_NKD = encoder.rows(states_NT)
        replace_rows(directory, dict(_rows_of(added, list(texts), rows_NKD)))
        write_catalogue(directory, added)
    return len(texts)


def _rows_of(catalogue: Catalogue, ids: Sequence[str], rows_NKD: Tensor) -> list[tuple[int, Tensor]]:
    return [
        (catalogue.tokens[item] + number, row_D)
        for item, rows_KD in zip(ids, rows_NKD, strict=True)
        for number, row_D in enumerate(rows_KD)
    ]


def _lock_file(directory: Path) -> Path:
    """Return the lock beside a variant; a file inside would be copied with it."""
    return directory.resolve().with_name(f".{directory.resolve().name}.items-lock")
