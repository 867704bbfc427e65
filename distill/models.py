"""Students and teachers as torch modules, and what must hold between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimserve.core.errors import UserError

_PROBE_TOKENS = 8
_HEAD_TOLERANCE = 1e-3


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model; UserError where its files cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # transformers raises whatever the tokenizer's files made it raise
        raise UserError("tokenizer", directory, f"cannot be loaded ({error})", "restore its files") from error


def load_model(directory: Path, dtype: torch.dtype) -> nn.Module:
    """A dense decoder in `dtype`; UserError where it is quantized, or its output layer is more than a product."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise UserError(
            "model", directory, "is quantized and cannot be trained", "give the model that it was made from"
        )
    logging.disable_progress_bar()
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    except Exception as error:  # transformers raises whatever the config or the weights made it raise
        raise UserError(
            "model", directory, f"cannot be loaded ({error})", "check its files with slimserve check"
        ) from error
    _check_head(model, directory)
    return model


def check_same_tokens(teacher: Any, student: Any, teacher_name: object) -> None:
    """UserError unless both tokenizers give the same number to the same token."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    differing = next((token for token, number in ours.items() if theirs.get(token) != number), None)
    differing = differing if differing is not None else next(token for token in theirs if token not in ours)
    raise UserError(
        "teacher",
        teacher_name,
        f"has another tokenizer than the student: {differing!r} is {theirs.get(differing)} there and "
        f"{ours.get(differing)} here",
        "choose a teacher of the same family",
    )


def stop_tokens(directory: Path, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a reply: those of generation_config.json, and the tokenizer's own."""
    found = {tokenizer.eos_token_id}
    file = directory / "generation_config.json"
    if file.is_file():
        told = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        found |= set(told) if isinstance(told, list) else {told}
    return frozenset(token for token in found if token is not None)


def head_of(model: Any) -> Tensor:
    """The output layer's weight `[V, D]`."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight


@torch.no_grad()
def _check_head(model: Any, directory: Path) -> None:
    """The loss multiplies hidden states with the output layer itself: a model that does more there would be wrong."""
    head = model.get_output_embeddings()
    is_plain = head is not None and getattr(head, "bias", None) is None
    if is_plain:
        tokens = torch.arange(_PROBE_TOKENS)[None]
        logits = model(tokens, use_cache=False).logits.float()
        hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        expected = (hidden @ head.weight.T).float()
        is_plain = bool((logits - expected).abs().max() <= _HEAD_TOLERANCE * expected.abs().max())
    if not is_plain:
        raise UserError(
            "model",
            directory,
            f"({type(model).__name__}) does more than multiply in its output layer",
            "models whose logits are scaled, capped or biased are not supported",
        )
