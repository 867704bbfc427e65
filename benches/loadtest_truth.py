"""How far load tools are from the truth: a server that emits on an exact schedule, asked by each tool in turn.

    make bench-loadtest-truth

The server (loadtest/mock_server.py) has a core of its own and the tool another one: 1, 16, 64 and 128 streams at once, 50
tokens/s each, the first token after 100 ms, 100 tokens. The error is the distance of the percentile that a tool
reports from the schedule's. vllm is `vllm bench serve`; guidellm (an environment of its own) gets one worker process,
with which it is more exact on one core than with its ten. What GuideLLM calls ITL is a request's mean, so compare its
`itl` with the `tpot` of the others, which is that mean too.

Then each tool's streams per core: the most streams of a ladder (by bisection, in equal rounds) at which it is still
right, that is, p50 of TTFT, ITL and end to end within 5% of the schedule and p99 within 50%. The ladder ends where the
server's own core is full, so a tool on its last step may bear more. Last line: one JSON object. About 13 minutes;
`--quick` takes one round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benches.peers.environment import peer_python, peer_variables
from slimserve.core.hardware import probe_hardware
from slimserve.core.model import resolve_model
from slimserve.core.openai_client import Target
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.loadtest.mock_server import MODEL, MockSchedule, running_mock_server
from slimserve.loadtest.run import run_suite
from slimserve.loadtest.settings import LoadSettings, SuiteOptions

NUM_STREAMS = (1, 16, 64, 128)
NUM_ROUNDS = 2
NUM_LADDER_ROUNDS = 1
LADDER = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
SCHEDULE = MockSchedule(ttft_s=0.1, gap_s=0.02, num_tokens=100)
TRUTH_MS = {"ttft": 100.0, "itl": 20.0, "tpot": 20.0, "e2e": 100.0 + 99 * 20.0}
JUDGED = ("ttft", "itl", "e2e")
TOLERANCE = {"p50": 0.05, "p99": 0.5}
WARMUP_S, DURATION_S = 2.5, 8.0
_NUM_PROMPTS = 2000
_MOST_LAG_MS = 1.0
"""At p99, of the server's own writes."""
_NICENESS = -10
_VLLM_BENCH = Path(__file__).parent / "peers" / "vllm_bench.py"

Reported = dict[tuple[str, str], float]
"""Milliseconds by metric and percentile."""


def main() -> None:
    is_quick = "--quick" in sys.argv[1:]
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tools = _tools(Path(folder))
        for number in range(1 if is_quick else NUM_ROUNDS):
            for num_streams in NUM_STREAMS:
                for tool in _in_turn(tools, number):
                    reported, lag_ms = _ask(tools[tool], num_streams)
                    errors = {key: abs(value - TRUTH_MS[key[0]]) for key, value in reported.items()}
                    for (metric, percentile), error_ms in errors.items():
                        figures.setdefault(f"{tool}_{metric}_{percentile}_error_ms_{num_streams}", []).append(error_ms)
                    figures.setdefault(f"truth_lag_p99_ms_{num_streams}", []).append(lag_ms)
                    told = ", ".join(f"{metric} {p} {error:.2f}" for (metric, p), error in errors.items())
                    print_status(
                        f"round {number + 1}, {num_streams} streams, {tool}: errors in ms: {told}; lag {lag_ms:.3f}"
                    )
        for number in range(1 if is_quick else NUM_LADDER_ROUNDS):
            most = {tool: _most_streams(tool, tools[tool]) for tool in _in_turn(tools, number)}
            for tool, num_streams in most.items():
                figures.setdefault(f"{tool}_streams_per_core", []).append(num_streams)
            for peer in ("vllm", "guidellm"):
                figures.setdefault(f"streams_per_core_ratio_{peer}", []).append(most["ours"] / max(most[peer], 1))
    print(bench_line("loadtest-truth", figures))


Tool = Callable[[str, int], Reported]
"""Asks the server at a URL for so many streams at once."""


def _tools(folder: Path) -> dict[str, Tool]:
    data = folder / "prompts.jsonl"
    prompts = [json.dumps({"prompt": f"Count to a hundred, {number}."}) for number in range(_NUM_PROMPTS)]
    data.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    tokenizer, python = resolve_model("smollm2-135m-instruct"), peer_python("guidellm")
    return {
        "ours": lambda url, num_streams: _ours(url, num_streams, data, folder / "ours"),
        "vllm": lambda url, num_streams: _vllm(url, num_streams, data, tokenizer, folder / "vllm.json"),
        "guidellm": lambda url, num_streams: _guidellm(python, url, num_streams, tokenizer, folder / "guidellm.json"),
    }


def _in_turn(tools: dict[str, Tool], number: int) -> list[str]:
    return list(tools) if number % 2 == 0 else list(tools)[::-1]


def _ask(tool: Tool, num_streams: int) -> tuple[Reported, float]:
    """What a tool reports, and how late the server was at p99, in milliseconds.

    Where the server itself was late, because the machine did something else, nothing is said of the tool: again then.
    """
    cores = probe_hardware().cores
    for is_last in (False, False, True):
        with running_mock_server(SCHEDULE, cores[0]) as truth:
            with _on_core(cores[-1]):
                reported = tool(truth.url, num_streams)
            lag_ms = truth.lateness()["lag_p99_ms"]
        if lag_ms <= _MOST_LAG_MS or is_last:
            return reported, lag_ms
        print_status(f"{num_streams} streams: the server itself was {lag_ms:.1f} ms late at p99; measured anew")
    raise AssertionError("the last try returns")


