"""The part of the suites that runs inside Locust: options, the traffic of one process, and the collection of its rows.

In an open loop a dispatcher sends each request at its scheduled time, regardless of earlier ones; Locust's users idle.
In a closed loop each user sends its next request when the last one is answered. With Locust's master and workers, each
worker sends its share (every k-th request, or its users) and sends its raw rows to the master. So metrics over several
workers are as exact as over one process.

Locust logs the exceptions of listeners and greenlets and continues, so a run would wait for a worker that failed. Here
every function that Locust or gevent calls is guarded: its exception ends the run, with the reason in the client report.
"""

from __future__ import annotations

import functools
import gc
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import msgspec
from gevent.event import Event
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from slimserve.core.config import validated
from slimserve.core.errors import UserError, exception_text
from slimserve.core.openai_client import auth_headers
from slimserve.loadtest.client import ModelClient, PreparedRequest
from slimserve.loadtest.prompts import MAX_PROMPTS, make_prompts
from slimserve.loadtest.rows import Row, encode_row
from slimserve.loadtest.settings import LoadSettings, SuiteOptions
from slimserve.loadtest.stall import StallWatch
from slimserve.loadtest.timer import Timer
from slimserve.workloads.interface import Prompt

_TRAFFIC_FIELDS = ("rate", "arrival", "burstiness", "trace", "trace_unit", "timeout_s", "seed")
"""Fields of `LoadSettings` that are options of the locustfiles as well."""
_PAUSE_AFTER_FAILURE_S = 0.5
"""Pause of a closed-loop user after a failure, so that a server that rejects at once causes no busy loop."""
_SEND_INTERVAL_S = 0.5
"""Seconds between two transfers of rows from a worker to the master."""
_START_DELAY_S = 0.5
"""Seconds from when all processes are ready until the load begins, so that every worker gets the message."""
_TIMEOUT_MARGIN_S = 10.0
"""Seconds after the timeout within which every request has ended."""
_NO_WORKER_TIMEOUT_S = 4.0
"""Seconds without all workers after which a master gives up; Locust notices the loss of one after 3 s."""


def _guarded(function: Callable[..., object]) -> Callable[..., None]:
    """Return a function that takes the environment first and ends the run with the reason if `function` raises."""

    @functools.wraps(function)
    def run(environment: Environment, *arguments: Any, **options: Any) -> None:
        try:
            function(environment, *arguments, **options)
        except (Exception, SystemExit) as error:  # a workload's code may raise anything, or exit
            _fail(environment, error)

    return run


def _fail(environment: Environment, error: BaseException) -> None:
    """End the run with an error; that of a worker goes to its master."""
    if not isinstance(error, UserError):
        logging.getLogger("slimserve").error("the load ends because of an exception", exc_info=error)
        error = UserError("load", environment.parsed_options.suite, f"failed ({exception_text(error)})", "")
    logging.getLogger("slimserve").error("%s", error)
    reason = {"field": error.field, "value": str(error.value), "problem": error.problem, "remedy": error.remedy}
    environment.process_exit_code = 2
    sink = getattr(environment, "slimserve_sink", None)
    if isinstance(environment.runner, WorkerRunner):
        environment.runner.send_message("slimserve_failed", reason)
    elif sink is not None:
        sink.fail(reason)
    else:
        gevent.spawn(environment.runner.quit)


class SuiteUser(User):
    """Base class of the suites' Locust users."""

    abstract = True
    suite: str
    environment: Environment

    @task
    def send_requests(self) -> None:
        """Send one request after another in a closed loop; in an open loop the dispatcher sends them."""
        run: TrafficRun = self.environment.slimserve_run
        run.begun.wait()
        if run.is_open_loop or run.is_over:
            gevent.sleep(1)
        else:
            _guarded(lambda _: run.send_next())(self.environment)


