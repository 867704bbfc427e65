"""Measure the error of load test tools against a mock server that emits tokens on an exact schedule.

    make bench-loadtest-truth

The mock server (loadtest/mock_server.py) and the tool each have a CPU core of their own. The schedule is 1, 16, 64 and
128 concurrent streams of 100 tokens: the first after 100 ms, then 50 tokens/s. The error is the difference between the
percentile that a tool reports and the percentile of the schedule. The tools:

- `ours`: `slimserve loadtest`.
- `vllm`: `vllm bench serve`.
- `guidellm`: GuideLLM in its own environment, with as many processes as its documentation leaves it, at most ten.
- `guidellm_one_process`: GuideLLM with one worker process.

GuideLLM's ITL is the mean of a request, so compare its `itl` with the `tpot` of the other tools.

The benchmark then bisects a ladder of stream counts for each tool's streams per core, in three rounds. A tool is
accurate at a step if its p50 of TTFT, ITL and end-to-end latency is within 5% of the schedule and its p99 within 50%.
`streams_per_core_ratio_guidellm` compares our result with the better one of GuideLLM's two in the same round. The
ladder ends where the mock server's core is saturated, so a tool that reaches the last step may support more streams.
The last line of output is one JSON object. The benchmark takes about 26 minutes; `--quick` runs one round with two
stream counts and a ladder of three steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
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
NUM_LADDER_ROUNDS = 3
QUICK_NUM_STREAMS, QUICK_LADDER = (1, 16), (8, 32, 128)
LADDER = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
SCHEDULE = MockSchedule(ttft_s=0.1, gap_s=0.02, num_tokens=100)
SCHEDULE_MS = {"ttft": 100.0, "itl": 20.0, "tpot": 20.0, "e2e": 100.0 + 99 * 20.0}
EVALUATED_METRICS = ("ttft", "itl", "e2e")
TOLERANCE = {"p50": 0.05, "p99": 0.5}
WARMUP_S, DURATION_S = 2.5, 8.0
PEERS = {"vllm": ("vllm",), "guidellm": ("guidellm", "guidellm_one_process")}
"""Tools of each peer; the ratio of streams per core takes the best of them."""
_NUM_PROMPTS = 2000
_MAX_LAG_MS = 1.0
"""Maximum p99 lag of the mock server's writes in a valid run, in milliseconds."""
_NICENESS = -10
_VLLM_BENCH = Path(__file__).parent / "peers" / "vllm_bench.py"

Reported = dict[tuple[str, str], float]
"""Reported milliseconds by metric and percentile."""


def main() -> None:
    is_quick = "--quick" in sys.argv[1:]
    metrics: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tools = _tools(Path(folder))
        for number in range(1 if is_quick else NUM_ROUNDS):
            for num_streams in QUICK_NUM_STREAMS if is_quick else NUM_STREAMS:
                for tool in _in_turn(tools, number):
                    reported, lag_ms = _run_tool(tools[tool], num_streams)
                    errors = {key: abs(value - SCHEDULE_MS[key[0]]) for key, value in reported.items()}
                    for (metric, percentile), error_ms in errors.items():
                        metrics.setdefault(f"{tool}_{metric}_{percentile}_error_ms_{num_streams}", []).append(error_ms)
                    metrics.setdefault(f"truth_lag_p99_ms_{num_streams}", []).append(lag_ms)
                    text = ", ".join(f"{metric} {p} {error:.2f}" for (metric, p), error in errors.items())
                    print_status(
                        f"round {number + 1}, {num_streams} streams, {tool}: errors in ms: {text}; lag {lag_ms:.3f} ms"
                    )
        ladder = QUICK_LADDER if is_quick else LADDER
        for number in range(1 if is_quick else NUM_LADDER_ROUNDS):
            max_streams = {tool: _max_streams(tool, tools[tool], ladder) for tool in _in_turn(tools, number)}
            for tool, num_streams in max_streams.items():
                metrics.setdefault(f"{tool}_streams_per_core", []).append(num_streams)
            for peer, its_tools in PEERS.items():
                best = max(max_streams[tool] for tool in its_tools)
                metrics.setdefault(f"streams_per_core_ratio_{peer}", []).append(max_streams["ours"] / max(best, 1))
    print(bench_line("loadtest-truth", metrics))


Tool = Callable[[str, int], Reported]
"""Function of a server's URL and a number of concurrent streams."""


