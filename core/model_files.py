"""The files of a model directory that count: weights by transformers' rule, companions by an explicit list.

A directory may hold more: an adapter, weights for other frameworks, Mistral's own layout, a training's state. Nothing
of it is part of the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slimserve.core.catalogue import CATALOGUE_FILE, ENCODER_FILE
from slimserve.core.errors import UserError
from slimserve.core.generation import write_generation_config
from slimserve.core.model_config import CONFIG_FILE, GENERATION_FILE, dtype_of, read_config
from slimserve.core.storage import atomic_directory, cache_dir, sha256_of_files

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.*.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model*",
    "tiktoken.model",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
)
"""Files of which a tokenizer needs at least one."""
_TOKENIZER_FILES = (
    *_TOKENIZERS,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
_CODE_FILES = ("configuration_*.py", "modeling_*.py", "tokenization_*.py")
_OTHER_COMPANIONS = ("LICENSE*", "NOTICE*", "USE_POLICY*", "slimserve_*.toml", CATALOGUE_FILE, ENCODER_FILE)
DOWNLOADED = (CONFIG_FILE, GENERATION_FILE, "model*.safetensors", INDEX_FILE, *_TOKENIZER_FILES, *_OTHER_COMPANIONS)
"""Patterns of the files that are downloaded from a hub."""
_DERIVED = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Tensors of old checkpoints that every loader computes from the config instead of reading them."""
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a checkpoint, without its values."""

    file: Path
    dtype: str
    """Name in safetensors, such as `BF16`, `F16`, `F32`, `I8`."""
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def weight_files(directory: Path) -> list[Path]:
    """Return the weight files that transformers reads: model.safetensors, or else the shards that the index names.

    Raises UserError that names what the directory holds instead, and the command that converts it.
    """
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    if not (directory / INDEX_FILE).is_file():
        raise _no_weights(directory)
    files = sorted(directory / name for name in set(_weight_map(directory).values()))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError("model", directory, f"has no {missing[0]}, which its index names", "download it again")
    return files


def read_tensors(directory: Path) -> dict[str, TensorHeader]:
    """Return the tensors of a model by name, without those that loaders derive from the config.

    If two shards hold a tensor of one name, the index decides. Raises UserError for a file that is incomplete.
    """
    files = weight_files(directory)
    assigned = {} if files[0].name == WEIGHTS_FILE else _weight_map(directory)
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        for name, header in _read_headers(file).items():
            if not _DERIVED.search(name) and (name not in tensors or assigned.get(name) == file.name):
                tensors[name] = header
    return tensors


def has_derived_tensors(directory: Path) -> bool:
    """Tell whether the files hold tensors that `read_tensors` leaves out."""
    return any(_DERIVED.search(name) for file in weight_files(directory) for name in _read_headers(file))


def count_parameters(directory: Path) -> int:
    """Count the elements of all weight tensors from the files' headers, without the scales of a quantized model."""
    tensors = read_tensors(directory)
    return sum(header.num_elements for name, header in tensors.items() if not name.endswith("_scale"))


def stored_dtype(directory: Path) -> str | None:
    """Return the dtype in which vLLM loads a model by default: the config's, or else that of the tensors.

    It is a name such as `float16`; None if the tensors have several dtypes or another one.
    """
    stated = dtype_of(read_config(directory))
    if stated is not None or not any(directory.glob("*.safetensors")):
        return stated
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    found = {names[header.dtype] for header in read_tensors(directory).values() if header.dtype in names}
    return found.pop() if len(found) == 1 else None


def has_tokenizer(directory: Path) -> bool:
    """Tell whether a directory has a file that describes a tokenizer."""
    return any(True for _ in _matching(directory, _TOKENIZERS))


def companion_files(directory: Path) -> list[Path]:
    """Return the files that a variant takes over: tokenizer, chat templates, generation settings, code, license."""
    patterns = (GENERATION_FILE, *_TOKENIZER_FILES, *_CODE_FILES, *_OTHER_COMPANIONS)
    return sorted(set(_matching(directory, patterns)))


def copy_companions(source: Path, output: Path) -> None:
    """Copy the companions of a model, folders included; generation settings that cannot be saved are repaired."""
    for file in companion_files(source):
        target = output / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        if file.name != GENERATION_FILE:
            shutil.copyfile(file, target)
    write_generation_config(source, output)


def model_hash(directory: Path) -> str:
    """Return the SHA-256 of config, tokenizer and weights, which is equal for directories that behave equally."""
    described = _matching(directory, (CONFIG_FILE, GENERATION_FILE, *_TOKENIZER_FILES))
    return sha256_of_files([*weight_files(directory), *sorted(set(described))])


