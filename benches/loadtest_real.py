"""Our load generator and `vllm bench serve` on the same real server: SmolLM2, the same arrivals, prompts alike.

    make bench-loadtest-real

A first run of vLLM's tool, which is not counted, warms the server up and gives the arrivals: a Poisson process, whose
times ours replays as a trace and vLLM's draws again from its seed. Then the tools in turn, the order swapped each
round; every run has prompts of its own, of as many words, so that no cache knows them, and each answer has exactly 64
tokens. Ratios of the medians within a round, ours over vLLM's, and whether ours lies within 5% of the bucket in which
the server's own histogram has its median (1 or 0). Last line: one JSON object. About ten minutes on 2 cores.
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
SLACK = 0.05
_SEED = 7
_VLLM_BENCH = Path(__file__).parent / "peers" / "vllm_bench.py"
_WORDS = (
    "river stone market window garden letter winter signal engine harbor silver forest bridge candle mirror "
    "station planet summer doctor castle number violin orange shadow island carpet thunder pencil valley copper"
)

Medians = dict[str, float]
"""Seconds of `ttft` and `itl`."""


def main() -> None:
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
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
                        medians[side], again_s = _vllm(target, prompts, folder)
                        _check_same(starts_s, again_s)
                    else:
                        summary = _ours(target, prompts, trace, folder)
                        medians[side] = _medians_of(summary)
                        for figure, value in _brackets(summary).items():
                            figures.setdefault(figure, []).append(value)
                for metric in ("ttft", "itl"):
                    ours_s, theirs_s = medians["ours"][metric], medians["vllm"][metric]
                    figures.setdefault(f"{metric}_median_ratio_vllm", []).append(ours_s / theirs_s)
                    figures.setdefault(f"ours_{metric}_median_ms", []).append(ours_s * 1e3)
                    figures.setdefault(f"vllm_{metric}_median_ms", []).append(theirs_s * 1e3)
                told = {name: round(values[-1], 3) for name, values in figures.items()}
                print_status(f"round {number + 1}/{NUM_ROUNDS}: {told}")
    print(bench_line("loadtest-real", figures))


def _prompts(folder: Path, seed: str) -> Path:
    """A file of prompts of equally many words, which begin differently in each file."""
    numbers, words = random.Random(seed), _WORDS.split()
    file = folder / f"{seed.replace(' ', '-')}.jsonl"
    lines = [json.dumps({"prompt": " ".join(numbers.choices(words, k=PROMPT_WORDS))}) for _ in range(NUM_REQUESTS)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _ours(target: Target, prompts: Path, trace: Path, folder: Path) -> LoadSummary:
    settings = LoadSettings(
        trace=str(trace),
        duration_s=2 * NUM_REQUESTS / RATE,  # longer than the trace: every request counts
        warmup_s=0.0,
        cooldown_s=0.0,
        suite=SuiteOptions(data=str(prompts), max_tokens=str(OUTPUT_TOKENS), exact_tokens=True),
    )
    summary, _ = run_suite("chat", target, settings, folder / "ours")
    if summary.errors or summary.num_requests != NUM_REQUESTS:
        raise RuntimeError(f"our client had {summary.num_requests} requests and errors {summary.errors}")
    return summary


def _medians_of(summary: LoadSummary) -> Medians:
    assert summary.ttft_s.p50 is not None
    assert summary.itl_s.p50 is not None
    return {"ttft": summary.ttft_s.p50, "itl": summary.itl_s.p50}


def _brackets(summary: LoadSummary) -> dict[str, float]:
    """Whether our medians lie where the server's own histograms have theirs."""
    brackets = {"ttft": summary.server.ttft_p50_bracket_s, "itl": summary.server.itl_p50_bracket_s}
    medians = _medians_of(summary)
    return {
        f"{metric}_in_server_bracket": float(
            bracket is not None and bracket[0] * (1 - SLACK) <= medians[metric] <= bracket[1] * (1 + SLACK)
        )
        for metric, bracket in brackets.items()
    }


def _vllm(target: Target, prompts: Path, folder: Path) -> tuple[Medians, list[float]]:
    """The medians that vLLM's tool reports, and when it sent each request, from the first on."""
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
        done = subprocess.run(command, env=peer_variables(1), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"vllm bench serve failed: {done.stderr[-1000:]}")
    told = json.loads(result.read_text(encoding="utf-8"))
    if told["failed"]:
        raise RuntimeError(f"vllm bench serve counted {told['failed']} failures: {told['errors'][:1]}")
    starts_s = [at - told["start_times"][0] for at in told["start_times"]]
    return {"ttft": told["median_ttft_ms"] / 1e3, "itl": told["median_itl_ms"] / 1e3}, starts_s


def _check_same(expected_s: list[float], starts_s: list[float]) -> None:
    """The same seed gave the same arrivals, to what a busy machine makes of them."""
    late_s = sorted(abs(one - other) for one, other in zip(expected_s, starts_s, strict=True))
    assert late_s[len(late_s) // 2] < 0.05, f"vllm bench serve drew other arrivals: {late_s}"


if __name__ == "__main__":
    main()
