"""Describes a variant for people: steps, sizes, error per layer, kernel on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from slimserve.compress.kernels import explain_variant
from slimserve.core.errors import UserError
from slimserve.core.hardware import probe_hardware
from slimserve.core.model_config import read_config
from slimserve.core.variant import Manifest, disk_bytes, read_manifest

_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
"""Palette of Okabe and Ito, distinguishable for color-blind readers."""


def describe_variant(directory: Path) -> Iterator[str]:
    """Yield lines for a terminal. Raises UserError if the directory has no manifest."""
    manifest = _manifest(directory)
    yield f"{manifest.name}: {manifest.base.model} by recipe {manifest.recipe}"
    yield (
        f"{manifest.num_parameters / 1e6:.1f}M parameters, {disk_bytes(directory) / 2**20:.0f} MiB on disk, built in "
        f"{manifest.build_s:.0f} s with {(manifest.peak_rss_bytes or 0) / 2**30:.1f} GiB peak memory"
    )
    if manifest.calibration_sha256:
        data = manifest.calibration
        yield (
            f"calibrated on {data['num_sequences']} sequences of {data['sequence_length']} tokens "
            f"({data['source']}, seed {data['seed']}, sha256 {manifest.calibration_sha256[:12]})"
        )
    for step in manifest.steps:
        facts = ", ".join(
            f"{key.replace('_', ' ')} {value}"
            for key, value in step.detail.items()
            if key != "per_block" and value not in (None, [], "")
        )
        yield f"  {step.name:12} {step.seconds:7.1f} s  {facts}"
    errors = layer_errors(manifest)
    if errors:
        yield "relative output error of each layer, median and worst block:"
    for layer, values in errors.items():
        worst = max(range(len(values)), key=values.__getitem__)
        yield f"  {layer:20} {sorted(values)[len(values) // 2]:.4f}   {values[worst]:.4f} in block {worst}"
    yield from explain_variant(probe_hardware(), read_config(directory))


def plot_errors(directory: Path, file: Path) -> None:
    """Plot the error of each layer over the blocks, as PNG or SVG depending on the suffix of `file`.

    Raises UserError for another suffix, and if no step of the variant measured an error.
    """
    if file.suffix not in {".png", ".svg"}:
        raise UserError("plot", file, "is neither .png nor .svg", "give a file name with one of these suffixes")
    manifest = _manifest(directory)
    errors = layer_errors(manifest)
    if not errors:
        raise UserError(
            "plot", directory, "has no errors per layer", "use a variant that was quantized, or pruned with data"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    markers = "osv^D*x"
    for number, (layer, values) in enumerate(errors.items()):
        style = number % len(_COLORS)
        axes.plot(values, color=_COLORS[style], marker=markers[style], markersize=4, linewidth=1.2, label=layer)
    axes.set(xlabel="decoder block", ylabel="relative output error", title=manifest.name, yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(file, dpi=140)


def layer_errors(manifest: Manifest) -> dict[str, Sequence[float]]:
    """Return the relative output error of every block, by layer; pruned layers have a suffix in their name."""
    errors: dict[str, list[float]] = {}
    rounds = [step for step in manifest.steps if step.name == "prune"]
    for step in manifest.steps:
        suffix = ""
        if step.name == "prune":
            suffix = " pruned" if len(rounds) == 1 else f" pruned, round {rounds.index(step) + 1}"
        for block in step.detail.get("per_block", []):
            for layer, value in _errors_of_block(block):
                errors.setdefault(f"{layer}{suffix}", []).append(value)
    return dict(errors)


def _errors_of_block(block: dict[str, Any]) -> Iterator[tuple[str, float]]:
    yield from block.get("output_error", {}).items()
    for layer, detail in block.items():
        if isinstance(detail, dict) and "relative_output_error" in detail:
            # Pruning records squared norms, quantization their root.
            yield layer, float(detail["relative_output_error"]) ** 0.5


def _manifest(directory: Path) -> Manifest:
    manifest = read_manifest(directory)
    if manifest is None:
        raise UserError(
            "variant", directory, "has no slimserve.json", "give a directory that `slimserve compress` wrote"
        )
    return manifest