def loadable_directory(directory: Path) -> Path:
    """Return a directory in which every loader finds the weight files that count and no others.

    vLLM reads every .safetensors file beside the model, and Mistral's own files first. If there are such files, the
    result is a folder of links in the cache, otherwise it is `directory`.
    """
    counted = {file.name for file in weight_files(directory)}
    ignored = {file.name for file in directory.glob("*.safetensors")} - counted
    if WEIGHTS_FILE in counted:
        ignored |= {file.name for file in directory.glob("*.safetensors.index.json")}
    else:
        ignored |= {file.name for file in directory.glob("*.safetensors.index.json") if file.name != INDEX_FILE}
    if not ignored:
        return directory
    source = directory.absolute()
    links = {file.name: file for file in source.iterdir() if file.name not in ignored}
    key = hashlib.sha256(str(source).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    view = cache_dir("models") / f"{source.name}-links-{key}"
    if not view.is_dir() or {file.name: file.readlink() for file in view.iterdir()} != links:
        with atomic_directory(view) as partial:
            for name, file in links.items():
                (partial / name).symlink_to(file)
    return view


def _matching(directory: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    return (file for pattern in patterns for file in directory.glob(pattern) if file.is_file())


def _weight_map(directory: Path) -> dict[str, str]:
    """Return the file name of each tensor from the index."""
    index = directory / INDEX_FILE
    try:
        document = json.loads(index.read_text(encoding="utf-8"))
        weight_map, _ = document["weight_map"], document["metadata"]
        names = set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError("weights index", index, f"cannot be read ({error!r})", "restore the file") from error
    odd = next((name for name in names if not isinstance(name, str) or Path(name).name != name), None)
    if odd is not None or not names:
        problem = "names no files" if odd is None else f"names {odd!r}, which is no file beside it"
        raise UserError("weights index", index, problem, "restore the file")
    return dict(weight_map)


def _read_headers(file: Path) -> dict[str, TensorHeader]:
    """Return the tensors of a safetensors file; UserError if the file is incomplete."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            slices = ((name, tensors.get_slice(name)) for name in tensors.keys())  # noqa: SIM118
            return {name: TensorHeader(file, one.get_dtype(), tuple(one.get_shape())) for name, one in slices}
    except (SafetensorError, OSError) as error:
        with file.open("rb") as opened:
            is_pointer = opened.read(len(_LFS_POINTER)) == _LFS_POINTER
        problem = "is a Git LFS pointer" if is_pointer else f"is corrupt or cut short ({error})"
        remedy = "run: git lfs pull" if is_pointer else "download or build the model again"
        raise UserError("weights file", file, problem, remedy) from error


def _no_weights(directory: Path) -> UserError:
    """Return the error for a directory without weights that can be read."""
    names = sorted(file.name for file in directory.iterdir() if file.is_file())

    def first(*patterns: str) -> str | None:
        return next((name for name in names if any(Path(name).match(pattern) for pattern in patterns)), None)

    def convert(library: str, loader: str, call: str, target: str) -> str:
        script = f"from {library} import {loader} as M; M.from_pretrained({str(directory)!r}){call}({target!r})"
        return f'run: python -c "{script}"'

    if found := first("pytorch_model*.bin", "pytorch_model.bin.index.json"):
        problem = f"has its weights in pickle files ({found}), which can run code when they are read"
        remedy = convert("transformers", "AutoModelForCausalLM", ".save_pretrained", str(directory))
    elif found := first("adapter_model.*", "adapter_config.json"):
        problem = f"is an adapter ({found}) and not a model"
        merged = f"{directory}-merged"
        remedy = (
            f"merge it, {convert('peft', 'AutoPeftModelForCausalLM', '.merge_and_unload().save_pretrained', merged)}"
        )
    elif found := next((name for name in names if _SHARD.fullmatch(name)), None):
        problem, remedy = f"has {found} but no {INDEX_FILE}", "download the index too"
    elif found := first("consolidated*"):
        problem = f"has weights in the layout of the model's authors only ({found})"
        remedy = "download the model.safetensors files of the Hugging Face layout"
    elif found := first("*.gguf"):
        problem, remedy = f"has a GGUF file only ({found})", f"give the path of the file: {directory / found}"
    elif found := first("*.safetensors"):
        problem = f"has no {WEIGHTS_FILE}; no loader looks for {found}"
        remedy = f"rename the file to {WEIGHTS_FILE} if it holds the whole model"
    else:
        found = first("*.msgpack", "*.h5", "*.onnx", "*.bin", "*.pt", "*.pth")
        problem = "has no .safetensors weights" + (f", only {found}" if found else "")
        remedy = "save the model with safetensors"
    return UserError("model", directory, problem, remedy)
