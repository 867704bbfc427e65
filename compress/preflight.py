"""Checks everything that building, loading and serving a variant will need, before the first expensive step.

A model can be read for an hour and only then turn out to have no output layer, so all of this comes first: the config
against the tensors, finite weights, one block of the forward pass, tokenizer, chat template, generation settings, disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from slimserve.compress.checkpoint import CheckpointReader, iterate_blocks, open_dense
from slimserve.compress.decoder import Decoder, decoder_of
from slimserve.compress.families import with_sizes
from slimserve.core.errors import UserError
from slimserve.core.generation import repair_generation_config
from slimserve.core.model_config import CONFIG_FILE, size_of
from slimserve.core.model_files import TensorHeader, read_tensors
from slimserve.core.tokenizer import check_tokenizer

_FLOATS = {"F16", "BF16", "F32", "F64"}
_WHOLE_OR_NULL = ("sliding_window", "max_window_layers")
"""Keys that transformers passes on without a check for model types that do not define them."""
_PROBE_TOKENS = 4
_NUM_NAMED = 3


def check_model(directory: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Check the dense model in `directory`, whose config states all sizes; yield lines about what is repaired.

    Raises UserError for the first thing that would make the build, transformers or vLLM fail, or compute another model.
    """
    _check_architecture(directory, config)
    if "quantization_config" not in config:
        yield from _check_tensors(directory, config)
        _check_values(directory, config)
    yield from check_tokenizer(directory, config["vocab_size"])
    _, repairs = repair_generation_config(directory)
    yield from repairs


def _check_architecture(directory: Path, config: Mapping[str, Any]) -> None:
    """Raise UserError if vLLM would not take the model for one that generates text, or transformers not build it."""
    architectures, file = config.get("architectures") or [], directory / CONFIG_FILE
    if not isinstance(architectures, list) or not all(str(one).endswith("ForCausalLM") for one in architectures):
        raise UserError(
            CONFIG_FILE,
            file,
            f"has the architectures {architectures}, so vLLM would not load it as a model that generates text",
            "give a model whose architecture ends with ForCausalLM",
        )
    for key in _WHOLE_OR_NULL:
        if not (config.get(key) is None or type(config[key]) is int):
            raise UserError(
                CONFIG_FILE,
                file,
                f"has {key} {json.dumps(config[key])[:60]}, which is neither a whole number nor null",
                "write the value of the original model",
            )


