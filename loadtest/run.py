"""Run a suite headless in Locust processes of its own, then turn its rows into a summary, a result file and a page."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import msgspec

from slimserve.core.errors import UserError
from slimserve.core.openai_client import Target
from slimserve.core.progress import ProgressCallback, print_status, progress
from slimserve.core.provenance import provenance
from slimserve.core.storage import write_atomically
from slimserve.loadtest.prompts import MIXED, make_prompts, suite_name, suite_names
from slimserve.loadtest.rows import Row, read_rows, decode_row
from slimserve.loadtest.server_metrics import ServerMonitor, disagreements
from slimserve.loadtest.settings import LoadSettings, suite_arguments
from slimserve.loadtest.slo import goodput, parse_objective
from slimserve.loadtest.summary import ClientCounts, LoadSummary, percentile, summarize
from slimserve.workloads import is_workload, load_workload, workload_argument
from slimserve.workloads.interface import Answer, ChatAnswer, Estimate, Prompt
from slimserve.workloads.metrics import evaluate

_BEGIN_S = 120.0
"""Longest that Locust may take to its first row, beside the time that an answer takes."""
_TERMINATE_S = 10
_LOOK_S = 0.5
_MOST_LAG_S = 0.010
_MOST_LAG_FRAC = 0.1
_MOST_CPU_FRAC = 0.9


OnResult = Callable[[Mapping[str, Any], Sequence[Row], Path], object]
"""Called with the result document, the rows and the output folder of a run."""


@dataclass(frozen=True)
class Cluster:
    """Locust's own distribution over machines: this process is the master of workers that others start."""

    expect_workers: int
    bind_host: str = "127.0.0.1"
    bind_port: int = 5557


@dataclass
class _Interruption:
    """Filled in where a person ended the load early."""

    after_s: float | None = None
    exits: list[SystemExit] = field(default_factory=list)


def run_suite(
    suite: str,
    target: Target,
    settings: LoadSettings,
    output: Path,
    *,
    cluster: Cluster | None = None,
    calibration: Mapping[str, Any] | None = None,
    on_result: OnResult | None = None,
) -> tuple[LoadSummary, list[Row]]:
    """Load `target` and return the summary and the raw rows, which are also written to `output`.

    Writes `NAME.rows.jsonl` (one line per request), `NAME.json` (summary, settings and provenance) and Locust's log,
    where NAME is the workload's name, and calls `on_result` with the document, the rows and the folder. An interrupt
    ends the load; the results so far are summarized and written, then the interrupt is raised again. Raises UserError
    if the suite or a setting is invalid, or if Locust fails.
    """
    if suite != MIXED and not is_workload(suite):
        raise UserError("suite", suite, "is unknown", f"choose from {', '.join(suite_names())}")
    settings.check()
    make_prompts(suite, settings.suite, 1)  # bad data is rejected before any work
    output.mkdir(parents=True, exist_ok=True)
    name = suite_name(suite)
    rows_file = output / f"{name}.rows.jsonl"
    report_file = output / f".{name}.client.json"
    for file in (rows_file, report_file):
        file.unlink(missing_ok=True)
    arguments = _locust_arguments(suite, target, settings, rows_file, report_file, cluster)
    interruption = _Interruption()
    with ServerMonitor(target) as watch:
        _run_locust(arguments, _title(suite, target, settings), settings, rows_file, interruption)
    rows = read_rows(rows_file) if rows_file.exists() else []
    told = msgspec.json.decode(report_file.read_bytes()) if report_file.exists() else {}
    report_file.unlink(missing_ok=True)
    summary = _summarize(suite, settings, rows, watch, told, interruption.after_s)
    more = {"calibration": dict(calibration)} if calibration else {}
    document = write_document(output / f"{name}.json", name, target, settings, {**more, "summary": summary.as_dict()})
    if on_result is not None:
        on_result(document, rows, output)
    if interruption.exits:
        print_status(f"interrupted; the results so far are in {output}")
        raise interruption.exits[0]
    return summary, rows


def write_document(
    file: Path, suite: str, target: Target, settings: LoadSettings, found: Mapping[str, Any]
) -> dict[str, Any]:
    """Write results with their settings and provenance, and return the document as a reader would get it."""
    asked = {"command": "loadtest", "suite": suite, "target": asdict(target), "settings": settings.model_dump()}
    text = msgspec.json.encode({**asked, **provenance(), **found})
    write_atomically(file, msgspec.json.format(text, indent=2).decode() + "\n")
    return cast("dict[str, Any]", msgspec.json.decode(text))


