"""Loads students and teachers as torch modules, and checks that they fit each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimserve.core.errors import UserError
from slimserve.core.generation import repair_generation_config
from slimserve.core.model_config import read_decoder_config
from slimserve.distill.item_embedding import item_embedding_of

_PROBE_TOKENS = 8
_HEAD_TOLERANCE = 1e-3


def load_model(directory: Path, dtype: torch.dtype) -> nn.Module:
    """Load a dense decoder in `dtype`.

    Raises UserError if the model is quantized or cannot be loaded, or if its output layer is not a plain product.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if "quantization_config" in read_decoder_config(directory):
        raise UserError("model", directory, "is quantized and cannot be trained", "give the unquantized model")
    logging.disable_progress_bar()
    try:
        model: nn.Module
        model, loading = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    except Exception as error:  # transformers passes on any exception that a broken file causes
        raise UserError(
            "model", directory, f"cannot be loaded ({error})", "check its files with slimserve check"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would start them at random
        raise UserError(
            "weights", missing[0], f"is missing from {directory}", "restore the weights, or check config.json"
        )
    _check_head(model, directory)
    return model


def with_lora(student: nn.Module, rank: int, seed: int) -> nn.Module:
    """Return the student with trainable adapters on every linear layer of its blocks.

    Its own weights are frozen, except for the rows of items.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped: nn.Module = get_peft_model(student, config)
    if embedding := item_embedding_of(wrapped):
        for parameter in embedding.item_parameters():
            parameter.requires_grad_(True)
    return wrapped


def check_same_tokens(teacher: Any, student: Any, teacher_name: object) -> None:
    """Raise UserError unless both tokenizers give every token the same id."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differing = next((token for token in (*ours, *theirs) if ours.get(token) != theirs.get(token)), None)
    if differing is not None:
        raise UserError(
            "teacher",
            teacher_name,
            f"has another tokenizer than the student: {differing!r} has id {theirs.get(differing)} in the teacher and "
            f"{ours.get(differing)} in the student",
            "choose a teacher of the same model family",
        )


def stop_tokens(directory: Path, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a reply: the tokenizer's and those of generation_config.json."""
    ids = {tokenizer.eos_token_id}
    configured = repair_generation_config(directory)[0].get("eos_token_id")
    ids |= set(configured) if isinstance(configured, list) else {configured}
    return frozenset(ids - {None})


def head_of(model: Any) -> Tensor:
    """Return the weight of the output layer, `[V, D]`."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight


@torch.no_grad()
def _check_head(model: Any, directory: Path) -> None:
    """Raise UserError unless the logits are the product of hidden states and output layer, as the loss assumes."""
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
            f"({type(model).__name__}) scales, caps or biases its logits, which distillation does not support",
            "choose a model with a plain output layer",
        )
