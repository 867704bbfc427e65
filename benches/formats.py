"""Measure the KL divergence of every quantization format on SmolLM2-135M, by its dequantized reference, and the bytes.

    make bench-formats

Each shipped recipe that only quantizes is built, and so are W8A8 with an FP8 KV cache, and 4-bit weights with AWQ.
Inputs are rounded as engines round them, so formats that need a GPU are measured on any machine. KL(dense || variant)
is the mean over held-out tokens, half from recommendation and half from reasoning; `bytes` are those of the decoder
blocks' tensors. SmolLM2's 576 inputs are no multiple of 128, which two formats need: here their last group is shorter
(fp8-block), or all groups have 64 inputs (w4a8-fp8). Recipes refuse such a model. SAMPLES in the environment changes
the number of calibration sequences of 512 tokens (default 32), HELDOUT that of held-out sequences (default 8), and
FORMATS names some of the formats. The last line is one JSON object.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from benches.heldout import SEQUENCE_LENGTH, packed_tokens, write_tokens
from slimserve.compress.build import build_variant
from slimserve.compress.formats import register_format
from slimserve.compress.formats.fp8_block import FP8_BLOCK
from slimserve.compress.formats.interface import LayerSizes, QuantFormat
from slimserve.compress.formats.w4a8 import W4A8_FP8
from slimserve.compress.recipe import Quantize, list_recipes, load_recipe
from slimserve.compress.reference import divergences
from slimserve.core.model import resolve_model
from slimserve.core.model_files import weight_files
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.core.storage import cache_dir

MODEL = "smollm2-135m-instruct"
NUM_SAMPLES = int(os.environ.get("SAMPLES", "32"))
NUM_HELDOUT = int(os.environ.get("HELDOUT", "8"))


class _ShortBlocks(type(FP8_BLOCK)):  # type: ignore[misc]
    """fp8-block for any size, in the mathematics alone: no engine loads it."""

    name = "fp8-block-short"

    def check_layers(self, layers: Mapping[str, LayerSizes]) -> None:  # noqa: ARG002
        return


class _W4A8Fp8InGroups(type(W4A8_FP8)):  # type: ignore[misc]
    """w4a8-fp8 in groups of 64, in the mathematics alone: no engine loads it."""

    name = "w4a8-fp8-g64"
    group_size = 64


_STAND_INS: dict[str, QuantFormat] = {"fp8-block": _ShortBlocks(), "w4a8-fp8": _W4A8Fp8InGroups()}
"""Formats that are measured in place of those that cannot have SmolLM2's sizes."""


def main() -> None:
    for stand_in in _STAND_INS.values():
        register_format(stand_in)
    model = resolve_model(MODEL)
    heldout = packed_tokens(model, "quality", NUM_HELDOUT)
    cache = cache_dir("bench-formats")
    tokens = cache / f"tokens-{NUM_SAMPLES}.jsonl"
    write_tokens(packed_tokens(model, "calibration", NUM_SAMPLES, length=SEQUENCE_LENGTH), tokens)
    calibration = (
        f'calibration.source="{tokens}"',
        f"calibration.num_samples={NUM_SAMPLES}",
        f"calibration.sequence_length={SEQUENCE_LENGTH}",
    )
    variants: dict[str, Path] = {}
    metrics: dict[str, list[float]] = {"samples": [float(NUM_SAMPLES)]}
    for name, (recipe_name, changes) in _wanted().items():
        recipe = load_recipe(recipe_name, (*changes, *calibration))[1]
        variants[name] = build_variant(MODEL, model, name, recipe, cache / f"{name}-{NUM_SAMPLES}")
    print_status(f"KL to the dense model on {NUM_HELDOUT} x {SEQUENCE_LENGTH} held-out tokens …")
    for name, divergence in zip(variants, divergences(model, list(variants.values()), heldout), strict=True):
        tensors = [item for file in weight_files(variants[name]) for item in load_file(file).items()]
        size = sum(tensor.nbytes for key, tensor in tensors if ".layers." in key)
        metrics[f"{name}_kl"], metrics[f"{name}_mib"] = [divergence], [size / 2**20]
    table = Table("format", "KL (nats)", "MiB of the blocks", title=f"{NUM_SAMPLES} calibration sequences")
    for name in variants:
        table.add_row(name, f"{metrics[f'{name}_kl'][0]:.5f}", f"{metrics[f'{name}_mib'][0]:.1f}")
    Console(stderr=True).print(table)
    print(bench_line("formats", metrics))


def _wanted() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return recipe and changes by the name of each variant."""
    wanted: dict[str, tuple[str, tuple[str, ...]]] = {}
    for name in list_recipes():
        steps = load_recipe(name)[1].steps
        if len(steps) == 1 and isinstance(steps[0], Quantize):
            stand_in = _STAND_INS.get(steps[0].format)
            wanted[name] = (name, (f"quantize.format={stand_in.name}",) if stand_in else ())
    wanted["w8a8-kv-fp8"] = ("w8a8", ("quantize.kv_cache=fp8_e4m3",))
    wanted |= {f"{name}-awq": (name, ("quantize.awq=true",)) for name in ("w4a16", "nvfp4a16", "mxfp4a16")}
    names = os.environ.get("FORMATS")
    return {name: wanted[name] for name in names.split(",")} if names else wanted


if __name__ == "__main__":
    main()
