"""The client measured against a server of known latency: how far its figures may be off, for the report to say."""

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
from slimserve.loadtest.mock_server import MODEL, MockSchedule, running_mock_server
from slimserve.loadtest.rows import Row
from slimserve.loadtest.run import run_suite
from slimserve.loadtest.settings import LoadSettings, SuiteOptions
from slimserve.loadtest.summary import percentile

_TTFT_S = 0.1
_ANSWER_S = 1.0
"""About so long is an answer, so that seconds hold many of them."""
_WARMUP_S = 1.0


@dataclass(frozen=True)
class ClientAccuracy:
    """Distances of what the client measured from what the server did, in milliseconds."""

    num_streams: int
    tokens_per_s: float
    """Of each stream."""
    num_requests: int
    ttft_p50_error_ms: float
    ttft_p99_error_ms: float
    itl_p50_error_ms: float
    itl_p99_error_ms: float
    e2e_p50_error_ms: float
    e2e_p99_error_ms: float
    server_lag_p99_ms: float
    """How late the server itself was, which counts as the client's error here."""

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def calibrate(num_streams: int = 16, tokens_per_s: float = 50.0, seconds: float = 5.0) -> ClientAccuracy:
    """Load a truth server beside this process through Locust, as in a run, and compare each sample with its schedule.

    On a machine with two cores or more the server has one of its own.
    """
    num_tokens = max(2, round(_ANSWER_S * tokens_per_s))
    schedule = MockSchedule(ttft_s=_TTFT_S, gap_s=1 / tokens_per_s, num_tokens=num_tokens)
    cores = probe_hardware().cores
    with (
        tempfile.TemporaryDirectory() as folder,
        running_mock_server(schedule, cores[0] if len(cores) > 1 else None) as truth,
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
        _, rows = run_suite("chat", Target(truth.url, MODEL), settings, Path(folder))
        lag_ms = truth.lateness()["lag_p99_ms"]
    found = compare([row for row in rows if row.error is None and row.scheduled_s >= _WARMUP_S], schedule)
    calibration = ClientAccuracy(num_streams, tokens_per_s, server_lag_p99_ms=lag_ms, **found)
    print_status(
        f"client calibrated on {num_streams} streams of {tokens_per_s:g} tokens/s: off by (p50, p99, ms) "
        f"TTFT {calibration.ttft_p50_error_ms:.2f}, {calibration.ttft_p99_error_ms:.2f}; "
        f"ITL {calibration.itl_p50_error_ms:.2f}, {calibration.itl_p99_error_ms:.2f}; "
        f"end to end {calibration.e2e_p50_error_ms:.2f}, {calibration.e2e_p99_error_ms:.2f}"
    )
    return calibration


def compare(rows: Sequence[Row], schedule: MockSchedule) -> dict[str, Any]:
    """The distances of rows' samples from the schedule, as ClientAccuracy names them, and the number of rows."""
    e2e_s = schedule.ttft_s + (schedule.num_tokens - 1) * schedule.gap_s
    return {
        "num_requests": len(rows),
        **_errors_ms("ttft", (row.ttft_s for row in rows if row.ttft_s is not None), schedule.ttft_s),
        **_errors_ms("itl", (gap for row in rows for gap in row.inter_token_gaps_s()), schedule.gap_s),
        **_errors_ms("e2e", (row.e2e_s for row in rows), e2e_s),
    }


def _errors_ms(metric: str, samples: Iterable[float], truth_s: float) -> dict[str, float]:
    errors = sorted(abs(sample - truth_s) for sample in samples)
    if not errors:
        remedy = "see that the machine has a core to spare, and try again"
        raise UserError("--calibrate", metric, "could not be measured: no answer came in time", remedy)
    return {f"{metric}_{name}_error_ms": 1e3 * percentile(errors, frac) for name, frac in (("p50", 0.5), ("p99", 0.99))}
