"""Calibration samples: token sequences of one length from a workload, a text file or JSONL, drawn by a seed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimserve.core.errors import UserError
from slimserve.workloads import is_workload, load_workload, workload_names
from slimserve.workloads.interface import Prompt, ScoringPrompt

MIXED = "mixed"
"""Source name: every workload, document by document in turn."""

_DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class Calibration:
    """What a recipe's steps look at."""

    tokens_NT: Tensor
    """Token ids, int64, N sequences of T."""
    sha256: str
    """Hash of the token ids."""
    detail: dict[str, Any]
    """Source, seed, sizes asked and found: for the manifest."""


def check_source(source: str) -> None:
    """Raise UserError unless `source` is a workload, `mixed`, or a readable .txt or .jsonl file."""
    if source == MIXED or is_workload(source):
        return
    if Path(source).suffix not in {".txt", ".jsonl"} or not Path(source).is_file():
        raise UserError(
            "calibration source",
            source,
            "is neither a workload nor a file",
            f"choose from {', '.join([MIXED, *workload_names()])}, or give the path of a .txt or .jsonl file",
        )


def load_calibration(
    directory: Path, source: str, num_samples: int, sequence_length: int, seed: int = 0
) -> Calibration:
    """Draw `num_samples` sequences of `sequence_length` tokens with the tokenizer of the model in `directory`.

    Documents come in the order that `seed` gives and are laid end to end, so that no token is padding. A
    workload gives its calibration split only: prompts with true answers, as the model sees them when it is
    served. A .txt file is split at empty lines; a line of .jsonl holds `{"text": …}` or `{"input_ids": [...]}`.
    Fewer sequences come back where the source has no more, and `detail` says so; UserError where it has not one.
    """
    check_source(source)
    ids: list[int] = []
    num_documents = 0
    for document in _documents(directory, source, seed):
        ids.extend(document)
        num_documents += 1
        if len(ids) >= num_samples * sequence_length:
            break
    found = min(num_samples, len(ids) // sequence_length)
    if not found:
        raise UserError(
            "calibration source",
            source,
            f"has {len(ids)} tokens, less than one sequence of {sequence_length}",
            "give more text, or lower calibration.sequence_length",
        )
    tokens_NT = torch.tensor(ids[: found * sequence_length], dtype=torch.int64).view(found, sequence_length)
    vocabulary = json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    if int(tokens_NT.min()) < 0 or int(tokens_NT.max()) >= vocabulary:
        raise UserError(
            "calibration source", source, f"has token ids outside 0 to {vocabulary - 1}", "use this model's tokenizer"
        )
    detail = {
        "source": source,
        "seed": seed,
        "num_documents": num_documents,
        "num_sequences": found,
        "num_sequences_asked": num_samples,
        "sequence_length": sequence_length,
    }
    return Calibration(tokens_NT, hashlib.sha256(tokens_NT.numpy().tobytes()).hexdigest(), detail)


def _documents(directory: Path, source: str, seed: int) -> Iterator[list[int]]:
    """Token ids of one document after another, in the order of `seed`."""
    path = Path(source)
    if path.suffix == ".jsonl":
        rows = _read_jsonl(path)
        random.Random(seed).shuffle(rows)
        if all("input_ids" in row for row in rows):
            yield from (row["input_ids"] for row in rows)
            return
        texts = iter([row["text"] for row in rows])
    elif path.suffix == ".txt":
        paragraphs = [part.strip() for part in _read_text(path).split("\n\n")]
        paragraphs = [part for part in paragraphs if part]
        random.Random(seed).shuffle(paragraphs)
        texts = iter(paragraphs)
    else:
        yield from _workload_documents(directory, source, seed)
        return
    tokenizer = _tokenizer(directory)
    yield from (tokenizer(text)["input_ids"] for text in texts)


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError("calibration source", f"{path}:{number}", f"is not JSON ({error})", "mend it") from error
        if not isinstance(row, dict) or not _is_document(row):
            raise UserError(
                "calibration source",
                f"{path}:{number}",
                "has neither a text nor input_ids that are whole numbers",
                'write {"text": "…"}',
            )
        rows.append(row)
    if len({"input_ids" in row for row in rows}) > 1:
        raise UserError("calibration source", path, "mixes text and input_ids", "use one of them in every line")
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError("calibration source", path, f"is not UTF-8 ({error})", "convert it") from error


def _is_document(row: dict[str, Any]) -> bool:
    if "input_ids" in row:
        return isinstance(row["input_ids"], list) and all(type(token) is int for token in row["input_ids"])
    return isinstance(row.get("text"), str)


def _workload_documents(directory: Path, source: str, seed: int) -> Iterator[list[int]]:
    tokenizer = _tokenizer(directory)
    names = workload_names() if source == MIXED else [source]
    streams = [_prompts(name, seed) for name in names]
    for prompts in zip(*streams, strict=False):
        for prompt in prompts:
            yield document_ids(tokenizer, prompt)


def _prompts(name: str, seed: int) -> Iterator[Prompt]:
    """A workload's calibration prompts, asked for in growing lots since making them costs."""
    workload, given, lot = load_workload(name), 0, _DOCUMENTS_AT_ONCE
    while True:
        prompts = workload.make_prompts("calibration", lot, seed)
        yield from prompts[given:]
        if len(prompts) < lot:
            return
        given, lot = lot, 4 * lot


def document_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt with its true answer, as the server would build them."""
    if isinstance(prompt, ScoringPrompt):
        ids: list[int] = tokenizer(prompt.solved)["input_ids"]
        return ids
    messages = [*prompt.messages, {"role": "assistant", "content": prompt.solution}]
    if tokenizer.chat_template is None:
        plain: list[int] = tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"]
        return plain
    chat: list[int] = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    return chat


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # transformers raises whatever the tokenizer's files made it raise
        raise UserError("tokenizer", directory, f"cannot be loaded ({error})", "restore its files") from error
