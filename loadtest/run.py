"""Run a suite headless in a Locust process of its own, then turn its rows into a summary and a result file."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from contracts.errors import UserError
from contracts.progress import progress
from contracts.provenance import provenance
from contracts.storage import write_atomically
from loadtest.rows import Row, read_rows
from loadtest.summary import LoadSummary, summarize
from loadtest.target import Target, prefix_cache_hit_frac, read_counters

SUITES = ("recommendation", "reasoning")
_GRACE_S = 120
_TERMINATE_S = 10


@dataclass(frozen=True)
class LoadSettings:
    """Closed-loop load: `users` of them, each sending its next request when the last is answered."""

    users: int = 4
    duration_s: float = 60.0
    """Length of the measured window, after the warm-up."""
    warmup_s: float = 5.0
    prompt_seed: int = 0


def run_suite(suite: str, target: Target, settings: LoadSettings, output: Path) -> tuple[LoadSummary, list[Row]]:
    """Load `target` and return the summary and the raw rows, both also left in `output`.

    Writes `SUITE.rows.jsonl` (one line per request), `SUITE.json` (summary, settings and
    provenance) and Locust's log. Raises UserError where the suite is unknown or Locust fails.
    """
    if suite not in SUITES:
        raise UserError("suite", suite, "is unknown", f"choose from {', '.join(SUITES)}")
    if settings.users < 1 or settings.duration_s <= 0 or settings.warmup_s < 0:
        raise UserError(
            "load settings", settings, "make no load", "give at least one user, a positive duration and a warm-up >= 0"
        )
    output.mkdir(parents=True, exist_ok=True)
    rows_file = output / f"{suite}.rows.jsonl"
    rows_file.unlink(missing_ok=True)
    before = read_counters(target)
    _run_locust(suite, target, settings, rows_file, output / f"{suite}.locust.log")
    rows = read_rows(rows_file)
    summary = summarize(
        rows,
        settings.warmup_s,
        settings.warmup_s + settings.duration_s,
        prefix_cache_hit_frac(before, read_counters(target)),
    )
    document = {
        "command": "loadtest",
        "suite": suite,
        "target": target.__dict__,
        "settings": settings.__dict__,
        **provenance(),
        "summary": summary.as_dict(),
    }
    write_atomically(output / f"{suite}.json", json.dumps(document, indent=2) + "\n")
    return summary, rows


def _run_locust(suite: str, target: Target, settings: LoadSettings, rows_file: Path, log: Path) -> None:
    total_s = settings.warmup_s + settings.duration_s
    command = [
        *(sys.executable, "-m", "locust", "--headless", "--only-summary", "--skip-log-setup"),
        *("--locustfile", str(Path(__file__).parent / "suites" / f"{suite}.py")),
        *("--host", target.url, "--model", target.model),
        *("--users", str(settings.users), "--spawn-rate", str(settings.users)),
        *("--load-seconds", str(total_s), "--stop-timeout", str(_GRACE_S), "--exit-code-on-error", "0"),
        *("--rows", str(rows_file), "--prompt-seed", str(settings.prompt_seed)),
    ]
    title = f"load {suite}, {settings.users} user{'s' if settings.users > 1 else ''}, {target.model}"
    with log.open("wb") as log_file, progress(title, total_s, "s") as tick:
        locust = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file)
        started = None
        try:
            while locust.poll() is None:
                time.sleep(0.5)
                if started is None and rows_file.exists():
                    started = time.monotonic()
                if started is not None:
                    elapsed = time.monotonic() - started
                    tick(min(elapsed, total_s), note="letting the last requests end" if elapsed > total_s else "")
                    if elapsed > total_s + _GRACE_S + 30:
                        raise UserError("load", suite, "did not end in time", f"read {log}")
        finally:
            if locust.poll() is None:
                locust.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    locust.wait(_TERMINATE_S)
                locust.kill()
                locust.wait()
    if locust.returncode != 0 or not rows_file.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise UserError("load", suite, f"failed ({lines[-1] if lines else 'no output'})", f"read {log}")
