"""What the suites share: options, the prompts of a workload, and where measurements go."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import IO, Any

import gevent
from locust import User, events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

from loadtest.rows import Row, write_row
from loadtest.stream import TimedClient
from loadtest.target import auth_headers
from workloads import load_workload
from workloads.interface import Prompt

_MAX_PROMPTS = 1000
"""Enough that a run of minutes repeats no prompt, which the engine's prefix cache would answer."""
_PAUSE_AFTER_FAILURE_S = 0.5
"""A server that refuses at once must not turn the load into a busy loop."""


class WorkloadUser(User):
    """Base of a suite's user: closed loop, the next prompt as soon as the last is answered."""

    abstract = True
    workload: str
    environment: Environment

    def on_start(self) -> None:
        run: LoadRun = self.environment.slimserve_run
        self.run_state = run
        self.client = run.make_client()

    def report(self, path: str, row: Row) -> None:
        """Keep the raw row, and show its times in Locust's own statistics and web page."""
        self.run_state.keep(row)
        fire = self.environment.events.request.fire
        failure = RuntimeError(row.error) if row.error else None
        common: dict[str, Any] = {"name": path, "response_length": 0, "context": {}}
        fire(request_type="POST", response_time=row.e2e_s * 1000, exception=failure, **common)
        if row.ttft_s is not None and not failure:
            fire(request_type="TTFT", response_time=row.ttft_s * 1000, exception=None, **common)
            for gap in row.inter_token_gaps_s():
                fire(request_type="ITL", response_time=gap * 1000, exception=None, **common)
        if failure:
            gevent.sleep(_PAUSE_AFTER_FAILURE_S)


class LoadRun:
    """State of one run in this process: prompts in turn, the clock's zero, the open row file."""

    def __init__(self, environment: Environment, workload: str) -> None:
        options: Any = environment.parsed_options
        self.model: str = options.model
        self._rows: IO[str] | None = open(options.rows, "w", encoding="utf-8") if options.rows else None  # noqa: SIM115
        self._prompts: Iterator[Prompt] = itertools.cycle(
            load_workload(workload).make_prompts("load", _MAX_PROMPTS, seed=options.prompt_seed)
        )
        self._url = ""
        self._epoch = 0.0

    def start(self, url: str) -> None:
        """Begin to load `url`, which under Locust's web page is known only now."""
        self._url = url
        self._epoch = time.perf_counter()

    def next_prompt(self) -> Prompt:
        return next(self._prompts)

    def make_client(self) -> TimedClient:
        return TimedClient(self._url, auth_headers(), self._epoch)

    def keep(self, row: Row) -> None:
        if self._rows:
            write_row(self._rows, row)
            self._rows.flush()


def register(user: type[WorkloadUser]) -> None:
    """Hook a suite's user into Locust: its options, and a LoadRun per run."""

    @events.init_command_line_parser.add_listener
    def _add_options(parser: LocustArgumentParser) -> None:
        parser.add_argument("--model", required=True, help="model name on the server's API")
        parser.add_argument("--rows", default="", help="write one JSON line per request to this file")
        parser.add_argument("--load-seconds", type=float, default=0.0, help="stop so long after the first request")
        parser.add_argument("--prompt-seed", type=int, default=0, help="order of the workload's load prompts")

    @events.init.add_listener
    def _make_run(environment: Environment, **_: object) -> None:
        environment.slimserve_run = LoadRun(environment, user.workload)

    @events.test_start.add_listener
    def _start(environment: Environment, **_: object) -> None:
        environment.slimserve_run.start(environment.host)
        # Locust's own --run-time counts from before the users start, by up to a second.
        seconds = environment.parsed_options.load_seconds
        if seconds:
            gevent.spawn_later(seconds, environment.runner.quit)
