"""Show whether a load test reports a server freeze of 2 s in a run of 60 s at 20 requests/s.

    make bench-loadtest-stall

The mock server (loadtest/mock_server.py) answers each request after 20 ms, except during the freeze. `slimserve`
sends Poisson arrivals on schedule, even while earlier requests are pending. Plain Locust has four users that each send
five requests per second and wait for the answers. They send nothing during the freeze, so their p99 hides it. The
result is the p99 end-to-end latency of both tools, run in turn; Locust rounds its value to two digits. The last line of
output is one JSON object. The benchmark takes about six minutes; `--quick` runs one round.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

from benches.peers.environment import peer_variables
from slimserve.core.hardware import probe_hardware
from slimserve.core.openai_client import Target
from slimserve.core.progress import print_status, progress
from slimserve.core.provenance import bench_line
from slimserve.loadtest.mock_server import MODEL, MockSchedule, running_mock_server
from slimserve.loadtest.run import run_suite
from slimserve.loadtest.settings import LoadSettings, SuiteOptions

NUM_ROUNDS = 3
RATE = 20
DURATION_S = 60.0
SCHEDULE = MockSchedule(ttft_s=0.02, stall_at_s=30.0, stall_s=2.0)
NUM_USERS = 4
_LOCUSTFILE = Path(__file__).parent / "peers" / "plain_locustfile.py"


def main() -> None:
    metrics: dict[str, list[float]] = {}
    sides = {"ours": _ours, "closed_loop": _closed_loop}
    for number in range(1 if "--quick" in sys.argv[1:] else NUM_ROUNDS):
        for side in sides if number % 2 == 0 else reversed(sides):
            with (
                tempfile.TemporaryDirectory() as folder,
                running_mock_server(SCHEDULE, probe_hardware().cores[0]) as server,
            ):
                p99_s, num_requests = sides[side](server.url, Path(folder))
            print_status(f"round {number + 1}, {side}: p99 {p99_s:.3f} s over {num_requests} requests")
            metrics.setdefault(f"{side}_p99_s", []).append(p99_s)
            metrics.setdefault(f"{side}_num_requests", []).append(num_requests)
    print(bench_line("loadtest-stall", metrics))


def _ours(url: str, folder: Path) -> tuple[float, int]:
    data = folder / "prompts.jsonl"
    data.write_text('{"prompt": "Hello"}\n', encoding="utf-8")
    settings = LoadSettings(
        rate=str(RATE),
        duration_s=DURATION_S,
        warmup_s=1.0,
        cooldown_s=0.0,
        suite=SuiteOptions(data=str(data), max_tokens="1"),
    )
    summary, _ = run_suite("chat", Target(url, MODEL), settings, folder)
    assert not summary.errors
    assert summary.e2e_s.p99 is not None
    return summary.e2e_s.p99, summary.num_requests


def _closed_loop(url: str, folder: Path) -> tuple[float, int]:
    command = [
        *(sys.executable, "-m", "locust", "--locustfile", str(_LOCUSTFILE), "--host", url, "--headless"),
        *("--users", str(NUM_USERS), "--spawn-rate", str(NUM_USERS), "--run-time", f"{DURATION_S:.0f}s"),
        *("--only-summary", "--csv", str(folder / "plain")),
    ]
    with progress(f"plain Locust, {NUM_USERS} users", None, "s"):
        process = subprocess.run(command, env=peer_variables(1), capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"plain Locust failed: {process.stderr[-500:]}")
    with (folder / "plain_stats.csv").open(encoding="utf-8") as file:
        total = list(csv.DictReader(file))[-1]
    return float(total["99%"]) / 1e3, int(total["Request Count"])


if __name__ == "__main__":
    main()