class TrafficRun:
    """The traffic of one run in this process."""

    def __init__(self, environment: Environment) -> None:
        options: Any = environment.parsed_options
        self.begun = Event()
        self.is_over = False
        self.is_open_loop = bool(options.rate or options.trace)
        self.num_running = 0
        self._environment = environment
        self._suite: str = options.suite
        self._seconds: float = options.load_seconds
        self._settings: LoadSettings
        self._client: ModelClient
        self._requests: Iterator[PreparedRequest]
        self._scheduled_s: list[float] = []
        self._epoch = 0.0
        self._cpu_begin_s = 0.0

    def prepare(self) -> None:
        """Prepare every request before the load, so that this takes no time during it."""
        options = self._environment.parsed_options
        settings = self._settings = settings_of(options)
        if self.is_open_loop and not self._seconds:
            raise UserError(
                "--load-seconds", "", "is missing", "give the length of the open loop, such as --load-seconds 60"
            )
        self._client = ModelClient(
            str(self._environment.host), options.model, auth_headers(), settings.timeout_s, settings.suite.endpoint
        )
        if self.is_open_loop:
            self._scheduled_s = settings.scheduled_s()
        count = min(len(self._scheduled_s), MAX_PROMPTS) if self.is_open_loop else MAX_PROMPTS
        # In a thread, because Locust's master drops a worker that does not respond for three seconds.
        prompts = gevent.get_hub().threadpool.spawn(make_prompts, self._suite, settings.suite, count).get()
        self._client.prepare([prompt for _, prompt in prompts])
        self._prepared = [self._make_request(number, kind, prompt) for number, (kind, prompt) in enumerate(prompts)]
        gc.collect()
        gc.freeze()  # garbage collections during the load skip the prepared requests

    def _make_request(self, number: int, kind: str, prompt: Prompt) -> PreparedRequest:
        try:
            return self._client.make_request(number, kind, prompt, self._settings.suite.exact_tokens)
        except (TypeError, ValueError) as error:  # such as half a surrogate pair in a text
            problem = f"cannot be sent as JSON ({exception_text(error)})"
            raise UserError(kind, f"prompt {number + 1}", problem, "correct the data") from error

    def begin(self, epoch: float, index: int, count: int) -> None:
        """Begin at `epoch` (perf_counter) as worker `index` of `count`; each sends every `count`-th request."""
        self._epoch = epoch
        self._requests = itertools.islice(itertools.cycle(self._prepared), index, None, count)
        self._cpu_begin_s = time.process_time()
        self._spawn(self._dispatch, self._scheduled_s[index::count])

    def _spawn(self, function: Callable[..., object], *arguments: object) -> Any:
        return gevent.spawn(_guarded(lambda _: function(*arguments)), self._environment)

    def send_next(self) -> None:
        """Send the next request of a closed loop."""
        row = self._send(next(self._requests), time.perf_counter() - self._epoch)
        if row.error:
            gevent.sleep(_PAUSE_AFTER_FAILURE_S)

    def cpu_frac(self) -> float:
        """Return the CPU seconds per wall-clock second of this process since the load began."""
        return (time.process_time() - self._cpu_begin_s) / max(time.perf_counter() - self._epoch, 1e-3)

    def _dispatch(self, scheduled_s: list[float]) -> None:
        """Begin the load, send its scheduled requests, end it, and wait for the requests in flight."""
        self._environment.slimserve_sink.begin()
        timer = Timer()
        timer.wait_until(self._epoch)
        watch = StallWatch(self._epoch)
        watching = gevent.spawn(watch.run)
        self.begun.set()
        for at_s in scheduled_s:
            timer.wait_until(self._epoch + at_s)
            if self.is_over:
                break
            self._spawn(self._send, next(self._requests), at_s)
        if self._seconds:
            timer.wait_until(self._epoch + self._seconds)
        timer.close()
        if not self._seconds and not self.is_open_loop:
            return
        self.is_over = True
        cpu_frac = self.cpu_frac()
        deadline_s = time.perf_counter() + self._settings.timeout_s + _TIMEOUT_MARGIN_S
        while self.num_running and time.perf_counter() < deadline_s:
            gevent.sleep(0.02)
        watching.kill()
        watch.tick()
        sentences = [[*key, count] for key, count in self._client.sentences.items()]
        self._environment.slimserve_sink.end({"cpu_frac": cpu_frac, "stalls": watch.stalls, "sentences": sentences})

    def _send(self, request: PreparedRequest, scheduled_s: float) -> Row:
        self.num_running += 1
        try:
            row = self._client.send(request, scheduled_s, self._epoch)
        finally:
            self.num_running -= 1
        self._environment.slimserve_sink.keep(row)
        self._report(request.path, row)
        return row

    def _report(self, path: str, row: Row) -> None:
        """Report the row to Locust's statistics and web page; TTFT and ITL are separate entries."""
        failure = RuntimeError(row.error) if row.error else None
        self._environment.events.request.fire(
            request_type="POST",
            name=path,
            response_time=row.e2e_s * 1000,
            response_length=0,
            exception=failure,
            context={},
        )
        if row.ttft_s is None or failure:
            return
        stats = self._environment.stats
        stats.get(path, "TTFT").log(round(row.ttft_s * 1000), 0)
        gaps = stats.get(path, "ITL")
        for gap in row.inter_token_gaps_s():
            gaps.log(gap * 1000, 0)


