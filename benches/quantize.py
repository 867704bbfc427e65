"""Compare slimserve's GPTQ and QuantEase with llm-compressor's GPTQ on the same calibration tokens.

    make bench-quantize

With each of three calibration seeds, both tools quantize SmolLM2-135M in alternating order: to w4a16 (groups of 64,
symmetric) and to w8a8 (one scale per channel, dynamic per token). llm-compressor 0.14.0.1 runs in its own environment,
which is created in the cache. Time and peak memory are those of the complete process. KL(dense || variant) is measured
on held-out tokens, half from recommendation and half from reasoning. The last line is one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benches.heldout import packed_tokens, write_tokens
from benches.peers.environment import peer_python, peer_variables
from benches.peers.measure import Measured, measure
from slimserve.compress.reference import divergences
from slimserve.core.model import resolve_model
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.core.variant import read_manifest

MODEL = "smollm2-135m-instruct"
NUM_SEEDS = 3
NUM_SAMPLES, SEQUENCE_LENGTH = 32, 512
NUM_HELDOUT = 16
NUM_THREADS = 2
GROUP_SIZE = 64
_PEER_SCRIPT = Path(__file__).parent / "peers" / "llmcompressor_gptq.py"
_SLIMSERVE = (sys.executable, "-m", "slimserve")


@dataclass(frozen=True)
class _Run:
    """One quantization of the model: the tool, the format and the method."""

    name: str
    format: str
    method: str = "gptq"
    by_peer: bool = False


_RUNS = (
    _Run("w4a16_ours", "w4a16"),
    _Run("w4a16_theirs", "w4a16", by_peer=True),
    _Run("w8a8_ours", "w8a8"),
    _Run("w8a8_theirs", "w8a8", by_peer=True),
    _Run("w4a16_quantease", "w4a16", method="quantease"),
)


def main() -> None:
    model = resolve_model(MODEL)
    peer = peer_python("llmcompressor")
    _warm_up(peer)
    heldout = packed_tokens(model, "quality", NUM_HELDOUT)
    metrics: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(NUM_SEEDS):
            work = Path(folder) / str(seed)
            work.mkdir()
            tokens = work / "tokens.jsonl"
            write_tokens(packed_tokens(model, "calibration", NUM_SAMPLES, seed=seed, length=SEQUENCE_LENGTH), tokens)
            measured = {}
            for run in _RUNS if seed % 2 == 0 else reversed(_RUNS):
                measured[run.name] = _quantize(run, model, peer, tokens, work)
                usage = measured[run.name]
                print_status(
                    f"seed {seed} {run.name}: {usage['s']:.1f} s (core {usage['core_s']:.1f} s), "
                    f"peak {usage['rss_gib']:.2f} GiB"
                )
            print_status(f"seed {seed}: KL to the dense model on {NUM_HELDOUT} x {SEQUENCE_LENGTH} held-out tokens …")
            kl = divergences(model, [work / run.name for run in _RUNS], heldout)
            for run, divergence in zip(_RUNS, kl, strict=True):
                measured[run.name]["kl"] = divergence
                print_status(f"seed {seed} {run.name}: KL {divergence:.5f}")
            _collect(metrics, measured)
    _print_table(metrics)
    print(bench_line("quantize", metrics))


def _warm_up(peer: Path) -> None:
    """Import both tools once, so that the first measured process does not wait for the disk."""
    print_status("warming up the imports of both tools …")
    ours = [sys.executable, "-c", "import slimserve, slimserve.compress.build, transformers"]
    theirs = [str(peer), "-c", "import llmcompressor.modifiers.gptq, transformers, datasets"]
    for command in (ours, theirs):
        subprocess.run(command, env=peer_variables(NUM_THREADS), check=True, capture_output=True)


def _quantize(run: _Run, model: Path, peer: Path, tokens: Path, work: Path) -> dict[str, float]:
    output, log, variables = work / run.name, work / f"{run.name}.log", peer_variables(NUM_THREADS)
    if run.by_peer:
        arguments = [str(model), str(tokens), str(output), run.format, str(GROUP_SIZE)]
        usage = measure([str(peer), str(_PEER_SCRIPT), *arguments], log, variables)
        return _metrics_of(usage, json.loads(usage.last_line)["core_s"])
    recipe = work / f"{run.name}.toml"
    recipe.write_text(_recipe(run, tokens), encoding="utf-8")
    command = [*_SLIMSERVE, "compress", str(model), "--recipe", str(recipe), "-o", str(output)]
    usage = measure(command, log, variables)
    manifest = read_manifest(output)
    assert manifest is not None
    return _metrics_of(usage, manifest.build_s)


def _recipe(run: _Run, tokens: Path) -> str:
    group_size = f"group_size = {GROUP_SIZE}\nsymmetric = true\n" if run.format == "w4a16" else ""
    return (
        f'summary = "{run.format} by {run.method}, for bench-quantize"\n'
        f'[calibration]\nsource = "{tokens}"\nnum_samples = {NUM_SAMPLES}\nsequence_length = {SEQUENCE_LENGTH}\n'
        f'[[steps]]\nstep = "quantize"\nformat = "{run.format}"\nmethod = "{run.method}"\n{group_size}'
    )


def _metrics_of(usage: Measured, core_s: float) -> dict[str, float]:
    return {"s": usage.wall_s, "core_s": core_s, "rss_gib": usage.peak_rss_gib}


def _collect(metrics: dict[str, list[float]], measured: dict[str, dict[str, float]]) -> None:
    """Add one seed's measurements and the ratios between the tools within the seed."""
    values = {f"{name}_{metric}": value for name, usage in measured.items() for metric, value in usage.items()}
    for name in ("w4a16", "w8a8"):
        values[f"{name}_speedup"] = values[f"{name}_theirs_s"] / values[f"{name}_ours_s"]
        values[f"{name}_rss_ratio"] = values[f"{name}_ours_rss_gib"] / values[f"{name}_theirs_rss_gib"]
        values[f"{name}_kl_ratio"] = values[f"{name}_ours_kl"] / values[f"{name}_theirs_kl"]
    values["w4a16_quantease_kl_ratio"] = values["w4a16_quantease_kl"] / values["w4a16_theirs_kl"]
    for name, value in values.items():
        metrics.setdefault(name, []).append(value)


def _print_table(metrics: dict[str, list[float]]) -> None:
    table = Table("", "seconds", "of these compression", "peak GiB", "KL", title=f"Each of {NUM_SEEDS} seeds")
    for run in _RUNS:
        columns = [metrics[f"{run.name}_{metric}"] for metric in ("s", "core_s", "rss_gib", "kl")]
        shown = [
            "  ".join(f"{value:.{digits}f}" for value in column)
            for column, digits in zip(columns, (1, 1, 2, 5), strict=True)
        ]
        table.add_row(run.name, *shown)
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