def _summarize(
    suite: str,
    settings: LoadSettings,
    rows: Sequence[Row],
    watch: ServerMonitor,
    told: Mapping[str, Any],
    interrupted_after_s: float | None,
) -> LoadSummary:
    end_s = settings.warmup_s + settings.duration_s
    if interrupted_after_s is not None and rows:
        end_s = max(min(end_s, max(row.end_s for row in rows)), settings.warmup_s + 1e-3)
    summary = summarize(rows, settings.warmup_s, end_s)
    counts = watch.counts()
    client = ClientCounts(told.get("num_processes", 1), told.get("cpu_frac", 0.0), summary.client.send_lag)
    warnings = [*summary.warnings, *disagreements(rows, counts, summary.ttft_s, summary.itl_s)]
    if summary.num_repeats:
        warnings.append(
            f"{summary.num_repeats} of {len(rows)} requests repeated an earlier prompt, which a prefix cache answers: "
            "load for less long, or bring more data"
        )
    if any(row.output_tokens > sum(count for _, count in row.arrivals) for row in rows if row.error is None):
        warnings.append("the server does not count the tokens of each chunk: gaps and tokens/s are of chunks")
    invalid = _client_faults(summary, client)
    if interrupted_after_s is not None:
        invalid.append(f"interrupted after {interrupted_after_s:.0f} of {settings.total_s:.0f} s")
    elif not told:
        invalid.append("the load did not end by itself: a worker was lost")
    if not summary.num_requests:
        invalid.append("no request was due in the measured window")
    judged = _judge(suite, settings, rows, summary, end_s)
    return replace(judged, server=counts, client=client, warnings=warnings, invalid=invalid)


def _judge(suite: str, settings: LoadSettings, rows: Sequence[Row], summary: LoadSummary, end_s: float) -> LoadSummary:
    """The summary with what takes more than rows: objectives, quality of the answers, costs; of each kind too."""
    window = [row for row in rows if settings.warmup_s <= row.scheduled_s < end_s]
    objectives = [parse_objective(text) for text in settings.slos]
    numbers = max((row.prompt for row in rows), default=-1) + 1
    prompts = make_prompts(suite, settings.suite, numbers) if numbers else []
    price_per_s = settings.price_per_hour / 3600 if settings.price_per_hour is not None else None

    def judged(part: LoadSummary, of_part: Sequence[Row]) -> LoadSummary:
        quality, num_correct = _quality(of_part, prompts)
        return replace(
            part,
            objectives=[objective.judge(of_part) for objective in objectives],
            goodput_per_s=goodput(of_part, objectives, part.window_s) if objectives else None,
            quality=quality,
            num_correct=num_correct,
            costs=_costs(part, num_correct, price_per_s) if price_per_s is not None else {},
        )

    by_kind = {}
    for kind, part in summary.by_kind.items():
        found = judged(part, [row for row in window if row.kind == kind])
        # An objective of first tokens says nothing of slates.
        by_kind[kind] = replace(found, objectives=[one for one in found.objectives if one.value is not None])
    return replace(judged(summary, window), by_kind=by_kind)


def _quality(rows: Sequence[Row], prompts: Sequence[tuple[str, Prompt]]) -> tuple[dict[str, Estimate], int | None]:
    """The workload's own figures over the good answers of rows of one kind, and how many answers were right."""
    good = [row for row in rows if row.error is None and 0 <= row.prompt < len(prompts)]
    if len({row.kind for row in good}) != 1:
        return {}, None
    workload = load_workload(good[0].kind)
    answers: list[Answer] = [row.scores if row.num_items else ChatAnswer(row.text, row.output_tokens) for row in good]
    figures = evaluate(workload, [prompts[row.prompt][1] for row in good], answers)
    known = {name: figure for name, figure in figures.items() if figure.value == figure.value}
    accuracy = known.get("accuracy")
    return known, round(accuracy.value * accuracy.n) if accuracy else None


def _costs(part: LoadSummary, num_correct: int | None, price_per_s: float) -> dict[str, float]:
    """What the server's time costs per unit of what it brought."""
    rates = {
        "per_million_output_tokens": part.output_tokens_per_s / 1e6,
        "per_million_items": part.items_per_s / 1e6,
        "per_correct_answer": (num_correct or 0) / part.window_s,
    }
    return {name: price_per_s / rate for name, rate in rates.items() if rate > 0}


def _client_faults(summary: LoadSummary, client: ClientCounts) -> list[str]:
    """Why what was measured is the client's doing: late by a tenth of what it measured, or short of CPU."""
    faults = []
    felt = summary.ttft_s.p99 if summary.ttft_s.p99 is not None else summary.e2e_s.p99
    lag = client.send_lag.p99 if client.send_lag else None
    if lag is not None and lag > max(_MOST_LAG_S, _MOST_LAG_FRAC * (felt or 0.0)):
        faults.append(
            f"the client sent 1 request in 100 more than {lag * 1000:.0f} ms late: give it more processes "
            "(--processes), or a machine of its own"
        )
    if client.cpu_frac > _MOST_CPU_FRAC:
        faults.append(
            f"the client used {client.cpu_frac:.0%} of a core: give it more processes (--processes) or a lower rate"
        )
    return faults


