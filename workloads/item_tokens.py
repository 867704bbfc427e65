"""Gives prompts the item tokens of a model that has a catalogue (core/catalogue.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from slimserve.core.catalogue import read_catalogue
from slimserve.workloads.interface import Prompt, ScoringPrompt


def item_tokens_of(directory: Path | None) -> Callable[[Prompt], Prompt]:
    """Return the function that writes a prompt as the model in `directory` reads it.

    Items whose ids are in the model's catalogue become item tokens. Without a catalogue no prompt changes.
    """
    catalogue = read_catalogue(directory) if directory is not None else None
    if catalogue is None:
        return lambda prompt: prompt
    texts = catalogue.texts
    return lambda prompt: prompt.with_texts(texts) if isinstance(prompt, ScoringPrompt) else prompt
