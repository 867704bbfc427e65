"""Compare the decoding speed of `slimserve`'s launch with vLLM's default launch and with llama.cpp.

    make bench-decode

Each round starts four servers in turn: stock (dense), ours dense, ours W8A8, and ours W8A8 with an INT8 output layer.
It then runs llama.cpp (`llama-cpp-python` in its own environment) with one stream and one thread per core. llama.cpp
reads the GGUF file from which the dense model was unpacked, so its Q4_1 weights have the same values. Ratios compare
results of the same round. Quality is the KL divergence from the dense model on held-out tokens, for both W8A8 variants.
The last line of output is one JSON object.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import tempfile
from pathlib import Path

from benches.heldout import packed_tokens
from benches.peers.environment import peer_python, peer_variables
from benches.served import MODEL, built, median, our_spec, served, stock_spec
from slimserve.compress.reference import divergences
from slimserve.core.hardware import probe_hardware
from slimserve.core.model import BUILTIN_MODELS, resolve_model
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.serve.launch.process import Engine

NUM_ROUNDS = 3
NUM_REPEATS = 3
OUTPUT_TOKENS = 128
NUM_HELD_OUT = 8
_LLAMACPP = Path(__file__).parent / "peers" / "llamacpp_decode.py"
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
"""Compiler flags that disable AMX, because llama-cpp-python 0.3.36 with AMX crashes on this model."""


def main() -> None:
    dense = resolve_model(MODEL)
    variants = {"dense": dense, "w8a8": built("w8a8"), "w8a8_int8head": built("w8a8", "quantize.head=int8")}
    llamacpp = peer_python("llama_cpp_python", build={"CFLAGS": _NO_AMX, "CXXFLAGS": _NO_AMX})
    sides = ["stock", *variants, "llamacpp"]
    metrics: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(NUM_ROUNDS):
            rates: dict[str, float] = {}
            for side in sides if number % 2 == 0 else reversed(sides):
                log = Path(folder) / f"{side}-{number}.log"
                if side == "llamacpp":
                    measured = {"decode1": _measure_llamacpp(llamacpp)}
                else:
                    spec = stock_spec(log) if side == "stock" else our_spec(log, variants[side], "decode")
                    with Engine(spec) as engine:
                        measured = asyncio.run(_measure(engine.spec.url))
                print_status(f"round {number + 1}/{NUM_ROUNDS} {side}: {measured}")
                for metric, value in measured.items():
                    rates[f"{side}_{metric}"] = value
                    metrics.setdefault(f"{side}_{metric}_tokens_per_s", []).append(value)
            for side in variants:
                for metric in ("decode1", "decode8"):
                    ratio = rates[f"{side}_{metric}"] / rates[f"stock_{metric}"]
                    metrics.setdefault(f"{side}_{metric}_ratio", []).append(ratio)
            best = max(rates[f"{side}_decode1"] for side in variants)
            metrics.setdefault("llamacpp_decode1_ratio", []).append(best / rates["llamacpp_decode1"])
    tokens = packed_tokens(dense, "quality", NUM_HELD_OUT)
    for side in ("w8a8", "w8a8_int8head"):
        metrics[f"{side}_kl"] = [divergences(dense, [variants[side]], tokens)[0]]
    print(bench_line("decode", metrics))


async def _measure(url: str) -> dict[str, float]:
    async with served(url) as server:
        return {
            f"decode{streams}": median([await server.decode_rate(streams, OUTPUT_TOKENS) for _ in range(NUM_REPEATS)])
            for streams in (1, 8)
        }


def _measure_llamacpp(python: Path) -> float:
    builtin = BUILTIN_MODELS[MODEL]
    package = importlib.util.find_spec(builtin.module)
    assert package is not None
    assert package.submodule_search_locations is not None
    gguf = Path(next(iter(package.submodule_search_locations))) / builtin.file
    threads = len(probe_hardware().cores)
    command = [str(python), str(_LLAMACPP), str(gguf), str(threads), str(OUTPUT_TOKENS), str(NUM_REPEATS)]
    process = subprocess.run(command, env=peer_variables(threads), capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"llama.cpp failed: {process.stderr[-500:]}")
    return float(json.loads(process.stdout.splitlines()[-1])["tokens_per_s"])


if __name__ == "__main__":
    main()