def _title(suite: str, target: Target, settings: LoadSettings) -> str:
    if settings.is_open_loop:
        return f"load {suite}, {settings.trace or settings.rate + '/s'}, {target.model}"
    return f"load {suite}, {settings.users} user{'s' if settings.users > 1 else ''}, {target.model}"


def _locust_arguments(
    suite: str, target: Target, settings: LoadSettings, rows: Path, report: Path, cluster: Cluster | None
) -> list[str]:
    users = 1 if settings.is_open_loop else settings.users
    distributed: list[str] = []
    if cluster is not None:
        distributed += ["--master", "--expect-workers", str(cluster.expect_workers)]
        distributed += ["--master-bind-host", cluster.bind_host, "--master-bind-port", str(cluster.bind_port)]
    elif settings.processes > 1:
        distributed += ["--processes", str(settings.processes)]
    num_workers = cluster.expect_workers if cluster else settings.processes
    return [
        *("--headless", "--only-summary", "--skip-log-setup", *distributed),
        *("--locustfile", str(Path(__file__).parent / "suites" / "workload.py")),
        *("--suite", workload_argument(suite)),
        *("--host", target.url, "--model", target.model),
        *("--users", str(max(users, num_workers)), "--spawn-rate", str(max(users, num_workers))),
        *("--stop-timeout", str(_TERMINATE_S), "--exit-code-on-error", "0"),
        *("--rows", str(rows), "--client-report", str(report)),
        *("--load-seconds", str(settings.total_s), "--timeout", str(settings.timeout_s), "--seed", str(settings.seed)),
        *(f"--rate={settings.rate}", f"--arrival={settings.arrival}", f"--burstiness={settings.burstiness}"),
        *(f"--trace={settings.trace}", *suite_arguments(settings.suite)),
    ]


def _run_locust(
    arguments: Sequence[str], title: str, settings: LoadSettings, rows: Path, interruption: _Interruption
) -> None:
    log = rows.with_name(rows.name.replace(".rows.jsonl", ".locust.log"))
    with (
        log.open("wb") as log_file,
        progress(title, settings.total_s, "s") as tick,
        _locust(arguments, log_file) as locust,
    ):
        started = time.monotonic()
        view = _LiveView(rows, settings.total_s, tick)
        try:
            while locust.poll() is None:
                time.sleep(_LOOK_S)
                view.look()
                if time.monotonic() - started > _BEGIN_S + settings.total_s + settings.timeout_s:
                    raise UserError("load", title, "did not end in time", f"read {log}")
        except SystemExit as interrupt:
            interruption.after_s = view.elapsed_s
            interruption.exits.append(interrupt)
            return
    if locust.returncode != 0 or not rows.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise UserError("load", title, f"failed ({lines[-1] if lines else 'no output'})", f"read {log}")


@contextmanager
def _locust(arguments: Sequence[str], log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Locust in a session of its own: a Ctrl-C is for us, who end it in good order."""
    command = [sys.executable, "-m", "locust", *arguments]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_TERMINATE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # itself, if it did not end, and workers that outlived it
        process.wait()


class _LiveView:
    """What has come so far, read from the end of the row file as it grows."""

    def __init__(self, rows: Path, total_s: float, tick: ProgressCallback) -> None:
        self._rows = rows
        self._total_s = total_s
        self._tick = tick
        self._offset = 0
        self._seen: list[Row] = []
        self._num_requests = self._num_errors = 0
        self.elapsed_s = 0.0
        self._begun: float | None = None

    def look(self) -> None:
        if not self._rows.exists():
            return
        with self._rows.open("rb") as file:
            file.seek(self._offset)
            lines = file.read()
        whole, newline, _ = lines.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        new = [decode_row(line) for line in whole.split(b"\n") if line]
        self._num_requests += len(new)
        self._num_errors += sum(row.error is not None for row in new)
        if new and self._begun is None:
            self._begun = time.monotonic() - max(row.end_s for row in new)
        if self._begun is None:
            return
        self.elapsed_s = time.monotonic() - self._begun
        self._seen = [row for row in (*self._seen, *new) if row.end_s > self.elapsed_s - 10]
        note = "letting the last requests end" if self.elapsed_s > self._total_s else self._note()
        self._tick(min(self.elapsed_s, self._total_s), note=note)

    def _note(self) -> str:
        """Of the last ten seconds."""
        good = [row for row in self._seen if row.error is None]
        firsts = sorted(row.ttft_s for row in good if row.ttft_s is not None)
        ends = sorted(row.e2e_s for row in good)
        parts = [f"{self._num_requests} requests", f"{len(good) / min(10.0, max(self.elapsed_s, 1)):.1f}/s"]
        if firsts:
            parts.append(f"first token {percentile(firsts, 0.5) * 1000:.0f} ms")
        if ends:
            parts.append(f"p50 {percentile(ends, 0.5) * 1000:.0f} ms, p99 {percentile(ends, 0.99) * 1000:.0f} ms")
        return ", ".join([*parts, f"{self._num_errors} errors"])
