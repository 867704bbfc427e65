"""What a load run is asked for: the shape of its traffic and of its requests, checked before anything is sent."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from slimserve.core.errors import UserError
from slimserve.loadtest.arrivals import Arrival, due_times, parse_rate, read_trace
from slimserve.loadtest.slo import parse_objective
from slimserve.workloads.interface import SizeDistribution

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class SuiteOptions:
    """How a suite makes its requests; sizes are written 16, 8..32 (each as likely) or 8,16,32 (one of these)."""

    endpoint: str = "auto"
    """How candidates are scored: score, rerank, generative_scoring, completions; auto: the first that is there."""
    history: str = "24"
    """Films in a member's history."""
    candidates: str = "16"
    """Candidates of a slate."""
    repeat_visits: float = 0.0
    """Share of slates whose history an earlier request has sent already."""
    max_tokens: str = "160"
    """Most tokens of an answer."""
    exact_tokens: bool = False
    """Whether answers go on past their end until max_tokens (vLLM's ignore_eos)."""
    share: float = 0.5
    """Of mixed traffic, the share of recommendation requests."""
    prompt_seed: int = 0
    """Of the order of prompts, and of all that is drawn for them."""
    first_prompt: int = 0
    """Where in that order a run begins, so that it asks others than an earlier one."""
    data: str = ""
    """chat: a JSONL file with `messages` or `prompt` per line; recommendation: a folder of atomic files."""


@dataclass(frozen=True)
class LoadSettings:
    """One run: open loop where `rate` or `trace` says when requests are due, else `users` that wait for answers."""

    rate: str = ""
    """Requests/s over time: 5, 1..20 (rising evenly) or 5@0,20@30,5@40 (from these seconds on)."""
    arrival: Arrival = "poisson"
    burstiness: float = 1.0
    """Variance of gamma gaps over that of Poisson arrivals."""
    trace: str = ""
    """File of timestamps to replay; `duration_s` cuts it."""
    users: int = 4
    duration_s: float = 60.0
    """Length of the measured window, after the warm-up."""
    warmup_s: float = 5.0
    cooldown_s: float = 2.0
    """How long the traffic goes on after the window, so that its last requests meet the same load as its first."""
    timeout_s: float = 300.0
    """Longest wait for an answer, from when it was sent."""
    seed: int = 0
    """Of arrivals."""
    processes: int = 1
    """Locust workers that share the load."""
    slos: tuple[str, ...] = ()
    price_per_hour: float | None = None
    """Of the server, in any currency."""
    suite: SuiteOptions = SuiteOptions()

    @property
    def is_open_loop(self) -> bool:
        return bool(self.rate or self.trace)

    @property
    def total_s(self) -> float:
        return self.warmup_s + self.duration_s + self.cooldown_s

    def check(self) -> None:
        """Raise UserError for the first setting that makes no load."""
        if self.rate and self.trace:
            raise UserError("--trace", self.trace, "says when requests are due, and so does --rate", "give one of them")
        bounds: list[tuple[str, float, Callable[[float], bool], str]] = [
            ("--users", self.users, lambda value: value >= 1, "give at least 1"),
            ("--processes", self.processes, lambda value: value >= 1, "give at least 1"),
            ("--duration", self.duration_s, lambda value: value > 0, "give seconds above 0"),
            ("--warmup", self.warmup_s, lambda value: value >= 0, "give 0 or more seconds"),
            ("--cooldown", self.cooldown_s, lambda value: value >= 0, "give 0 or more seconds"),
            ("--timeout", self.timeout_s, lambda value: value > 0, "give seconds above 0"),
            ("--repeat-visits", self.suite.repeat_visits, lambda value: 0 <= value < 1, "give a share from 0 to 0.99"),
            ("--first-prompt", self.suite.first_prompt, lambda value: value >= 0, "give 0 or more"),
            ("--share", self.suite.share, lambda value: 0 < value < 1, "give a share between 0 and 1"),
            ("--price-per-hour", self.price_per_hour or 0.0, lambda value: value >= 0, "give 0 or more"),
        ]
        for name, number, holds, remedy in bounds:
            if not holds(number):
                raise UserError(name, number, "makes no load", remedy)
        for text in self.slos:
            parse_objective(text)
        for name, size in (("--history", self.suite.history), ("--candidates", self.suite.candidates)):
            SizeDistribution(name, size)
        SizeDistribution("--max-tokens", self.suite.max_tokens)
        if self.is_open_loop:
            self.due_s()

    def due_s(self) -> list[float]:
        """When each request of an open loop is due, in seconds from the start."""
        if self.trace:
            return read_trace(Path(self.trace), self.total_s)
        return due_times(parse_rate(self.rate, self.total_s), self.arrival, self.burstiness, self.seed)


def parse_duration(name: str, text: str) -> float:
    """Seconds of `90`, `90s`, `1.5m`, `500ms` or `1h`."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise UserError(name, text, "is no length of time", "write 90, 90s, 1.5m or 500ms")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def suite_arguments(options: SuiteOptions) -> list[str]:
    """The options as arguments of a locustfile."""
    return [f"--{field.name.replace('_', '-')}={getattr(options, field.name)}" for field in fields(options)]
