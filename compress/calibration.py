"""Calibration samples: token sequences of equal length from a workload, a file, or the model itself."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimserve.compress.recipe import MIXED, SELF_GENERATED
from slimserve.compress.self_generated import self_generated_documents
from slimserve.core.chat_template import render_chat
from slimserve.core.errors import UserError
from slimserve.core.model_config import read_decoder_config
from slimserve.core.text import read_jsonl, read_text
from slimserve.core.tokenizer import encode, load_tokenizer
from slimserve.workloads import is_workload, load_workload, workload_files, workload_names
from slimserve.workloads.interface import ChatPrompt, Prompt
from slimserve.workloads.item_tokens import item_tokens_of

_WITHOUT_FILES = (SELF_GENERATED, MIXED)
"""Sources that are neither a workload nor a file."""
_SHORT_TOKENS = 16
"""Tokens of a short sequence."""
_TOKENS_PER_SHORT_TOKEN = 4
"""Calibration tokens for each token of the short sequences."""
_FIRST_PROMPTS = 64
"""Prompts in the first request to a workload; each later request asks for four times as many."""


@dataclass(frozen=True)
class CalibrationData:
    """The samples that the steps of a recipe read."""

    tokens_NT: Tensor
    """Token ids, int64, N sequences of T."""
    sha256: str
    """Hash of the token ids."""
    detail: dict[str, Any]
    """Source, seed, requested and available number of sequences, for the manifest."""


def check_source(source: str) -> None:
    """Raise UserError unless `source` is workloads, `mixed`, `self-generated`, or a readable .txt or .jsonl file."""
    if source in _WITHOUT_FILES:
        return
    if all(map(is_workload, source.split(","))):
        for name in source.split(","):
            load_workload(name)
    elif Path(source).suffix not in {".txt", ".jsonl"} or not Path(source).is_file():
        raise UserError(
            "calibration source",
            source,
            "is neither a workload nor a file",
            f"choose from {', '.join([*_WITHOUT_FILES, *workload_names()])}, or give the path of a .txt or .jsonl file",
        )


def source_files(source: str) -> list[Path]:
    """Return the files whose content decides what a source gives; none for built-in workloads and the model."""
    if source in _WITHOUT_FILES:
        return []
    if all(map(is_workload, source.split(","))):
        return [file for name in source.split(",") for file in workload_files(name)]
    return [Path(source)]


def load_calibration(
    directory: Path,
    source: str,
    num_samples: int,
    sequence_length: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> CalibrationData:
    """Return `num_samples` sequences of `sequence_length` tokens, made with the tokenizer of the model in `directory`.

    Documents are shuffled by `seed` and joined, so no token is padding. Each sequence starts with a document, as a
    served prompt does. A workload gives only its calibration split: prompts with true answers, in the form that the
    server builds. A .txt file is split at empty lines. A line of a .jsonl file is `{"text": …}` or
    `{"input_ids": [...]}`. The source `self-generated` samples from the model on `device`. If the source has fewer
    sequences, all of them are returned.

    Raises UserError if the source is unknown, malformed, or has not even one sequence.
    """
    check_source(source)
    ids, num_documents = _joined(_documents(directory, source, seed, device), num_samples, sequence_length)
    found = len(ids) // sequence_length
    if not found:
        raise UserError(
            "calibration source",
            source,
            f"has {len(ids)} tokens, less than one sequence of {sequence_length}",
            "give more text, or lower calibration.sequence_length",
        )
    ids = ids[: found * sequence_length]
    vocabulary = read_decoder_config(directory)["vocab_size"]
    odd = next((token for token in ids if not 0 <= token < vocabulary), None)
    if odd is not None:
        raise UserError(
            "calibration source",
            source,
            f"has token ids outside 0 to {vocabulary - 1}, such as {odd}",
            "use this model's tokenizer",
        )
    tokens_NT = torch.tensor(ids, dtype=torch.int64).view(found, sequence_length)
    detail = {
        "source": source,
        "seed": seed,
        "num_documents": num_documents,
        "num_sequences": found,
        "num_sequences_requested": num_samples,
        "sequence_length": sequence_length,
    }
    return CalibrationData(tokens_NT, hashlib.sha256(tokens_NT.numpy().tobytes()).hexdigest(), detail)


def short_sequences(tokens_NT: Tensor) -> Tensor:
    """Return parts of the sequences, `[M, S]` int64 with at most 16 tokens, each with a first token of its own.

    They have up to a quarter as many tokens as the sequences. The first tokens of the sequences come first, then others
    at random, so that frequent tokens are most likely among them.
    """
    num_sequences, length = tokens_NT.shape
    parts_NPS = tokens_NT.unfold(1, min(_SHORT_TOKENS, length), 1)
    _, num_parts, size = parts_NPS.shape
    shuffled = torch.randperm(num_sequences * num_parts, generator=torch.Generator().manual_seed(0))
    order = torch.cat((torch.arange(num_sequences) * num_parts, shuffled))
    position_of: dict[int, int] = {}
    for token, position in zip(parts_NPS[:, :, 0].flatten()[order].tolist(), order.tolist(), strict=True):
        position_of.setdefault(token, position)
    num_wanted = max(1, tokens_NT.numel() // (_TOKENS_PER_SHORT_TOKEN * size))
    chosen = torch.tensor(list(position_of.values())[:num_wanted])
    return parts_NPS[chosen // num_parts, chosen % num_parts]


def _joined(documents: Iterator[list[int]], num_samples: int, sequence_length: int) -> tuple[list[int], int]:
    """Return the tokens of up to `num_samples` sequences and an incomplete one, and the number of documents read.

    The end of a document that is cut off at the end of a sequence is used only if the documents do not suffice.
    """
    ids: list[int] = []
    cut_off: list[int] = []
    num_documents = 0
    for document in documents:
        room = sequence_length - len(ids) % sequence_length
        ids += document[:room]
        cut_off += document[room:]
        num_documents += 1
        if len(ids) == num_samples * sequence_length:
            return ids, num_documents
    return (ids + cut_off)[: num_samples * sequence_length], num_documents


def _documents(directory: Path, source: str, seed: int, device: torch.device | str) -> Iterator[list[int]]:
    """Yield the token ids of one document after another, in the order that `seed` gives."""
    path = Path(source)
    if path.suffix == ".jsonl":
        rows = _read_rows(path, read_decoder_config(directory)["vocab_size"])
        random.Random(seed).shuffle(rows)
        if all("input_ids" in row for _, row in rows):
            yield from (row["input_ids"] for _, row in rows)
            return
        texts = [(f"{path}:{number}", row["text"]) for number, row in rows]
    elif path.suffix == ".txt":
        paragraphs = read_text(path, "calibration source").split("\n\n")
        texts = [(source, paragraph.strip()) for paragraph in paragraphs if paragraph.strip()]
        random.Random(seed).shuffle(texts)
    elif source == SELF_GENERATED:
        yield from self_generated_documents(directory, load_tokenizer(directory), seed, device)
        return
    else:
        yield from _workload_documents(directory, source, seed)
        return
    tokenizer = load_tokenizer(directory)
    yield from (encode(tokenizer, text, where) for where, text in texts)


def _read_rows(path: Path, vocabulary: int) -> list[tuple[int, dict[str, Any]]]:
    """Return the rows of a JSONL file with the numbers of their lines; token ids are below `vocabulary`."""
    remedy = 'write {"text": "…"} or {"input_ids": [1, 2, 3]} in every line'
    rows = []
    for number, row in read_jsonl(path, "calibration source", remedy):
        if not _is_document(row):
            problem = "has neither a text nor input_ids that are integers"
            raise UserError("calibration source", f"{path}:{number}", problem, remedy)
        wrong = [token for token in row.get("input_ids", []) if not 0 <= token < vocabulary]
        if wrong:
            problem = f"has the token id {wrong[0]} outside 0 to {vocabulary - 1}"
            raise UserError("calibration source", f"{path}:{number}", problem, "use this model's tokenizer")
        rows.append((number, row))
    if len({"input_ids" in row for _, row in rows}) > 1:
        raise UserError("calibration source", path, "mixes text and input_ids", "use one of them in every line")
    return rows


def _is_document(row: dict[str, Any]) -> bool:
    if "input_ids" in row:
        return isinstance(row["input_ids"], list) and all(type(token) is int for token in row["input_ids"])
    return isinstance(row.get("text"), str)


def _workload_documents(directory: Path, source: str, seed: int) -> Iterator[list[int]]:
    tokenizer, as_read = load_tokenizer(directory), item_tokens_of(directory)
    names = workload_names() if source == MIXED else source.split(",")
    for prompts in zip(*(_prompts(name, seed) for name in names), strict=False):
        for prompt in prompts:
            yield document_ids(tokenizer, as_read(prompt))


def _prompts(name: str, seed: int) -> Iterator[Prompt]:
    """Yield a workload's calibration prompts, requested in growing batches because making prompts is slow."""
    workload, num_given, num_wanted = load_workload(name), 0, _FIRST_PROMPTS
    while True:
        prompts = workload.make_prompts("calibration", num_wanted, seed)
        yield from prompts[num_given:]
        if len(prompts) < num_wanted:
            return
        num_given, num_wanted = num_wanted, 4 * num_wanted


def document_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt with its true answer, in the form that the server builds.

    Raises UserError if the model's chat template fails.
    """
    if not isinstance(prompt, ChatPrompt):
        return encode(tokenizer, prompt.solved, "workload")
    messages = [*prompt.messages, {"role": "assistant", "content": prompt.solution}]
    if tokenizer.chat_template is None:
        return encode(tokenizer, "\n\n".join(message["content"] or "" for message in messages), "workload")
    tools, options = prompt.request.get("tools") or (), prompt.request.get("chat_template_kwargs")
    text = render_chat(tokenizer, messages, f"a prompt of {prompt.kind}", tools=tools, options=options)
    chat: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return chat