def _most_streams(tool: str, ask: Tool) -> int:
    """The highest step of the ladder on which a tool is right, as far as bisection finds it; 0 for none."""
    right, wrong = -1, len(LADDER)
    while wrong - right > 1:
        step = (right + wrong) // 2
        reported, lag_ms = _ask(ask, LADDER[step])
        worst = {
            f"{metric} {percentile}": abs(reported[metric, percentile] / TRUTH_MS[metric] - 1)
            for metric in JUDGED
            for percentile in TOLERANCE
        }
        is_right = all(error <= TOLERANCE[name.split()[1]] for name, error in worst.items())
        told = ", ".join(f"{name} off by {error:.1%}" for name, error in worst.items())
        print_status(f"{tool}, {LADDER[step]} streams: {'right' if is_right else 'wrong'}: {told}; lag {lag_ms:.3f} ms")
        right, wrong = (step, wrong) if is_right else (right, step)
    return LADDER[right] if right >= 0 else 0


def _ours(url: str, num_streams: int, data: Path, output: Path) -> Reported:
    settings = LoadSettings(
        users=num_streams,
        duration_s=DURATION_S,
        warmup_s=WARMUP_S,
        cooldown_s=0.0,
        suite=SuiteOptions(data=str(data), max_tokens=str(SCHEDULE.num_tokens)),
    )
    summary, _ = run_suite("chat", Target(url, MODEL), settings, output)
    if summary.errors:
        raise RuntimeError(f"our client counted errors: {summary.errors}")
    samples = {"ttft": summary.ttft_s, "itl": summary.itl_s, "tpot": summary.tpot_s, "e2e": summary.e2e_s}
    return {
        (metric, name): 1e3 * seconds
        for metric, found in samples.items()
        for name, seconds in (("p50", found.p50), ("p99", found.p99))
        if seconds is not None
    }


def _vllm(url: str, num_streams: int, data: Path, tokenizer: Path, result: Path) -> Reported:
    rounds = round(DURATION_S * 1e3 / TRUTH_MS["e2e"])
    command = [
        *(sys.executable, str(_VLLM_BENCH), "--backend", "openai-chat", "--base-url", url),
        *("--endpoint", "/v1/chat/completions", "--model", str(tokenizer), "--served-model-name", MODEL),
        *("--dataset-name", "custom", "--dataset-path", str(data), "--skip-chat-template", "--disable-tqdm"),
        *("--custom-output-len", str(SCHEDULE.num_tokens), "--num-prompts", str(rounds * num_streams)),
        *("--max-concurrency", str(num_streams), "--num-warmups", str(num_streams)),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99"),
        *("--save-result", "--result-filename", str(result)),
    ]
    _run(command)
    told = json.loads(result.read_text(encoding="utf-8"))
    names = {"ttft": "ttft", "itl": "itl", "tpot": "tpot", "e2e": "e2el"}
    return {(metric, p): told[f"{p}_{name}_ms"] for metric, name in names.items() for p in ("p50", "p99")}


def _guidellm(python: Path, url: str, num_streams: int, tokenizer: Path, result: Path) -> Reported:
    num_tokens = SCHEDULE.num_tokens
    command = [
        *(str(python), "-m", "guidellm", "run"),
        *("--backend", f"kind=openai_http,target={url},model={MODEL},max_tokens={num_tokens}"),
        *("--profile", json.dumps({"kind": "concurrent", "streams": [num_streams], "warmup": WARMUP_S})),
        *("--constraint", f"kind=max_duration,seconds={WARMUP_S + DURATION_S}"),
        *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
        *("--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={num_tokens}"),
        *("--output", f"kind=json,path={result}", "--disable-console"),
    ]
    _run(command, {"GUIDELLM__MAX_WORKER_PROCESSES": "1"})
    told: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))["benchmarks"][0]["metrics"]
    if told["request_totals"]["errored"]:
        raise RuntimeError(f"GuideLLM counted errors: {told['request_totals']}")
    # Its latency is in seconds, all else in milliseconds.
    names = {
        "ttft": ("time_to_first_token_ms", 1),
        "itl": ("inter_token_latency_ms", 1),
        "e2e": ("request_latency", 1e3),
    }
    return {
        (metric, p): told[name]["successful"]["percentiles"][p] * factor
        for metric, (name, factor) in names.items()
        for p in ("p50", "p99")
    }


def _run(command: Sequence[str], variables: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command, env=peer_variables(1) | (variables or {}), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[:4]} failed: {(done.stderr or done.stdout)[-1000:]}")


@contextmanager
def _on_core(core: int) -> Iterator[None]:
    """This process and those that it starts meanwhile, on one core, and before others there (where that is allowed)."""
    cores, niceness = os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)
    os.sched_setaffinity(0, {core})
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, niceness)


if __name__ == "__main__":
    main()
