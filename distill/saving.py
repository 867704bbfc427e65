"""Writes a student's directory: weights, config, adapter, tokenizer, chat template, and the catalogue of its items."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from slimserve.core.catalogue import read_catalogue
from slimserve.core.errors import UserError
from slimserve.core.model_config import GENERATION_FILE
from slimserve.core.model_files import copy_companions
from slimserve.distill.item_checkpoint import grow_vocabulary, reset_item_outputs
from slimserve.distill.item_embedding import item_embedding_of
from slimserve.distill.items import ItemTask, write_items

ADAPTER_FOLDER = "adapter"
"""Folder in the student's directory with the LoRA adapter, which is merged into the student's weights."""


def check_saving(student: Any, directory: Path) -> None:
    """Save the student without its weights, so that what transformers refuses to save is known before the training."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            _save_pretrained(student, Path(folder), state_dict={})
    except Exception as error:  # transformers checks all settings, with many types
        problem = f"could not be saved after the training ({error})"
        raise UserError("student", directory, problem, "correct its config.json or generation_config.json") from error


def save_student(student: Any, directory: Path, output: Path, items: ItemTask | None) -> None:
    """Write the student that began as the model in `directory`, as bfloat16 in the Hugging Face layout.

    Tokenizer and chat template are copied; a student that learned items gets their tokens and its catalogue.
    """
    if hasattr(student, "merge_and_unload"):
        _save_adapter(student, output / ADAPTER_FOLDER)
        student = student.merge_and_unload()
    embedding = item_embedding_of(student)
    # Rows and encoder are taken before the student loses precision.
    learned = (embedding.all_rows().cpu(), embedding.encoder()) if embedding else None
    student = student.to(torch.bfloat16)
    if items and learned:
        num_used = len(items.texts) * items.catalogue.tokens_per_item
        grow_vocabulary(student, learned[0][:num_used], items.catalogue.first_token, items.catalogue.num_tokens)
    elif catalogue := read_catalogue(directory):
        reset_item_outputs(student, catalogue.first_token)
    try:
        _save_pretrained(student, output)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        problem = f"could not be saved ({error})"
        raise UserError("student", directory, problem, "report this; the training is kept") from error
    copy_companions(directory, output)
    if items and learned:
        write_items(output, items, learned[1])


def _save_adapter(student: Any, folder: Path) -> None:
    """Write the LoRA adapter in bfloat16 in the layout of peft, without the path of the model it was trained on."""
    student.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    settings = folder / "adapter_config.json"
    config = json.loads(settings.read_text(encoding="utf-8")) | {"base_model_name_or_path": None}
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_pretrained(student: Any, output: Path, **options: Any) -> None:
    """Save config and weights; the generation settings are copied from the student's directory instead."""
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    settings, student.generation_config = student.generation_config, GenerationConfig()
    try:
        student.save_pretrained(output, **options)
    finally:
        student.generation_config = settings
    (output / GENERATION_FILE).unlink(missing_ok=True)