def _tools(folder: Path) -> dict[str, Tool]:
    data = folder / "prompts.jsonl"
    prompts = [json.dumps({"prompt": f"Count to a hundred, {number}."}) for number in range(_NUM_PROMPTS)]
    data.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    tokenizer, python = resolve_model("smollm2-135m-instruct"), peer_python("guidellm")
    return {
        "ours": lambda url, num_streams: _ours(url, num_streams, data, folder / "ours"),
        "vllm": lambda url, num_streams: _vllm(url, num_streams, data, tokenizer, folder / "vllm.json"),
        # GuideLLM's documentation names no number of worker processes for a machine. `max_worker_processes` in its
        # settings.py (0.8.1) is 10 by default, and worker_group.py starts as many, but no more than there are streams.
        "guidellm": lambda url, num_streams: _guidellm(python, url, num_streams, tokenizer, folder / "guidellm.json"),
        # On one core, fewer processes disturb each other less. The variable is GuideLLM's own (issue 487 of its
        # repository uses it), and this launch was the more exact one in earlier runs.
        "guidellm_one_process": lambda url, num_streams: _guidellm(
            python, url, num_streams, tokenizer, folder / "one.json", {"GUIDELLM__MAX_WORKER_PROCESSES": "1"}
        ),
    }


def _in_turn(tools: dict[str, Tool], number: int) -> list[str]:
    return list(tools) if number % 2 == 0 else list(tools)[::-1]


def _run_tool(tool: Tool, num_streams: int) -> tuple[Reported, float]:
    """Return the metrics that a tool reports and the p99 lag of the mock server, in milliseconds.

    A run is repeated up to twice if the server itself was late, because such a run says nothing about the tool.
    """
    cores = probe_hardware().cores
    for is_last in (False, False, True):
        with running_mock_server(SCHEDULE, cores[0]) as server:
            with _on_core(cores[-1]):
                reported = tool(server.url, num_streams)
            lag_ms = server.lateness()["lag_p99_ms"]
        if lag_ms <= _MAX_LAG_MS or is_last:
            return reported, lag_ms
        print_status(f"{num_streams} streams: the mock server was {lag_ms:.1f} ms late at p99; repeating the run")
    raise AssertionError("the last try returns")


def _max_streams(tool: str, run: Tool, ladder: Sequence[int]) -> int:
    """Return the highest number of streams at which a tool is accurate, by bisection; 0 if there is none."""
    accurate, inaccurate = -1, len(ladder)
    while inaccurate - accurate > 1:
        step = (accurate + inaccurate) // 2
        reported, lag_ms = _run_tool(run, ladder[step])
        worst = {
            f"{metric} {percentile}": abs(reported[metric, percentile] / SCHEDULE_MS[metric] - 1)
            for metric in EVALUATED_METRICS
            for percentile in TOLERANCE
        }
        is_accurate = all(error <= TOLERANCE[name.split()[1]] for name, error in worst.items())
        text = ", ".join(f"{name} off by {error:.1%}" for name, error in worst.items())
        verdict = "accurate" if is_accurate else "inaccurate"
        print_status(f"{tool}, {ladder[step]} streams: {verdict}: {text}; lag {lag_ms:.3f} ms")
        accurate, inaccurate = (step, inaccurate) if is_accurate else (accurate, step)
    return ladder[accurate] if accurate >= 0 else 0


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
        for metric, quantiles in samples.items()
        for name, seconds in (("p50", quantiles.p50), ("p99", quantiles.p99))
        if seconds is not None
    }


def _vllm(url: str, num_streams: int, data: Path, tokenizer: Path, result: Path) -> Reported:
    # vllm/benchmarks/serve.py (0.32.0) sends everything from one event loop, and has no option for more processes.
    rounds = round(DURATION_S * 1e3 / SCHEDULE_MS["e2e"])
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
    report = json.loads(result.read_text(encoding="utf-8"))
    metric_names = {"ttft": "ttft", "itl": "itl", "tpot": "tpot", "e2e": "e2el"}
    return {(metric, p): report[f"{p}_{name}_ms"] for metric, name in metric_names.items() for p in ("p50", "p99")}


def _guidellm(
    python: Path, url: str, num_streams: int, tokenizer: Path, result: Path, variables: Mapping[str, str] | None = None
) -> Reported:
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
    _run(command, variables)
    report: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))["benchmarks"][0]["metrics"]
    if report["request_totals"]["errored"]:
        raise RuntimeError(f"GuideLLM counted errors: {report['request_totals']}")
    # GuideLLM reports the request latency in seconds and all other metrics in milliseconds.
    metric_names = {
        "ttft": ("time_to_first_token_ms", 1),
        "itl": ("inter_token_latency_ms", 1),
        "e2e": ("request_latency", 1e3),
    }
    return {
        (metric, p): report[name]["successful"]["percentiles"][p] * factor
        for metric, (name, factor) in metric_names.items()
        for p in ("p50", "p99")
    }


def _run(command: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
    process = subprocess.run(
        command, env=peer_variables(1) | dict(variables or {}), capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise RuntimeError(f"{command[:4]} failed: {(process.stderr or process.stdout)[-1000:]}")


@contextmanager
def _on_core(core: int) -> Iterator[None]:
    """Run this process and its new children on one core, at high priority if the system allows it."""
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
