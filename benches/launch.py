"""Compare `slimserve`'s launch of vLLM with vLLM's default launch, on the same dense model.

    make bench-launch

Each of three rounds starts both servers in turn and computes the ratio of their results. The order changes every round.
Prompts are random tokens. Both servers get the same KV cache size; all other settings of the stock server are vLLM's
defaults. The last line of output is one JSON object. The benchmark takes about 15 minutes on 2 cores.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from pathlib import Path

import httpx

from slimserve.core.hardware import probe_hardware
from slimserve.core.model import resolve_model
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.serve.launch.plan import LaunchPlan, plan_launch
from slimserve.serve.launch.process import STOCK_COMMAND, Engine, EngineSpec, free_port

MODEL = "smollm2-135m-instruct"
NUM_ROUNDS = 3
NUM_REPEATS = 3
"""Number of measurements per server start; the result is their median."""
PREFILL_TOKENS, NUM_PREFILLS = 512, 16
DECODE_TOKENS, NUM_STREAMS = 96, 8
_TOKEN_IDS = range(100, 49_000)


def main() -> None:
    directory = resolve_model(MODEL)
    ours = plan_launch(directory, probe_hardware())
    # By default vLLM reserves 92% of a memory node, and it fails if other processes use more than 8%.
    stock = LaunchPlan(tuple(choice for choice in ours.arguments if choice.name == "--kv-cache-memory-bytes"))
    metrics: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(NUM_ROUNDS):
            sides = [("stock", stock, STOCK_COMMAND), ("ours", ours, EngineSpec.command)]
            speeds = {}
            for name, plan, command in sides if number % 2 == 0 else reversed(sides):
                log = Path(folder) / f"{name}-{number}.log"
                spec = EngineSpec(directory, "model", plan, log, free_port(), command=command)
                with Engine(spec) as engine:
                    speeds[name] = asyncio.run(_measure(spec.url)) | {"ready_s": engine.ready_s}
                print_status(f"round {number + 1}/{NUM_ROUNDS} {name}: {_format_speeds(speeds[name])}")
            for name, measured in speeds.items():
                for metric, value in measured.items():
                    metrics.setdefault(f"{name}_{metric}", []).append(value)
            metrics.setdefault("prefill_ratio", []).append(
                speeds["ours"]["prefill_requests_per_s"] / speeds["stock"]["prefill_requests_per_s"]
            )
            metrics.setdefault("decode8_ratio", []).append(
                speeds["ours"]["decode8_tokens_per_s"] / speeds["stock"]["decode8_tokens_per_s"]
            )
    print(bench_line("launch", metrics))


async def _measure(url: str) -> dict[str, float]:
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(keepalive_expiry=2)) as client:

        async def complete(prompt_tokens: int, output_tokens: int) -> None:
            body = {
                "model": "model",
                "prompt": random.choices(_TOKEN_IDS, k=prompt_tokens),
                "max_tokens": output_tokens,
                "ignore_eos": True,
                "temperature": 0,
            }
            (await client.post("/v1/completions", json=body)).raise_for_status()

        async def rate(num_requests: int, prompt_tokens: int, output_tokens: int) -> float:
            """Return the median requests per second of `num_requests` concurrent requests."""
            rates = []
            for _ in range(NUM_REPEATS):
                start = time.perf_counter()
                await asyncio.gather(*(complete(prompt_tokens, output_tokens) for _ in range(num_requests)))
                rates.append(num_requests / (time.perf_counter() - start))
            return sorted(rates)[len(rates) // 2]

        await complete(PREFILL_TOKENS, 8)
        return {
            "prefill_requests_per_s": await rate(NUM_PREFILLS, PREFILL_TOKENS, 1),
            "decode8_tokens_per_s": await rate(NUM_STREAMS, 32, DECODE_TOKENS) * DECODE_TOKENS,
        }


def _format_speeds(speeds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in speeds.items())


if __name__ == "__main__":
    main()
