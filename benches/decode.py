"""Compare the decoding speed of `slimserve`'s launch with two launches of stock vLLM and with llama.cpp.

    make bench-decode

Six sides run in turn in each of three rounds, and the order changes every round:

- `stock`: the dense model with vLLM's defaults.
- `guide`: the dense model with what vLLM's own documentation for CPUs advises, and no code of `slimserve` (`guide_spec`
  in benches/served.py).
- `dense`, `w8a8`, `w8a8_int8head`: our server. The last one also has its output layer in INT8.
- `llamacpp`: `llama-bench`, llama.cpp's own compiled benchmark, with one stream and one thread per core. It reads the
  GGUF file from which the dense model was unpacked, so its Q4_1 weights have the same values.

Ratios compare results of the same round. `…_ratio` is relative to `stock`, and `…_over_guide_ratio` to `guide`;
`decode8_over_guide_ratio` is the dense model's. `llamacpp_decode1_ratio` and `llamacpp_prefill512_ratio` are our
fastest variant over llama.cpp. A server's result includes HTTP, sampling and a prompt of 32 tokens; llama-bench has
none of them. The goals:

| ratio | goal |
|---|---|
| `decode8_over_guide_ratio` | at least 1.15 |
| `w8a8_decode8_over_guide_ratio` | at least 1.6 |

Quality is the KL divergence from the dense model on held-out tokens, for both W8A8 variants. The last line of output is
one JSON object. The benchmark takes about 25 minutes on 2 cores; `--rounds N` runs N rounds instead of three, and
`--quick` one with few tokens and little calibration data.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benches.heldout import packed_tokens
from benches.peers.llama_bench import build_llama_bench, run_llama_bench
from benches.served import MODEL, QUICK_BUILD, built, chosen_sizes, guide_spec, median, our_spec, served, stock_spec
from slimserve.compress.reference import divergences
from slimserve.core.hardware import probe_hardware
from slimserve.core.model import builtin_file, resolve_model
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.serve.launch.process import Engine, EngineSpec

BASELINES = {"stock": "ratio", "guide": "over_guide_ratio"}
"""Launches of stock vLLM, and the end of the names of the ratios to each."""


@dataclass(frozen=True)
class Sizes:
    """Amount of measuring: rounds, measurements per round, tokens of each request, and held-out samples."""

    num_rounds: int
    num_repeats: int
    output_tokens: int
    prefill_tokens: int
    num_held_out: int
    build_settings: tuple[str, ...] = ()


FULL = Sizes(num_rounds=3, num_repeats=3, output_tokens=128, prefill_tokens=512, num_held_out=8)
QUICK = Sizes(
    num_rounds=1, num_repeats=1, output_tokens=8, prefill_tokens=512, num_held_out=1, build_settings=QUICK_BUILD
)


def main() -> None:
    sizes = chosen_sizes(FULL, QUICK)
    dense = resolve_model(MODEL)
    variants = {
        "dense": dense,
        "w8a8": built("w8a8", *sizes.build_settings),
        "w8a8_int8head": built("w8a8", "quantize.head=int8", *sizes.build_settings),
    }
    llama_bench = build_llama_bench()
    servers: dict[str, Callable[[Path], EngineSpec]] = {"stock": stock_spec, "guide": guide_spec}
    for name, directory in variants.items():
        servers[name] = partial(our_spec, directory=directory, profile="decode")
    sides = [*servers, "llamacpp"]
    metrics: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(sizes.num_rounds):
            rates: dict[str, dict[str, float]] = {}
            for side in sides if number % 2 == 0 else reversed(sides):
                if side == "llamacpp":
                    rates[side] = _measure_llamacpp(llama_bench, sizes)
                else:
                    with Engine(servers[side](Path(folder) / f"{side}-{number}.log")) as engine:
                        rates[side] = asyncio.run(_measure(engine.spec.url, sizes))
                print_status(f"round {number + 1}/{sizes.num_rounds} {side}: {rates[side]}")
                for metric, value in rates[side].items():
                    metrics.setdefault(f"{side}_{metric}_tokens_per_s", []).append(value)
            for name, value in _ratios(rates, list(variants)).items():
                metrics.setdefault(name, []).append(value)
    tokens = packed_tokens(dense, "quality", sizes.num_held_out)
    for side in ("w8a8", "w8a8_int8head"):
        metrics[f"{side}_kl"] = [divergences(dense, [variants[side]], tokens)[0]]
    print(bench_line("decode", metrics))


def _ratios(rates: dict[str, dict[str, float]], variants: list[str]) -> dict[str, float]:
    """Return the ratios of one round, given the tokens per second of each side by metric."""
    ratios = {
        f"{side}_{metric}_{suffix}": rates[side][metric] / rates[baseline][metric]
        for baseline, suffix in BASELINES.items()
        for side in variants
        for metric in ("decode1", "decode8")
    }
    ratios["decode8_over_guide_ratio"] = ratios.pop("dense_decode8_over_guide_ratio")
    for metric, value in rates["llamacpp"].items():
        ratios[f"llamacpp_{metric}_ratio"] = max(rates[side][metric] for side in variants) / value
    return ratios


async def _measure(url: str, sizes: Sizes) -> dict[str, float]:
    repeats = range(sizes.num_repeats)
    async with served(url) as server:
        rates = {
            f"decode{streams}": median([await server.decode_rate(streams, sizes.output_tokens) for _ in repeats])
            for streams in (1, 8)
        }
        await server.complete(sizes.prefill_tokens, 1)
        seconds = median([await server.complete(sizes.prefill_tokens, 1) for _ in repeats])
    return rates | {f"prefill{sizes.prefill_tokens}": sizes.prefill_tokens / seconds}


def _measure_llamacpp(program: Path, sizes: Sizes) -> dict[str, float]:
    test = partial(
        run_llama_bench,
        program,
        builtin_file(MODEL),
        num_threads=len(probe_hardware().cores),
        num_repeats=sizes.num_repeats,
    )
    return {
        "decode1": median(test(prompt_tokens=0, output_tokens=sizes.output_tokens)),
        f"prefill{sizes.prefill_tokens}": median(test(prompt_tokens=sizes.prefill_tokens, output_tokens=0)),
    }


if __name__ == "__main__":
    main()
