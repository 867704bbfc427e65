"""Build a variant: walk the checkpoint's blocks once, apply the recipe's steps, write whole or not at all."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from compress import formats, prune, quantize
from compress.checkpoint import CheckpointReader, CheckpointWriter, iterate_blocks
from compress.families import LayerRoles, roles_of
from compress.recipe import PruneMlp, Quantize, Recipe
from contracts.errors import UserError
from contracts.model import count_parameters, model_hash, model_name
from contracts.progress import progress, say
from contracts.storage import atomic_directory, cache_dir
from contracts.variant import MANIFEST_FILE, Manifest, Source, Step, disk_bytes, read_manifest, write_manifest

_BUILD_FORMAT = 1
"""Raise it when the same recipe starts to give other bytes, so that old builds are not reused."""

Block = dict[str, Tensor]
"""Tensors of one decoder block by their names relative to it."""


@dataclass
class _AppliedStep:
    """One step of a recipe, bound to a model: how it changes a block, and what it has to tell."""

    name: str
    on_block: Callable[[Block], Block]
    detail: dict[str, Any]
    seconds: float = field(default=0.0)


def build_variant(model: str, directory: Path, recipe_name: str, recipe: Recipe, target: Path | None) -> Path:
    """Compress the model in `directory` and return the variant's directory.

    `model` is the argument as the user gave it, kept in the manifest. Without `target` the
    variant goes to the cache, under a name that depends on the model's content and the
    resolved recipe, and an earlier build of the same is reused. Raises UserError where
    the model's family is unknown, a step does not fit its shapes, or `target` holds
    something else.
    """
    start = time.monotonic()
    base = _base_of(model, directory)
    resolved = recipe.model_dump(mode="json")
    identity = json.dumps([_BUILD_FORMAT, base.sha256, resolved["steps"]], sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    name = f"{model_name(model, directory)}-{recipe_name}"
    if target is None:
        target = cache_dir("variants") / f"{name}-{key}"
    if target.exists():
        return _reuse(target, base, resolved)

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise UserError("model", model, "is quantized already", "give the model that it was made from")
    roles = roles_of(config)
    reader = CheckpointReader(directory)
    steps = [_bind(step, config, roles) for step in recipe.steps]
    num_blocks = config["num_hidden_layers"]
    with atomic_directory(target) as output:
        writer = CheckpointWriter(output)
        in_blocks: set[str] = set()
        with progress(f"building {name}", num_blocks, "blocks") as tick:
            for index, (prefix, block) in enumerate(iterate_blocks(reader, roles.block, num_blocks)):
                in_blocks.update(prefix + layer for layer in block)
                for step in steps:
                    step_start = time.monotonic()
                    block = step.on_block(block)
                    step.seconds += time.monotonic() - step_start
                writer.add({prefix + layer: tensor for layer, tensor in block.items()})
                tick(index + 1, note=f"{_peak_rss_bytes() / 2**30:.1f} GiB")
        for tensor_name in reader.names:
            if tensor_name not in in_blocks:
                writer.add({tensor_name: reader.read(tensor_name)})
        writer.close()
        _copy_companions(directory, output)
        (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        done = [Step(name=step.name, seconds=step.seconds, detail=step.detail) for step in steps]
        in_steps = sum(step.seconds for step in steps)
        done.append(Step(name="read, hash and write", seconds=time.monotonic() - start - in_steps))
        manifest = Manifest(
            name=name,
            recipe=recipe_name,
            resolved_recipe=resolved,
            base=base,
            steps=done,
            num_parameters=count_parameters(output),
            peak_rss_bytes=_peak_rss_bytes(),
        )
        write_manifest(output, manifest)
    say(f"built {name}: {disk_bytes(target) / 2**20:.0f} MiB in {manifest.build_s:.1f} s at {target}")
    return target


def _base_of(model: str, directory: Path) -> Source:
    manifest = read_manifest(directory)
    note = manifest.base.note if manifest else ""
    return Source(model=model, sha256=model_hash(directory), note=note)


def _reuse(target: Path, base: Source, resolved: dict[str, Any]) -> Path:
    manifest = read_manifest(target) if target.is_dir() else None
    if manifest and manifest.base.sha256 == base.sha256 and manifest.resolved_recipe == resolved:
        say(f"variant {manifest.name}: reused, built earlier at {target}")
        return target
    raise UserError("output directory", target, "exists and holds something else", "name another, or delete it")


def _bind(step: PruneMlp | Quantize, config: dict[str, Any], roles: LayerRoles) -> _AppliedStep:
    """Check a step against the model and rewrite `config` to what the model will be after it."""
    if isinstance(step, PruneMlp):
        return _bind_prune(step, config, roles)
    return _bind_quantize(step, config, roles)


def _bind_prune(step: PruneMlp, config: dict[str, Any], roles: LayerRoles) -> _AppliedStep:
    width = config["intermediate_size"]
    num_kept = prune.kept_width(width, step.remove_frac, step.multiple)
    score = prune.NEURON_SCORES[step.method]
    removed_share: list[float] = []
    config["intermediate_size"] = num_kept
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])

    def on_block(block: Block) -> Block:
        scores_I = score(block[f"{roles.mlp_consumer}.weight"])
        kept_K = prune.choose_kept(scores_I, num_kept)
        removed_share.append(1 - float(scores_I[kept_K].sum() / scores_I.sum()))
        return prune.cut_mlp(block, roles, kept_K)

    detail = {
        "method": step.method,
        "neurons_before": width,
        "neurons_after": num_kept,
        "removed_score_share_per_block": removed_share,
    }
    return _AppliedStep(step.step, on_block, detail)


def _bind_quantize(step: Quantize, config: dict[str, Any], roles: LayerRoles) -> _AppliedStep:
    rounding = quantize.ROUNDINGS[step.method]
    num_bits = formats.FORMATS[step.format].num_bits
    errors: dict[str, list[float]] = {layer: [] for layer in roles.linears}
    config["quantization_config"] = formats.quantization_config(step.format, ignored_layers=["lm_head"])

    def on_block(block: Block) -> Block:
        packed = dict(block)
        for layer in roles.linears:
            weight_OI = packed.pop(f"{layer}.weight")
            quantized = rounding(weight_OI, num_bits)
            errors[layer].append(quantize.relative_error(weight_OI, quantized))
            packed.update({f"{layer}.{suffix}": tensor for suffix, tensor in formats.pack_layer(quantized).items()})
        return packed

    detail = {"format": step.format, "method": step.method, "relative_error_per_block": errors}
    return _AppliedStep(step.step, on_block, detail)


def _copy_companions(source: Path, output: Path) -> None:
    """Copy tokenizer, chat template and generation settings: all but weights, config and manifest."""
    for file in source.iterdir():
        weights = file.suffix in {".safetensors", ".bin", ".gguf", ".pt", ".pth"} or ".safetensors." in file.name
        if file.is_file() and not weights and file.name not in {"config.json", MANIFEST_FILE}:
            shutil.copyfile(file, output / file.name)


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
