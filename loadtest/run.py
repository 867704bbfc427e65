"""Runs a suite headless in its own Locust processes and summarizes its rows in a result file."""

from __future__ import annotations

import contextlib
import itertools
import math
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

from slimserve.core.errors import UserError, exception_text
from slimserve.core.openai_client import Target
from slimserve.core.progress import ProgressCallback, print_status, progress
from slimserve.core.provenance import provenance
from slimserve.core.statistics import percentile
from slimserve.core.storage import write_atomically
from slimserve.loadtest.arrivals import read_trace
from slimserve.loadtest.prompts import MIXED, make_prompts, suite_name, suite_names
from slimserve.loadtest.rows import Row, decode_row, read_rows
from slimserve.loadtest.server_metrics import ServerMonitor, disagreements
from slimserve.loadtest.settings import LoadSettings, suite_arguments
from slimserve.loadtest.slo import goodput, parse_objective
from slimserve.loadtest.stall import longest_stall_s
from slimserve.loadtest.summary import ClientCounts, LoadSummary, summarize
from slimserve.serve.policy.engine_log import failure_reason
from slimserve.workloads import is_workload, load_workload, workload_argument
from slimserve.workloads.interface import Answer, ChatAnswer, Estimate, Prompt
from slimserve.workloads.metrics import evaluate

_STARTUP_TIMEOUT_S = 120.0
"""Longest time for Locust to start and prepare the requests."""
_TERMINATE_S = 10
_POLL_INTERVAL_S = 0.5
_VIEW_S = 10.0
"""Seconds that the progress line covers."""
_MAX_LAG_S = 0.010
_MAX_LAG_FRAC = 0.1
_MAX_CPU_FRAC = 0.9
_MAX_STALL_S = 0.5

OnResult = Callable[[Mapping[str, Any], Sequence[Row], Path], object]
"""Called with the result document, the rows and the output folder of a run."""


@dataclass(frozen=True)
class Cluster:
    """Distribution over machines by Locust: this process is the master of workers that are started elsewhere."""

    expect_workers: int
    bind_host: str = "127.0.0.1"
    bind_port: int = 5557


@dataclass
class _Interruption:
    """Set when an interrupt ends the load early."""

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
    _check_workload(suite, settings)
    output.mkdir(parents=True, exist_ok=True)
    name = suite_name(suite)
    rows_file = output / f"{name}.rows.jsonl"
    report_file = output / f".{name}.client.json"
    for file in (rows_file, report_file):
        file.unlink(missing_ok=True)
    arguments = _locust_arguments(suite, target, settings, rows_file, report_file, cluster)
    interruption = _Interruption()
    notes = read_trace(Path(settings.trace), settings.trace_unit).notes(settings.total_s) if settings.trace else []
    for line in notes:
        print_status(line)
    with ServerMonitor(target) as monitor:
        _run_locust(arguments, _title(suite, target, settings), settings, rows_file, report_file, interruption)
    rows = read_rows(rows_file) if rows_file.exists() else []
    client_report = msgspec.json.decode(report_file.read_bytes()) if report_file.exists() else {}
    report_file.unlink(missing_ok=True)
    summary = _summarize(suite, settings, rows, monitor, client_report, interruption.after_s, notes)
    extra = {"calibration": dict(calibration)} if calibration else {}
    document = write_document(output / f"{name}.json", name, target, settings, {**extra, "summary": summary.as_dict()})
    if on_result is not None:
        on_result(document, rows, output)
    if interruption.exits:
        print_status(f"interrupted; the results so far are in {output}")
        raise interruption.exits[0]
    return summary, rows


def _check_workload(suite: str, settings: LoadSettings) -> None:
    """Make one prompt, so that most faults of the data are reported before any work."""
    try:
        make_prompts(suite, settings.suite, 1)
    except UserError:
        raise
    except Exception as error:  # a user's workload may raise anything
        problem = f"cannot make its requests ({exception_text(error)})"
        raise UserError("workload", suite, problem, "correct the workload or its data") from error


