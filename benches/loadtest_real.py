"""Compare `slimserve`'s load generator with `vllm bench serve` on one real server of SmolLM2, with the same arrivals.

    make bench-loadtest-real

An uncounted first run of vLLM's tool warms the server up and records Poisson arrival times. `slimserve` replays these
times as a trace; vLLM's tool draws them again from its seed. The tools then run in turn, and the order changes every
round. Each run has new prompts of the same length, so that the prefix cache never contains them. Each answer has
exactly 64 tokens. Ratios are our median over vLLM's median of the same round. `*_in_server_bracket` is 1 if our median
is within 5% of the bucket that holds the median of the server's own histogram, else 0. The last line of output is one
JSON object. The benchmark takes about ten minutes on 2 cores; `--quick` runs one round.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from benches.peers.environment import peer_variables
from benches.served import MODEL, our_spec
from slimserve.core.model import resolve_model
from slimserve.core.openai_client import Target
from slimserve.core.progress import print_status, progress
from slimserve.core.provenance import bench_line
from slimserve.loadtest.run import run_suite
from slimserve.loadtest.settings import LoadSettings, SuiteOptions
from slimserve.loadtest.summary import LoadSummary
from slimserve.serve.launch.process import Engine

NUM_ROUNDS = 6
NUM_REQUESTS = 40
RATE = 1.0
OUTPUT_TOKENS = 64
PROMPT_WORDS = 96
TOLERANCE_FRAC = 0.05
_SEED = 7
_VLLM_BENCH = Path(__file__).parent / "peers" / "vllm_bench.py"
_WORDS = (
    "river stone market window garden letter winter signal engine harbor silver forest bridge candle mirror "
    "station planet summer doctor castle number violin orange shadow island carpet thunder pencil valley copper"
)

Medians = dict[str, float]
"""Median seconds by metric name (`ttft` or `itl`)."""


def main() -> None:
    metrics: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with Engine(our_spec(folder / "engine.log")) as engine:
            target = Target(engine.spec.url, engine.spec.name)
            _, starts_s = _vllm(target, _prompts(folder, "warm-up"), folder)
            trace = folder / "arrivals.txt"
            trace.write_text("".join(f"{at:.6f}\n" for at in starts_s), encoding="utf-8")
            for number in range(1 if "--quick" in sys.argv[1:] else NUM_ROUNDS):
                medians: dict[str, Medians] = {}
                for side in ("ours", "vllm") if number % 2 == 0 else ("vllm", "ours"):
                    prompts = _prompts(folder, f"{side} {number}")
                    if side == "vllm":
                        medians[side], repeated_s = _vllm(target, prompts, folder)
                        _check_same_arrivals(starts_s, repeated_s)
                    else:
                        summary = _ours(target, prompts, trace, folder)
                        medians[side] = _medians_of(summary)
                        for name, value in _brackets(summary).items():
                            metrics.setdefault(name, []).append(value)
                for metric in ("ttft", "itl"):
                    ours_s, theirs_s = medians["ours"][metric], medians["vllm"][metric]
                    metrics.setdefault(f"{metric}_median_ratio_vllm", []).append(ours_s / theirs_s)
                    metrics.setdefault(f"ours_{metric}_median_ms", []).append(ours_s * 1e3)
                    metrics.setdefault(f"vllm_{metric}_median_ms", []).append(theirs_s * 1e3)
                latest = {name: round(values[-1], 3) for name, values in metrics.items()}
                print_status(f"round {number + 1}/{NUM_ROUNDS}: {latest}")
    print(bench_line("loadtest-real", metrics))


def _prompts(folder: Path, seed: str) -> Path:
    """Write a file of random prompts of `PROMPT_WORDS` words; each seed gives different prompts."""
    numbers, words = random.Random(seed), _WORDS.split()
    file = folder / f"{seed.replace(' ', '-')}.jsonl"
    lines = [json.dumps({"prompt": " ".join(numbers.choices(words, k=PROMPT_WORDS))}) for _ in range(NUM_REQUESTS)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _ours(target: Target, prompts: Path, trace: Path, folder: Path) -> LoadSummary:
    settings = LoadSettings(
        trace=str(trace),
        duration_s=2 * NUM_REQUESTS / RATE,  # Longer than the trace, so that every request counts.
        warmup_s=0.0,
        cooldown_s=0.0,
        suite=SuiteOptions(data=str(prompts), max_tokens=str(OUTPUT_TOKENS), exact_tokens=True),
    )
    summary, _ = run_suite("chat", target, settings, folder / "ours")
    if summary.errors or summary.num_requests != NUM_REQUESTS:
        raise RuntimeError(
            f"our client sent {summary.num_requests} of {NUM_REQUESTS} requests with errors {summary.errors}"
        )
    return summary


def _medians_of(summary: LoadSummary) -> Medians:
    assert summary.ttft_s.p50 is not None
    assert summary.itl_s.p50 is not None
    return {"ttft": summary.ttft_s.p50, "itl": summary.itl_s.p50}


def _brackets(summary: LoadSummary) -> dict[str, float]:
    """Return 1 for each median that agrees with the server's own histogram, else 0."""
    brackets = {"ttft": summary.server.ttft_p50_bracket_s, "itl": summary.server.itl_p50_bracket_s}
    medians = _medians_of(summary)
    return {
        f"{metric}_in_server_bracket": float(
            bracket is not None
            and bracket[0] * (1 - TOLERANCE_FRAC) <= medians[metric] <= bracket[1] * (1 + TOLERANCE_FRAC)
        )
        for metric, bracket in brackets.items()
    }


def _vllm(target: Target, prompts: Path, folder: Path) -> tuple[Medians, list[float]]:
    """Run vLLM's tool; return its medians and the send times, in seconds after the first request."""
    result = folder / "vllm.json"
    command = [
        *(sys.executable, str(_VLLM_BENCH), "--backend", "openai-chat", "--base-url", target.url),
        *("--endpoint", "/v1/chat/completions", "--model", str(resolve_model(MODEL))),
        *("--served-model-name", target.model, "--ready-check-timeout-sec", "0", "--disable-tqdm"),
        *("--dataset-name", "custom", "--dataset-path", str(prompts), "--skip-chat-template", "--disable-shuffle"),
        *("--custom-output-len", str(OUTPUT_TOKENS), "--num-prompts", str(NUM_REQUESTS), "--ignore-eos"),
        *("--request-rate", str(RATE), "--seed", str(_SEED), "--temperature", "0"),
        *("--save-result", "--save-detailed", "--result-filename", str(result)),
    ]
    with progress(f"vllm bench serve, {RATE:g}/s", None, "s"):
        process = subprocess.run(command, env=peer_variables(1), capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"vllm bench serve failed: {process.stderr[-1000:]}")
    reported = json.loads(result.read_text(encoding="utf-8"))
    if reported["failed"]:
        raise RuntimeError(f"vllm bench serve counted {reported['failed']} failures: {reported['errors'][:1]}")
    starts_s = [at - reported["start_times"][0] for at in reported["start_times"]]
    return {"ttft": reported["median_ttft_ms"] / 1e3, "itl": reported["median_itl_ms"] / 1e3}, starts_s


def _check_same_arrivals(expected_s: list[float], starts_s: list[float]) -> None:
    """Check that the same seed gave the same arrivals, within the jitter of a busy machine."""
    differences_s = sorted(abs(one - other) for one, other in zip(expected_s, starts_s, strict=True))
    assert differences_s[len(differences_s) // 2] < 0.05, (
        f"vllm bench serve sent other arrivals; differences in seconds: {differences_s}"
    )


if __name__ == "__main__":
    main()