class RowFile:
    """Writes the rows of a run to a file: those of a single process, or in the master those of all workers."""

    def __init__(self, environment: Environment) -> None:
        options: Any = environment.parsed_options
        self._environment = environment
        self._file = Path(options.rows).open("wb") if options.rows else None  # noqa: SIM115  # stays open for the run
        self._report = options.client_report
        self._num_processes = 1
        self._has_failed = False
        self._ended: list[dict[str, Any]] = []

    def expect(self, num_workers: int) -> None:
        self._num_processes = num_workers

    def begin(self) -> None:
        """Note that the load has begun."""
        self._write_report({"begun": True})

    def fail(self, reason: dict[str, str]) -> None:
        """End the run because of an error; the first one is reported."""
        if not self._has_failed:
            self._has_failed = True
            self._write_report({"failure": reason})
        self._environment.process_exit_code = 2
        gevent.spawn(self.stop)  # from a greenlet of its own, because stopping ends those of the users

    def keep(self, row: Row) -> None:
        self.keep_lines(encode_row(row))

    def keep_lines(self, lines: bytes) -> None:
        if self._file:
            self._file.write(lines)
            self._file.flush()

    def end(self, process: dict[str, Any]) -> None:
        """Note that one process has ended its load, with facts about it; the last one ends the run."""
        self._ended.append(process)
        if len(self._ended) < self._num_processes:
            return
        sentences: Counter[tuple[str, str]] = Counter()
        for one in self._ended:
            for error, sentence, count in one["sentences"]:
                sentences[error, sentence] += count
        self._write_report(
            {
                "begun": True,
                "num_processes": len(self._ended),
                "cpu_frac": max(one["cpu_frac"] for one in self._ended),
                "stalls": [stall for one in self._ended for stall in one["stalls"]],
                "sentences": [[*key, count] for key, count in sentences.most_common()],
            }
        )
        self.stop()

    def _write_report(self, report: dict[str, Any]) -> None:
        if self._report and (not self._has_failed or "failure" in report):
            Path(self._report).write_bytes(msgspec.json.encode(report))

    def stop(self) -> None:
        """End the run; with Locust's web page, stop the load but keep the page."""
        if self._environment.parsed_options.headless:
            self._environment.runner.quit()
        else:
            self._environment.runner.stop()


class RowSender:
    """Sends the rows of a worker to the master in batches."""

    def __init__(self, runner: WorkerRunner) -> None:
        self._runner = runner
        self._lines: list[bytes] = []
        gevent.spawn(self._send_regularly)

    def begin(self) -> None:
        """Do nothing, since the master itself begins the load."""

    def keep(self, row: Row) -> None:
        self._lines.append(encode_row(row))

    def end(self, process: dict[str, Any]) -> None:
        self._flush()
        self._runner.send_message("slimserve_end", process)

    def _send_regularly(self) -> None:
        while True:
            gevent.sleep(_SEND_INTERVAL_S)
            self._flush()

    def _flush(self) -> None:
        if self._lines:
            lines, self._lines = b"".join(self._lines), []
            self._runner.send_message("slimserve_rows", lines)


def settings_of(options: Any) -> LoadSettings:
    """Return the settings from Locust's parsed options; UserError names an invalid one."""
    document: dict[str, Any] = {name: getattr(options, name.removesuffix("_s")) for name in _TRAFFIC_FIELDS}
    document |= {"warmup_s": 0.0, "cooldown_s": 0.0}
    if options.load_seconds:
        document["duration_s"] = options.load_seconds
    document["suite"] = {name: getattr(options, name) for name in SuiteOptions.model_fields}
    return validated(LoadSettings, document, "load", "the options")