def write_document(
    file: Path, suite: str, target: Target, settings: LoadSettings, results: Mapping[str, Any]
) -> dict[str, Any]:
    """Write results with their settings and provenance, and return the document as a reader would get it."""
    request = {"command": "loadtest", "suite": suite, "target": asdict(target), "settings": settings.model_dump()}
    text = msgspec.json.encode({**request, **provenance(), **results})
    write_atomically(file, msgspec.json.format(text, indent=2).decode() + "\n")
    return cast("dict[str, Any]", msgspec.json.decode(text))


def _summarize(
    suite: str,
    settings: LoadSettings,
    rows: Sequence[Row],
    monitor: ServerMonitor,
    client_report: Mapping[str, Any],
    interrupted_after_s: float | None,
    notes: Sequence[str],
) -> LoadSummary:
    end_s = settings.warmup_s + settings.duration_s
    if interrupted_after_s is not None and rows:
        end_s = max(min(end_s, max(row.end_s for row in rows)), settings.warmup_s + 1e-3)
    summary = summarize(rows, settings.warmup_s, end_s)
    counts = monitor.counts()
    last_end_s = max((row.end_s for row in rows if row.scheduled_s < end_s), default=end_s)
    client = ClientCounts(
        client_report.get("num_processes", 1),
        client_report.get("cpu_frac", 0.0),
        summary.client.send_lag,
        longest_stall_s(client_report.get("stalls", []), settings.warmup_s, last_end_s),
    )
    warnings = [*summary.warnings, *disagreements(rows, counts, summary.ttft_s, summary.itl_s)]
    if summary.num_repeats:
        warnings.append(
            f"{summary.num_repeats} of {len(rows)} requests repeated an earlier prompt, which a prefix cache answers: "
            "use a shorter run or more data"
        )
    if any(
        row.arrivals and row.output_tokens > sum(count for _, count in row.arrivals)
        for row in rows
        if row.error is None
    ):
        warnings.append("the server does not count the tokens of each chunk: gaps and tokens/s refer to chunks")
    num_whole = sum(row.error is None and not row.num_items and not row.arrivals for row in rows)
    if num_whole:
        warnings.append(
            f"{num_whole} of {len(rows)} answers were not streamed, although the requests ask for a stream: "
            "they have no time to first token and no time between tokens"
        )
    warnings += notes
    sentences = _sentences(client_report, summary.errors)
    invalid = _client_faults(summary, client)
    if interrupted_after_s is not None:
        invalid.append(f"interrupted after {interrupted_after_s:.0f} of {settings.total_s:.0f} s")
    elif "num_processes" not in client_report:
        invalid.append("the load did not end by itself: a worker was lost")
    if not summary.num_requests:
        invalid.append("no request was scheduled in the measured window")
    elif not summary.num_succeeded:
        invalid.append(f"no request succeeded: {_most_frequent_error(summary.errors, sentences)}")
    try:
        summary = _evaluate(suite, settings, rows, summary, end_s)
    except Exception as error:  # a user's verifier may raise anything; the latencies are right nevertheless
        warnings.append(
            f"the answers could not be evaluated: {error if isinstance(error, UserError) else exception_text(error)}"
        )
    return replace(summary, server=counts, client=client, warnings=warnings, invalid=invalid, error_sentences=sentences)


def _sentences(client_report: Mapping[str, Any], errors: Mapping[str, int]) -> dict[str, str]:
    """Return the server's most frequent explanation of each kind of error."""
    sentences: dict[str, str] = {}
    for error, sentence, _ in client_report.get("sentences", []):  # the most frequent ones come first
        if sentence and error in errors:
            sentences.setdefault(error, sentence)
    return sentences


def _most_frequent_error(errors: Mapping[str, int], sentences: Mapping[str, str]) -> str:
    error, count = max(errors.items(), key=lambda entry: entry[1])
    quote = f": {sentences[error]}" if error in sentences else ""
    return f"{count} × {error}{quote}"