def _check_tensors(directory: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Compare names, shapes and dtypes of the tensors with the config; yield a line about those that are not read."""
    decoder = decoder_of(config)
    stored = read_tensors(directory)
    tensors = {decoder.module_name(name): header for name, header in stored.items()}
    blocks, _, rest = decoder.block.partition("{index}")
    present = {name.removeprefix(blocks).partition(rest)[0] for name in tensors if name.startswith(blocks)}
    numbers = range(config["num_hidden_layers"])
    lost = next((index for index in numbers if present and str(index) not in present), None)
    if lost is not None:
        problem, remedy = "is missing from the checkpoint", "check num_hidden_layers in config.json"
        raise UserError("weights", decoder.block.format(index=lost), problem, remedy)
    for name, sizes in decoder.shapes.items():
        if name not in tensors:
            raise _missing(decoder.stored_name(name), stored, directory, decoder)
        header = tensors[name]
        if header.dtype not in _FLOATS:
            raise UserError(
                "weights",
                name,
                f"has the dtype {header.dtype}, although config.json describes no quantization",
                "give the dense model, or restore its config.json",
            )
        if header.shape != sizes:
            problem = f"has the shape {header.shape} in the file"
            if len(header.shape) == len(sizes):
                size, found = next(pair for pair in zip(sizes, header.shape, strict=True) if pair[0] != pair[1])
                keys = _keys_of(size, config)
                problem = f"has {found} instead of {size}, the size by {keys} in config.json ({problem})"
            raise UserError("weights", name, problem, "correct config.json, or use the weights that belong to it")
    yield from _check_spare(tensors, decoder, directory)


def _missing(name: str, tensors: Collection[str], directory: Path, decoder: Decoder) -> UserError:
    """Return the error for a missing tensor, with its likely cause."""
    prefix = next((one.removesuffix(name) for one in tensors if one.endswith(name)), None)
    if prefix:
        problem = f"is called {prefix + name}: the names begin with {prefix!r}, so no loader finds the tensors"
        remedy = f"remove {prefix!r} from the names, or save the model without the wrapper around it"
        return UserError("weights", name, problem, remedy)
    first, _, rest = name.partition(".")
    if rest in tensors:
        problem = (
            f"is called {rest}: the names lack the prefix '{first}.', because the model was saved without its head"
        )
        remedy = (
            'run: python -c "from transformers import AutoModelForCausalLM as M; '
            f'M.from_pretrained({str(directory)!r}).save_pretrained({f"{directory}-fixed"!r})" and copy the tokenizer'
        )
        return UserError("weights", name, problem, remedy)
    if name == decoder.stored_name(decoder.head):
        problem = "is missing, and config.json does not set tie_word_embeddings"
        remedy = "set tie_word_embeddings to true if the output layer is the embedding, or restore the weights"
        return UserError("weights", name, problem, remedy)
    return UserError("weights", name, "is missing from the checkpoint", "download the model again, or check model_type")


def _check_spare(tensors: Mapping[str, TensorHeader], decoder: Decoder, directory: Path) -> Iterator[str]:
    """Yield a line about tensors that loaders do not read; UserError if a tied model has an output layer of its own."""
    spare = [name for name in tensors if name not in decoder.shapes]
    if decoder.head in spare:
        # vLLM would use the embedding and transformers the stored layer, so a difference makes two models.
        reader = CheckpointReader(directory, rename=decoder.module_name)
        if tensors[decoder.head].shape != tensors[decoder.embedding].shape or not torch.equal(
            reader.read(decoder.head), reader.read(decoder.embedding)
        ):
            raise UserError(
                CONFIG_FILE,
                directory / CONFIG_FILE,
                f"has tie_word_embeddings true, but {decoder.head} differs from {decoder.embedding}",
                f"set tie_word_embeddings to false, or delete {decoder.head} from the weights",
            )
        spare.remove(decoder.head)
    if spare:
        shown = ", ".join(spare[:_NUM_NAMED]) + (", …" if len(spare) > _NUM_NAMED else "")
        yield f"{directory}: {len(spare)} tensors that config.json does not describe are left out: {shown}"


def _keys_of(size: int, config: Mapping[str, Any]) -> str:
    """Return the keys of the config that state a size."""
    sized = with_sizes(config)
    head_dim = sized["head_dim"]
    for heads in ("num_attention_heads", "num_key_value_heads"):
        sized[f"{heads} and head_dim"] = (size_of(config, heads) or 0) * head_dim
    usual = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads and head_dim")
    keys = [key for key in (*usual, "num_key_value_heads and head_dim", *sized) if sized.get(key) == size]
    return keys[0] if keys else "several keys"


@torch.no_grad()
def _check_values(directory: Path, config: Mapping[str, Any]) -> None:
    """Read every tensor once, and compute the first block; UserError if a value is not finite."""
    decoder = decoder_of(config)
    reader = open_dense(directory, config)
    for name in reader.names:
        reader.read(name)
    outer = {name: reader.read(name) for name in decoder.outer_names if name in reader.names}
    _, block = next(iterate_blocks(reader, decoder.block, 1))
    try:
        tokens_1T = torch.arange(_PROBE_TOKENS)[None]
        problem = "NaN or infinity"
        states = decoder.run(0, block, decoder.embed(outer, tokens_1T))
        is_sound = states is not None and bool(torch.isfinite(states).all())
    except (ValueError, KeyError, TypeError, RuntimeError, ArithmeticError) as error:
        problem, is_sound = f"{type(error).__name__}: {error}", False
    if not is_sound:
        raise UserError(
            CONFIG_FILE,
            directory / CONFIG_FILE,
            f"does not let the first block be computed ({problem})",
            "check the rope settings, rms_norm_eps and the sizes against the original model",
        )


def needed_bytes(directory: Path, planned: Mapping[str, Any], num_steps: int, bits: int | None) -> float:
    """Return bytes that a build certainly writes: the variant and, if it has steps, its blocks before that.

    `planned` states the sizes of the variant, `bits` those of a quantized weight.
    """
    stored = read_tensors(directory).values()
    total = sum(header.num_elements for header in stored)
    bytes_each = sum(header.num_elements * _width(header) for header in stored) / max(total, 1)
    if not num_steps:
        return total * bytes_each
    decoder = decoder_of(planned)
    sizes = {name: math.prod(shape) for name, shape in decoder.shapes.items()}
    inside = sum(size for name, size in sizes.items() if name.startswith(f"{decoder.layers_path}."))
    outside = sum(sizes.values()) - inside
    return 2 * inside * (bits / 8 if bits else bytes_each) + outside * bytes_each


def _width(header: TensorHeader) -> int:
    return {"F64": 8, "F32": 4}.get(header.dtype, 1 if header.dtype in {"I8", "U8", "F8_E4M3", "F8_E5M2"} else 2)
