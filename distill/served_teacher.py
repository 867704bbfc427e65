"""A served teacher as a source of the teacher's cache: the likeliest tokens at every target, over HTTP.

Each sequence is one request, `POST /v1/completions` with its tokens as the prompt, `prompt_logprobs` and one token to
generate, as vLLM takes it; the server batches the requests that are in flight. Answers are kept in files of several
sequences, so a killed run asks only for the rest. What the server does not return is in the cache's missing mass.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from slimserve.core.errors import UserError
from slimserve.core.openai_client import OpenAIClient, Target, ask_all
from slimserve.core.storage import write_atomically
from slimserve.distill.cost import Cost
from slimserve.distill.losses import TopK
from slimserve.distill.recipe import LossSettings
from slimserve.distill.supervision import SupervisedSequence
from slimserve.distill.teacher_cache import CachedTeacher, CacheError, cache_name, row_begins, save_cache, write_tensors

_PATH = "/v1/completions"
_CONCURRENCY = 16
_PART_SEQUENCES = 32
"""Number of sequences in a file: the most that a killed run asks for again."""
_PROGRESS_FILE = "progress.json"
"""File with the time so far; its name keeps the work folder if the run fails."""
_SUM_TOLERANCE = 1e-2


def make_served_cache(
    target: Target, sequences: Sequence[SupervisedSequence], loss: LossSettings, folder: Path, tokenizer: Any
) -> CachedTeacher:
    """Return the cache of a served teacher for these sequences, made in `folder` unless it is there already.

    Raises UserError if the server fails or returns too few tokens, or if its tokens are not those of `tokenizer`, the
    student's. The FLOPs of the teacher are not known and count as 0.
    """
    name = cache_name(f"{target.url} {target.model}", sequences, loss)
    file = folder / f"{name}.safetensors"
    if file.is_file():
        return CachedTeacher(file)
    parts = _Parts(folder / name)

    async def ask(client: OpenAIClient, index: int) -> TopK:
        sequence = sequences[index].for_teacher
        body = {"prompt": sequence.tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": loss.top_k}
        return await client.ask(_PATH, body, lambda answer: _read(answer, sequence, loss.top_k, tokenizer))

    missing = [index for index in range(len(sequences)) if index not in parts.known]
    title = f"likeliest tokens of {target.model}"
    try:
        ask_all(target, title, missing, ask, unit="sequences", concurrency=_CONCURRENCY, on_result=parts.add)
    finally:
        parts.flush()
    tokens = torch.cat([parts.known[index].tokens_NK for index in range(len(sequences))])
    logprobs = torch.cat([parts.known[index].logprobs_NK for index in range(len(sequences))])
    missing_mass = float((1 - logprobs.double().exp().sum(-1)).clamp_min(0).mean())
    error = CacheError(missing_mass, None, tokens.nbytes + logprobs.nbytes)
    cost = Cost(parts.seconds, sum(len(sequence.for_teacher.tokens) for sequence in sequences))
    save_cache(file, TopK(tokens, logprobs), row_begins(sequences), error, cost)
    parts.delete()
    return CachedTeacher(file)


class _Parts:
    """The answers so far, in files that appear completely or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._unsaved: dict[int, TopK] = {}
        self.known: dict[int, TopK] = {}
        """Answer of each sequence by its index."""
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            for name in tensors:
                kind, _, index = name.partition("/")
                if kind == "tokens":
                    self.known[int(index)] = TopK(tensors[name], tensors[f"logprobs/{index}"])
        progress = folder / _PROGRESS_FILE
        self.seconds: float = json.loads(progress.read_text(encoding="utf-8"))["seconds"] if progress.is_file() else 0.0
        self._begun = time.monotonic()

    def add(self, index: int, answer: TopK) -> None:
        self.known[index] = self._unsaved[index] = answer
        if len(self._unsaved) >= _PART_SEQUENCES:
            self.flush()

    def flush(self) -> None:
        """Write the answers that are in no file yet."""
        if not self._unsaved:
            return
        tensors: dict[str, Tensor] = {}
        for index, answer in self._unsaved.items():
            tensors |= {f"tokens/{index}": answer.tokens_NK, f"logprobs/{index}": answer.logprobs_NK}
        file = self._folder / f"{min(self._unsaved)}-{max(self._unsaved)}.safetensors"
        write_tensors(file, tensors)
        self._unsaved = {}
        now = time.monotonic()
        self.seconds, self._begun = self.seconds + now - self._begun, now
        write_atomically(self._folder / _PROGRESS_FILE, json.dumps({"seconds": self.seconds}))

    def delete(self) -> None:
        """Delete the files of answers; the time so far stays."""
        for file in self._folder.glob("*.safetensors"):
            file.unlink()


def _read(answer: dict[str, Any], sequence: SupervisedSequence, k: int, tokenizer: Any) -> TopK:
    """Return the `k` likeliest tokens at every target; ValueError or UserError if the answer does not have them."""
    positions = answer["choices"][0].get("prompt_logprobs")
    if not positions:
        problem = "does not return prompt_logprobs"
        raise UserError("teacher", answer.get("model"), problem, "serve it with vLLM")
    if len(positions) != len(sequence.tokens):
        raise ValueError(f"{len(positions)} positions for {len(sequence.tokens)} tokens")
    rows = []
    for target in sequence.targets:
        entries = {int(token): entry for token, entry in positions[target].items()}
        token = sequence.tokens[target]
        _check_token(token, entries[token].get("decoded_token"), tokenizer)
        row = sorted(((float(entry["logprob"]), token) for token, entry in entries.items()), reverse=True)[:k]
        if len(row) < k:
            raise UserError("loss.top_k", k, f"is more than the {len(row)} tokens that the server returns", "lower it")
        total = sum(math.exp(logprob) for logprob, _ in row)
        if not 0 < total <= 1 + _SUM_TOLERANCE:
            raise ValueError(f"probabilities that add up to {total:.3f}")
        rows.append(row)
    tokens = torch.tensor([[token for _, token in row] for row in rows], dtype=torch.int32)
    return TopK(tokens, torch.tensor([[logprob for logprob, _ in row] for row in rows]))


def _check_token(token: int, served: str | None, tokenizer: Any) -> None:
    """Raise UserError if the server decodes a token of the text to another word than the student's tokenizer.

    Only words are compared, because servers write spaces and parts of characters in several ways.
    """
    word = tokenizer.decode([token]).strip()
    if served and word.isascii() and word.isalnum() and served.strip() != word:
        problem = f"is {served!r} at the server of the teacher and {word!r} in the student's tokenizer"
        raise UserError("token", token, problem, "choose a teacher of the same model family")