def _evaluate(
    suite: str, settings: LoadSettings, rows: Sequence[Row], summary: LoadSummary, end_s: float
) -> LoadSummary:
    """Return the summary with objectives, quality and costs, for the run and for each kind of request."""
    window = [row for row in rows if settings.warmup_s <= row.scheduled_s < end_s]
    objectives = [parse_objective(text) for text in settings.slos]
    num_prompts = max((row.prompt for row in rows), default=-1) + 1
    prompts = make_prompts(suite, settings.suite, num_prompts) if num_prompts else []
    price_per_s = settings.price_per_hour / 3600 if settings.price_per_hour is not None else None

    def evaluated(part: LoadSummary, part_rows: Sequence[Row]) -> LoadSummary:
        quality, num_correct = _quality(part_rows, prompts)
        return replace(
            part,
            objectives=[objective.evaluate(part_rows) for objective in objectives],
            goodput_per_s=goodput(part_rows, objectives, part.window_s) if objectives else None,
            quality=quality,
            num_correct=num_correct,
            costs=_costs(part, num_correct, price_per_s) if price_per_s is not None else {},
        )

    by_kind = {}
    for kind, part in summary.by_kind.items():
        of_kind = [row for row in rows if row.kind == kind]
        result = evaluated(part, [row for row in window if row.kind == kind])
        applies = [objective.applies_to(of_kind) for objective in objectives]
        by_kind[kind] = replace(result, objectives=list(itertools.compress(result.objectives, applies)))
    return replace(evaluated(summary, window), by_kind=by_kind)


def _quality(rows: Sequence[Row], prompts: Sequence[tuple[str, Prompt]]) -> tuple[dict[str, Estimate], int | None]:
    """Return the workload's metrics over the successful rows of one kind, and the number of correct answers."""
    good = [row for row in rows if row.error is None and 0 <= row.prompt < len(prompts)]
    if len({row.kind for row in good}) != 1:
        return {}, None
    workload = load_workload(good[0].kind)
    if not workload.evaluates_load:
        return {}, None
    answers: list[Answer] = [row.scores if row.num_items else ChatAnswer(row.text, row.output_tokens) for row in good]
    metrics = evaluate(workload, [prompts[row.prompt][1] for row in good], answers)
    known = {name: metric for name, metric in metrics.items() if not math.isnan(metric.value)}
    accuracy = known.get("accuracy")
    return known, round(accuracy.value * accuracy.n) if accuracy else None


def _costs(part: LoadSummary, num_correct: int | None, price_per_s: float) -> dict[str, float]:
    """Return the cost of the server's time per token, item and correct answer."""
    rates = {
        "per_million_output_tokens": part.output_tokens_per_s / 1e6,
        "per_million_items": part.items_per_s / 1e6,
        "per_correct_answer": (num_correct or 0) / part.window_s,
    }
    return {name: price_per_s / rate for name, rate in rates.items() if rate > 0}


def _client_faults(summary: LoadSummary, client: ClientCounts) -> list[str]:
    """Return the reasons why the client limited the measurement: it sent late, stood still, or was short of CPU."""
    faults = []
    latency = summary.ttft_s.p99 if summary.ttft_s.p99 is not None else summary.e2e_s.p99
    lag = client.send_lag.p99 if client.send_lag else None
    if lag is not None and lag > max(_MAX_LAG_S, _MAX_LAG_FRAC * (latency or 0.0)):
        faults.append(
            f"the client sent 1% of the requests more than {lag * 1000:.0f} ms late: give it more processes "
            "(--processes) or its own machine"
        )
    if client.longest_stall_s > _MAX_STALL_S:
        faults.append(
            f"the client stood still for {client.longest_stall_s:.1f} s, which delayed the requests of that time: "
            "free CPU for it, keep the machine awake, and repeat the run"
        )
    if client.cpu_frac > _MAX_CPU_FRAC:
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
        distributed += ["--expect-workers-max-wait", f"{_STARTUP_TIMEOUT_S:.0f}"]
        distributed += ["--master-bind-host", cluster.bind_host, "--master-bind-port", str(cluster.bind_port)]
    elif settings.processes > 1:
        distributed += ["--processes", str(settings.processes)]
    num_workers = cluster.expect_workers if cluster else settings.processes
    return [
        *("--headless", "--only-summary", "--skip-log-setup", *distributed),
        *("--locustfile", str(_locustfile(suite))),
        *("--suite", workload_argument(suite)),
        *("--host", target.url, "--model", target.model),
        *("--users", str(max(users, num_workers)), "--spawn-rate", str(max(users, num_workers))),
        *("--stop-timeout", str(_TERMINATE_S), "--exit-code-on-error", "0"),
        *("--rows", str(rows), "--client-report", str(report)),
        *("--load-seconds", str(settings.total_s), "--timeout", str(settings.timeout_s), "--seed", str(settings.seed)),
        *(f"--rate={settings.rate}", f"--arrival={settings.arrival}", f"--burstiness={settings.burstiness}"),
        *(f"--trace={settings.trace}", f"--trace-unit={settings.trace_unit}", *suite_arguments(settings.suite)),
    ]