def register(user: type[SuiteUser]) -> None:
    """Register a suite's options and event listeners with Locust."""

    @events.init_command_line_parser.add_listener
    def _add_options(parser: LocustArgumentParser) -> None:
        add = parser.add_argument
        add("--suite", default=user.suite, help="workload that supplies the requests: a name or a .py file")
        add("--model", default="", help="model name on the server's API (all but workers need it)")
        add("--rows", default="", help="write one JSON line per request to this file")
        add("--client-report", default="", help="write facts about the client's processes to this file")
        add("--load-seconds", type=float, default=0.0, help="length of the load; an open loop needs it")
        shared = {name: LoadSettings.model_fields[name] for name in _TRAFFIC_FIELDS}
        for name, field in {**shared, **SuiteOptions.model_fields}.items():
            kind = _flag if isinstance(field.default, bool) else type(field.default)
            flag = f"--{name.removesuffix('_s').replace('_', '-')}"
            add(flag, type=kind, default=field.default, help=(field.description or "").replace("%", "%%"))

    @events.init.add_listener
    def _register_messages(environment: Environment, runner: Any, **_: object) -> None:
        if isinstance(runner, WorkerRunner):
            environment.slimserve_sink = RowSender(runner)
            runner.register_message("slimserve_begin", _begin_worker)
        elif isinstance(runner, MasterRunner):
            runner.register_message("slimserve_ready", _note_ready)
            runner.register_message("slimserve_rows", _keep_rows)
            runner.register_message("slimserve_failed", _note_failed)
            runner.register_message("slimserve_end", _note_end)

    @events.test_start.add_listener
    @_guarded
    def _start(environment: Environment, **_: object) -> None:
        runner = environment.runner
        if isinstance(runner, MasterRunner):
            environment.slimserve_sink = RowFile(environment)
            environment.slimserve_ready, environment.slimserve_ended = set(), set()
            gevent.spawn(_guarded(_lead_workers), environment)
            return
        run = environment.slimserve_run = TrafficRun(environment)
        if isinstance(runner, WorkerRunner):
            gevent.spawn(_guarded(_prepare_worker), environment)
        else:
            environment.slimserve_sink = RowFile(environment)
            run.prepare()
            run.begin(time.perf_counter() + _START_DELAY_S, 0, 1)

    @events.test_stopping.add_listener
    def _stop(environment: Environment, **_: object) -> None:
        run = getattr(environment, "slimserve_run", None)
        if run is not None:
            run.is_over = True
            run.begun.set()  # users that wait for a load that never begins would delay the end


def _flag(text: str) -> bool:
    return text.lower() in {"1", "true", "yes"}


def _prepare_worker(environment: Environment) -> None:
    environment.slimserve_run.prepare()
    environment.runner.send_message("slimserve_ready")


def _lead_workers(environment: Environment) -> None:
    """Start all workers at the same time when all are ready; end the run when all remaining workers have ended."""
    runner = environment.runner
    options: Any = environment.parsed_options
    expected = max(options.expect_workers, 1) if options.headless else 1
    complete_s = time.perf_counter()
    while len(alive := _alive(runner)) < expected or not alive <= environment.slimserve_ready:
        if len(alive) >= expected:
            complete_s = time.perf_counter()
        elif time.perf_counter() - complete_s > _NO_WORKER_TIMEOUT_S:
            problem = f"has {len(alive)} of {expected} workers, as the others ended before the load began"
            raise UserError("load", options.suite, problem, "")
        gevent.sleep(0.1)
    environment.slimserve_sink.expect(len(alive))
    environment.slimserve_sink.begin()
    at = time.time() + _START_DELAY_S
    for index, worker in enumerate(sorted(alive)):
        runner.send_message("slimserve_begin", {"at": at, "index": index, "count": len(alive)}, worker)
    while _alive(runner) - environment.slimserve_ended:
        gevent.sleep(0.5)
    if len(environment.slimserve_ended) < len(alive):
        environment.slimserve_sink.stop()


def _alive(runner: MasterRunner) -> set[str]:
    clients = runner.clients
    return {node.id for node in (*clients.ready, *clients.spawning, *clients.running)}


@_guarded
def _note_ready(environment: Environment, msg: Any, **_: object) -> None:
    environment.slimserve_ready.add(msg.node_id)


@_guarded
def _keep_rows(environment: Environment, msg: Any, **_: object) -> None:
    environment.slimserve_sink.keep_lines(msg.data)


@_guarded
def _note_end(environment: Environment, msg: Any, **_: object) -> None:
    environment.slimserve_ended.add(msg.node_id)
    environment.slimserve_sink.end(msg.data)


@_guarded
def _note_failed(environment: Environment, msg: Any, **_: object) -> None:
    environment.slimserve_sink.fail(msg.data)


@_guarded
def _begin_worker(environment: Environment, msg: Any, **_: object) -> None:
    """Begin at the time of the master's clock; differences between machines' clocks shift their requests."""
    epoch = time.perf_counter() + msg.data["at"] - time.time()
    environment.slimserve_run.begin(epoch, msg.data["index"], msg.data["count"])
