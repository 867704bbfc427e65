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
from slimserve.compress.families import LayerRoles, expected_tensors
from slimserve.compress.forward import Decoder, dense_linear
from slimserve.core.errors import UserError
from slimserve.core.generation import repair_generation_config
from slimserve.core.model_config import CONFIG_FILE
from slimserve.core.model_files import TensorHeader, read_tensors
from slimserve.core.tokenizer import check_tokenizer

_FLOATS = {"F16", "BF16", "F32", "F64"}
_WHOLE_OR_NULL = ("sliding_window", "max_window_layers")
"""Keys that transformers passes on without a check for model types that do not define them."""
_PROBE_TOKENS = 4
_NUM_NAMED = 3


def check_model(directory: Path, config: Mapping[str, Any], roles: LayerRoles) -> Iterator[str]:
    """Check the dense model in `directory`, whose config states all sizes; yield lines about what is repaired.

    Raises UserError for the first thing that would make the build, transformers or vLLM fail, or compute another model.
    """
    _check_architecture(directory, config)
    if "quantization_config" not in config:
        yield from _check_tensors(directory, config, roles)
        _check_values(directory, config, roles)
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
    if "text_config" in config:
        raise UserError(
            CONFIG_FILE, file, "has a text_config, as models of several media have", "give the text model alone"
        )
    for key in _WHOLE_OR_NULL:
        if not (config.get(key) is None or type(config[key]) is int):
            raise UserError(
                CONFIG_FILE,
                file,
                f"has {key} {json.dumps(config[key])[:60]}, which is neither a whole number nor null",
                "write the value of the original model",
            )


def _check_tensors(directory: Path, config: Mapping[str, Any], roles: LayerRoles) -> Iterator[str]:
    """Compare names, shapes and dtypes of the tensors with the config; yield a line about those that are not read."""
    tensors = read_tensors(directory)
    blocks, _, rest = roles.block.partition("{index}")
    present = {name.removeprefix(blocks).partition(rest)[0] for name in tensors if name.startswith(blocks)}
    numbers = range(config["num_hidden_layers"])
    lost = next((index for index in numbers if present and str(index) not in present), None)
    if lost is not None:
        problem, remedy = "is missing from the checkpoint", "check num_hidden_layers in config.json"
        raise UserError("weights", roles.block.format(index=lost), problem, remedy)
    expected = expected_tensors(config, roles)
    for name, dimensions in expected.items():
        if name not in tensors:
            raise _missing(name, tensors, directory, roles)
        header = tensors[name]
        if header.dtype not in _FLOATS:
            raise UserError(
                "weights",
                name,
                f"has the dtype {header.dtype}, although config.json describes no quantization",
                "give the dense model, or restore its config.json",
            )
        sizes = tuple(size for _, size in dimensions)
        if header.shape != sizes:
            problem = f"has the shape {header.shape} in the file"
            if len(header.shape) == len(sizes):
                keys, size, found = next(
                    (keys, size, found)
                    for (keys, size), found in zip(dimensions, header.shape, strict=True)
                    if size != found
                )
                problem = f"has {found} instead of {size}, the size by {keys} in config.json ({problem})"
            raise UserError("weights", name, problem, "correct config.json, or use the weights that belong to it")
    yield from _check_spare(tensors, expected, roles, directory)


def _missing(name: str, tensors: Collection[str], directory: Path, roles: LayerRoles) -> UserError:
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
    if name == roles.head:
        problem = "is missing, and config.json does not set tie_word_embeddings"
        remedy = "set tie_word_embeddings to true if the output layer is the embedding, or restore the weights"
        return UserError("weights", name, problem, remedy)
    return UserError("weights", name, "is missing from the checkpoint", "download the model again, or check model_type")


def _check_spare(
    tensors: Mapping[str, TensorHeader],
    expected: Collection[str],
    roles: LayerRoles,
    directory: Path,
) -> Iterator[str]:
    """Yield a line about tensors that loaders do not read; UserError if a tied model has an output layer of its own."""
    spare = [name for name in tensors if name not in expected]
    if roles.head in spare:
        # vLLM would use the embedding and transformers the stored layer, so a difference makes two models.
        reader = CheckpointReader(directory)
        if tensors[roles.head].shape != tensors[roles.embedding].shape or not torch.equal(
            reader.read(roles.head), reader.read(roles.embedding)
        ):
            raise UserError(
                CONFIG_FILE,
                directory / CONFIG_FILE,
                f"has tie_word_embeddings true, but {roles.head} differs from {roles.embedding}",
                f"set tie_word_embeddings to false, or delete {roles.head} from the weights",
            )
        spare.remove(roles.head)
    if spare:
        shown = ", ".join(spare[:_NUM_NAMED]) + (", …" if len(spare) > _NUM_NAMED else "")
        yield f"{directory}: {len(spare)} tensors that config.json does not describe are left out: {shown}"


@torch.inference_mode()
def _check_values(directory: Path, config: Mapping[str, Any], roles: LayerRoles) -> None:
    """Read every tensor once, and compute the first block; UserError if a value is not finite."""
    reader = open_dense(directory, config, roles)
    for name in reader.names:
        reader.read(name)
    states = reader.read(roles.embedding)[:_PROBE_TOKENS].float()[None]
    _, block = next(iterate_blocks(reader, roles.block, 1))
    try:
        decoder = Decoder(config, roles, _PROBE_TOKENS, torch.float32)
        problem = "NaN or infinity"
        is_sound = bool(torch.isfinite(decoder.block(block, dense_linear(block), states)).all())
    except (ValueError, KeyError, TypeError, RuntimeError, ArithmeticError) as error:
        problem, is_sound = f"{type(error).__name__}: {error}", False
    if not is_sound:
        raise UserError(
            CONFIG_FILE,
            directory / CONFIG_FILE,
            f"does not let the first block be computed ({problem})",
            "check the rope settings, rms_norm_eps and the sizes against the original model",
        )


def needed_bytes(
    directory: Path, planned: Mapping[str, Any], roles: LayerRoles, num_steps: int, bits: int | None
) -> float:
    """Return bytes that a build certainly writes: the variant and, if it has steps, its blocks before that.

    `planned` states the sizes of the variant, `bits` those of a quantized weight.
    """
    stored = read_tensors(directory).values()
    total = sum(header.num_elements for header in stored)
    bytes_each = sum(header.num_elements * _width(header) for header in stored) / max(total, 1)
    if not num_steps:
        return total * bytes_each
    blocks = roles.block.partition("{index}")[0]
    expected = expected_tensors(planned, roles)
    sizes = {name: math.prod(size for _, size in dimensions) for name, dimensions in expected.items()}
    inside = sum(size for name, size in sizes.items() if name.startswith(blocks))
    outside = sum(sizes.values()) - inside
    return 2 * inside * (bits / 8 if bits else bytes_each) + outside * bytes_each


def _width(header: TensorHeader) -> int:
    return {"F64": 8, "F32": 4}.get(header.dtype, 1 if header.dtype in {"I8", "U8", "F8_E4M3", "F8_E5M2"} else 2)
