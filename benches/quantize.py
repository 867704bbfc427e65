"""This project's GPTQ and QuantEase against llm-compressor's GPTQ, on the same calibration tokens.

    make bench-quantize

For each of three calibration seeds both sides quantize SmolLM2-135M to w4a16 (groups of 64, symmetric) and
to w8a8 (per channel, dynamic per token), alternating; llm-compressor 0.14.0.1 runs in an environment of its
own, which is made in the cache. Time and peak memory are those of the whole process. KL(dense || variant)
is on held-out tokens, half recommendation, half reasoning. Last line: one JSON object.
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
class _Side:
    """One quantization of the model: whose, to which format, by which method."""

    name: str
    format: str
    method: str = "gptq"
    is_peer: bool = False


_SIDES = (
    _Side("w4a16_ours", "w4a16"),
    _Side("w4a16_theirs", "w4a16", is_peer=True),
    _Side("w8a8_ours", "w8a8"),
    _Side("w8a8_theirs", "w8a8", is_peer=True),
    _Side("w4a16_quantease", "w4a16", method="quantease"),
)


def main() -> None:
    model = resolve_model(MODEL)
    peer = peer_python("llmcompressor")
    _warm_up(peer)
    heldout = packed_tokens(model, "quality", NUM_HELDOUT)
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(NUM_SEEDS):
            work = Path(folder) / str(seed)
            work.mkdir()
            tokens = work / "tokens.jsonl"
            write_tokens(packed_tokens(model, "calibration", NUM_SAMPLES, seed=seed, length=SEQUENCE_LENGTH), tokens)
            measured = {}
            for side in _SIDES if seed % 2 == 0 else reversed(_SIDES):
                measured[side.name] = _run(side, model, peer, tokens, work)
                took = measured[side.name]
                print_status(
                    f"seed {seed} {side.name}: {took['s']:.1f} s (core {took['core_s']:.1f} s), "
                    f"peak {took['rss_gib']:.2f} GiB"
                )
            print_status(f"seed {seed}: KL to the dense model on {NUM_HELDOUT} x {SEQUENCE_LENGTH} held-out tokens …")
            found = divergences(model, [work / side.name for side in _SIDES], heldout)
            for side, divergence in zip(_SIDES, found, strict=True):
                measured[side.name]["kl"] = divergence
                print_status(f"seed {seed} {side.name}: KL {divergence:.5f}")
            _collect(figures, measured)
    _print_table(figures)
    print(bench_line("quantize", figures))


def _warm_up(peer: Path) -> None:
    """Read both sides' code from disk once, so that the first measured process does not wait for it."""
    print_status("warming up both sides' imports …")
    ours = [sys.executable, "-c", "import slimserve, slimserve.compress.build, transformers"]
    theirs = [str(peer), "-c", "import llmcompressor.modifiers.gptq, transformers, datasets"]
    for command in (ours, theirs):
        subprocess.run(command, env=peer_variables(NUM_THREADS), check=True, capture_output=True)


def _run(side: _Side, model: Path, peer: Path, tokens: Path, work: Path) -> dict[str, float]:
    output, log, variables = work / side.name, work / f"{side.name}.log", peer_variables(NUM_THREADS)
    if side.is_peer:
        arguments = [str(model), str(tokens), str(output), side.format, str(GROUP_SIZE)]
        taken = measure([str(peer), str(_PEER_SCRIPT), *arguments], log, variables)
        return _described(taken, json.loads(taken.last_line)["core_s"])
    recipe = work / f"{side.name}.toml"
    recipe.write_text(_recipe(side, tokens), encoding="utf-8")
    command = [*_SLIMSERVE, "compress", str(model), "--recipe", str(recipe), "-o", str(output)]
    taken = measure(command, log, variables)
    manifest = read_manifest(output)
    assert manifest is not None
    return _described(taken, manifest.build_s)


def _recipe(side: _Side, tokens: Path) -> str:
    group_size = f"group_size = {GROUP_SIZE}\nsymmetric = true\n" if side.format == "w4a16" else ""
    return (
        f'summary = "{side.format} by {side.method}, for bench-quantize"\n'
        f'[calibration]\nsource = "{tokens}"\nnum_samples = {NUM_SAMPLES}\nsequence_length = {SEQUENCE_LENGTH}\n'
        f'[[steps]]\nstep = "quantize"\nformat = "{side.format}"\nmethod = "{side.method}"\n{group_size}'
    )


def _described(taken: Measured, core_s: float) -> dict[str, float]:
    return {"s": taken.wall_s, "core_s": core_s, "rss_gib": taken.peak_rss_gib}


def _collect(figures: dict[str, list[float]], measured: dict[str, dict[str, float]]) -> None:
    """Add one seed's absolute figures, and the ratios of the sides within the seed."""
    values = {f"{name}_{figure}": value for name, taken in measured.items() for figure, value in taken.items()}
    for form in ("w4a16", "w8a8"):
        values[f"{form}_speedup"] = values[f"{form}_theirs_s"] / values[f"{form}_ours_s"]
        values[f"{form}_rss_ratio"] = values[f"{form}_ours_rss_gib"] / values[f"{form}_theirs_rss_gib"]
        values[f"{form}_kl_ratio"] = values[f"{form}_ours_kl"] / values[f"{form}_theirs_kl"]
    values["w4a16_quantease_kl_ratio"] = values["w4a16_quantease_kl"] / values["w4a16_theirs_kl"]
    for name, value in values.items():
        figures.setdefault(name, []).append(value)


def _print_table(figures: dict[str, list[float]]) -> None:
    table = Table("", "seconds", "of these core", "peak GiB", "KL", title=f"Each of {NUM_SEEDS} seeds")
    for side in _SIDES:
        columns = [figures[f"{side.name}_{figure}"] for figure in ("s", "core_s", "rss_gib", "kl")]
        shown = [
            "  ".join(f"{value:.{digits}f}" for value in column)
            for column, digits in zip(columns, (1, 1, 2, 5), strict=True)
        ]
        table.add_row(side.name, *shown)
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
