"""Loads tokenizers, whose files the model's author wrote and that may be broken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimserve.core.chat_template import render_chat
from slimserve.core.errors import UserError
from slimserve.core.model_config import read_decoder_config, read_json_object

_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a model. Raises UserError that names the file at fault."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # transformers passes on any exception that a broken file causes
        # transformers reads config.json first, so its fault may be there.
        read_decoder_config(directory)
        for file in filter(Path.is_file, (directory / name for name in _JSON_FILES)):
            read_json_object(file)
        problem = f"cannot be loaded ({type(error).__name__}: {error})"
        raise UserError("tokenizer", directory, problem, "restore its files from the original model") from error


def encode(tokenizer: Any, text: str, where: object) -> list[int]:
    """Return the token ids of a text; UserError names `where` if the text cannot be encoded, as half an emoji."""
    try:
        ids: list[int] = tokenizer(text)["input_ids"]
    except Exception as error:  # the tokenizer's own exceptions, such as a TypeError for a lone surrogate
        raise UserError(
            "text", where, f"cannot be tokenized ({type(error).__name__}: {error})", "correct it"
        ) from error
    return ids


def check_tokenizer(directory: Path, vocab_size: int) -> Iterator[str]:
    """Yield lines about tokens that the model cannot read.

    Raises UserError if the tokenizer does not load, or if its chat template cannot render a question.
    """
    tokenizer = load_tokenizer(directory)
    beyond = [token for token, number in tokenizer.get_vocab().items() if number >= vocab_size]
    if tokenizer.chat_template is not None:
        question = [{"role": "user", "content": "What is 2 + 3?"}]
        text = render_chat(tokenizer, question, f"a question to {directory}", add_generation_prompt=True)
        used = next((token for token in beyond if token in text), None)
        if used is not None:
            raise UserError(
                "chat template",
                directory,
                f"writes the token {used!r}, but the model's embedding has only {vocab_size} rows",
                "use the tokenizer that belongs to the weights",
            )
    if beyond:
        yield (
            f"{directory}: the tokenizer has {len(beyond)} tokens without a row in the embedding, such as "
            f"{beyond[0]!r}; text with them cannot be computed"
        )
