"""Calibration of the load generator: its own measurement error against a mock server of known latency."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimserve.core.errors import UserError
from slimserve.core.hardware import probe_hardware
from slimserve.core.openai_client import Target
from slimserve.core.progress import print_status
from slimserve.core.statistics import percentile
from slimserve.loadtest.mock_server import MODEL, MockSchedule, running_mock_server
from slimserve.loadtest.rows import Row
from slimserve.loadtest.run import run_suite
from slimserve.loadtest.settings import LoadSettings, SuiteOptions

_TTFT_S = 0.1
_ANSWER_S = 1.0
"""Approximate length of an answer; short, so that a few seconds contain many answers."""
_WARMUP_S = 1.0


@dataclass(frozen=True)
class ClientAccuracy:
    """Differences between the latencies that the client measured and those of the mock server, in milliseconds."""

    num_streams: int
    tokens_per_s: float
    """Output rate of each stream."""
    num_requests: int
    ttft_p50_error_ms: float
    ttft_p99_error_ms: float
    itl_p50_error_ms: float
    itl_p99_error_ms: float
    e2e_p50_error_ms: float
    e2e_p99_error_ms: float
    server_lag_p99_ms: float
    """Delay of the mock server behind its own schedule, which counts as the client's error here."""

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def calibrate(num_streams: int = 16, tokens_per_s: float = 50.0, seconds: float = 5.0) -> ClientAccuracy:
    """Run Locust against a mock server and compare each sample with the server's schedule.

    With at least two cores the mock server has its own core. Raises UserError if no answer arrives in time.
    """
    num_tokens = max(2, round(_ANSWER_S * tokens_per_s))
    schedule = MockSchedule(ttft_s=_TTFT_S, gap_s=1 / tokens_per_s, num_tokens=num_tokens)
    cores = probe_hardware().cores
    with (
        tempfile.TemporaryDirectory() as folder,
        running_mock_server(schedule, cores[0] if len(cores) > 1 else None) as server,
    ):
        data = Path(folder) / "prompts.jsonl"
        num_prompts = round(num_streams * (2 * _WARMUP_S + seconds) / _ANSWER_S) + num_streams
        lines = [json.dumps({"prompt": f"Count to a hundred, {number}."}) for number in range(num_prompts)]
        data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        settings = LoadSettings(
            users=num_streams,
            duration_s=seconds,
            warmup_s=_WARMUP_S,
            cooldown_s=0.0,
            suite=SuiteOptions(data=str(data), max_tokens=str(num_tokens)),
        )
        _, rows = run_suite("chat", Target(server.url, MODEL), settings, Path(folder))
        lag_ms = server.lateness()["lag_p99_ms"]
    errors = compare([row for row in rows if row.error is None and row.scheduled_s >= _WARMUP_S], schedule)
    accuracy = ClientAccuracy(num_streams, tokens_per_s, server_lag_p99_ms=lag_ms, **errors)
    print_status(
        f"client error on {num_streams} streams of {tokens_per_s:g} tokens/s (p50, p99, ms): "
        f"TTFT {accuracy.ttft_p50_error_ms:.2f}, {accuracy.ttft_p99_error_ms:.2f}; "
        f"ITL {accuracy.itl_p50_error_ms:.2f}, {accuracy.itl_p99_error_ms:.2f}; "
        f"end to end {accuracy.e2e_p50_error_ms:.2f}, {accuracy.e2e_p99_error_ms:.2f}"
    )
    return accuracy


def compare(rows: Sequence[Row], schedule: MockSchedule) -> dict[str, Any]:
    """Return the differences between the rows and the schedule by field of ClientAccuracy, and the number of rows."""
    e2e_s = schedule.ttft_s + (schedule.num_tokens - 1) * schedule.gap_s
    return {
        "num_requests": len(rows),
        **_errors_ms("ttft", (row.ttft_s for row in rows if row.ttft_s is not None), schedule.ttft_s),
        **_errors_ms("itl", (gap for row in rows for gap in row.inter_token_gaps_s()), schedule.gap_s),
        **_errors_ms("e2e", (row.e2e_s for row in rows), e2e_s),
    }


def _errors_ms(metric: str, samples: Iterable[float], expected_s: float) -> dict[str, float]:
    errors = [abs(sample - expected_s) for sample in samples]
    if not errors:
        remedy = "free a CPU core and try again"
        raise UserError("--calibrate", metric, "could not be measured: no answer came in time", remedy)
    return {f"{metric}_{name}_error_ms": 1e3 * percentile(errors, frac) for name, frac in (("p50", 0.5), ("p99", 0.99))}