def _locustfile(suite: str) -> Path:
    """Return the suite's own locustfile, because Locust's workers must have the same user class as their master."""
    folder = Path(__file__).parent / "suites"
    file = folder / f"{suite}.py"
    return file if file.is_file() else folder / "workload.py"


def _run_locust(
    arguments: Sequence[str],
    title: str,
    settings: LoadSettings,
    rows: Path,
    report: Path,
    interruption: _Interruption,
) -> None:
    """Run Locust to its end; UserError with its own reason if it fails or does not begin or end in time."""
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
                time.sleep(_POLL_INTERVAL_S)
                view.update()
                elapsed_s = time.monotonic() - started
                if elapsed_s > _STARTUP_TIMEOUT_S and not report.exists():
                    raise UserError("load", title, f"did not begin within {_STARTUP_TIMEOUT_S:.0f} s", f"read {log}")
                if elapsed_s > _STARTUP_TIMEOUT_S + settings.total_s + settings.timeout_s:
                    raise UserError("load", title, "did not end in time", f"read {log}")
        except SystemExit as interrupt:
            interruption.after_s = view.elapsed_s
            interruption.exits.append(interrupt)
            return
    failure = msgspec.json.decode(report.read_bytes()).get("failure") if report.exists() else None
    if failure:
        report.unlink()
        raise UserError(**{**failure, "remedy": failure["remedy"] or f"read {log}"})
    if locust.returncode != 0 or not rows.exists():
        output = log.read_text(encoding="utf-8", errors="replace")
        reason = failure_reason(output, locust.returncode, "Locust")
        problem = f"failed (exit status {locust.returncode}: {reason})"
        raise UserError("load", title.removeprefix("load "), problem, f"read {log}")


@contextmanager
def _locust(arguments: Sequence[str], log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run Locust in its own session, so that Ctrl-C reaches only this process, which then ends Locust in order."""
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
            os.killpg(process.pid, signal.SIGKILL)  # Locust, if it did not end, and its remaining workers
        process.wait()


class _LiveView:
    """The progress line of a run, computed from the growing row file."""

    def __init__(self, rows: Path, total_s: float, tick: ProgressCallback) -> None:
        self._rows = rows
        self._total_s = total_s
        self._tick = tick
        self._offset = 0
        self._recent: list[Row] = []
        self._num_requests = self._num_errors = 0
        self.elapsed_s = 0.0
        self._start: float | None = None

    def update(self) -> None:
        if not self._rows.exists():
            return
        with self._rows.open("rb") as file:
            file.seek(self._offset)
            lines = file.read()
        complete, newline, _ = lines.rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        new = [decode_row(line) for line in complete.split(b"\n") if line]
        self._num_requests += len(new)
        self._num_errors += sum(row.error is not None for row in new)
        if new and self._start is None:
            self._start = time.monotonic() - max(row.end_s for row in new)
        if self._start is None:
            return
        self.elapsed_s = time.monotonic() - self._start
        self._recent = [row for row in (*self._recent, *new) if row.end_s > self.elapsed_s - _VIEW_S]
        note = "waiting for the last requests" if self.elapsed_s > self._total_s else self._note()
        self._tick(min(self.elapsed_s, self._total_s), note=note)

    def _note(self) -> str:
        """Describe the last seconds of the run."""
        good = [row for row in self._recent if row.error is None]
        firsts = [row.ttft_s for row in good if row.ttft_s is not None]
        ends = [row.e2e_s for row in good]
        parts = [f"{self._num_requests} requests", f"{len(good) / min(_VIEW_S, max(self.elapsed_s, 1)):.1f}/s"]
        if firsts:
            parts.append(f"first token {percentile(firsts, 0.5) * 1000:.0f} ms")
        if ends:
            parts.append(f"p50 {percentile(ends, 0.5) * 1000:.0f} ms, p99 {percentile(ends, 0.99) * 1000:.0f} ms")
        return ", ".join([*parts, f"{self._num_errors} errors"])
