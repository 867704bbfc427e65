"""Settings of a load test: the traffic, the requests, the objectives, and the command line's own options."""

from __future__ import annotations

from pathlib import Path

from slimserve.core.config import Duration, Settings, setting
from slimserve.core.errors import UserError
from slimserve.loadtest.arrivals import Arrival, TraceUnit, parse_rate, read_trace, scheduled_times
from slimserve.loadtest.slo import parse_objective
from slimserve.workloads.interface import SizeDistribution

_TRAFFIC, _REQUESTS, _GOALS, _CLUSTER = (
    "Traffic",
    "Requests",
    "Objectives and searches",
    "Several processes or machines",
)


class SuiteOptions(Settings):
    """How a suite makes its requests. Sizes are written 16, 8..32 (uniform) or 8,16,32 (one of these)."""

    endpoint: str = setting(
        "auto",
        "Scoring endpoint: score, rerank, generative_scoring, completions, or auto for the first that the server has.",
        panel=_REQUESTS,
    )
    history: str = setting("24", "Number of items in a user's history: 24, 8..32 or 8,16,32.", panel=_REQUESTS)
    candidates: str = setting("16", "Number of candidate items per request: 16, 8..32 or 8,16,32.", panel=_REQUESTS)
    repeat_visits: float = setting(
        0.0, "Fraction of requests that repeat a history of an earlier request.", panel=_REQUESTS, ge=0, lt=1
    )
    max_tokens: str = setting("160", "Maximum tokens of an answer: 160, 64..256 or 64,256.", panel=_REQUESTS)
    exact_tokens: bool = setting(
        False, "Continue every answer up to --max-tokens (vLLM's ignore_eos).", panel=_REQUESTS
    )
    share: float = setting(0.5, "Fraction of scoring requests in the mixed suite.", panel=_REQUESTS, gt=0, lt=1)
    prompt_seed: int = setting(0, "Random seed for the order of prompts.", panel=_REQUESTS)
    first_prompt: int = setting(
        0, "Number of the first prompt; a later start avoids prompts of an earlier run.", panel=_REQUESTS, ge=0
    )
    data: str = setting("", "JSONL file of conversations, or a folder of atomic files with ratings.", panel=_REQUESTS)
    item_tokens: str = setting(
        "", "Directory of the served variant; items in its catalogue are sent as item tokens.", panel=_REQUESTS
    )


class LoadSettings(Settings):
    """One load run: an open loop if `rate` or `trace` is given, else a closed loop of `users`."""

    rate: str = setting(
        "",
        "Open-loop request rate in requests/s: 5, 1..20 (linear ramp) or 5@0,20@30 (steps at these seconds).",
        panel=_TRAFFIC,
    )
    arrival: Arrival = setting("poisson", "Distribution of the times between open-loop requests.", panel=_TRAFFIC)
    burstiness: float = setting(1.0, "Variance of gamma arrivals relative to Poisson arrivals.", panel=_TRAFFIC)
    trace: str = setting("", "File of timestamps to replay as an open loop.", panel=_TRAFFIC, metavar="FILE")
    trace_unit: TraceUnit = setting(
        "auto",
        "Unit of the trace's numbers; auto knows dialects and times since 1970, and means seconds otherwise.",
        panel=_TRAFFIC,
    )
    users: int = setting(
        4, "Number of closed-loop users; each sends a request when its last one is answered.", panel=_TRAFFIC, ge=1
    )
    duration_s: Duration = setting(60.0, "Length of the measured window.", option="--duration", panel=_TRAFFIC, gt=0)
    warmup_s: Duration = setting(5.0, "Length of the load before the window.", option="--warmup", panel=_TRAFFIC, ge=0)
    cooldown_s: Duration = setting(
        2.0, "Length of the load after the window.", option="--cooldown", panel=_TRAFFIC, ge=0
    )
    timeout_s: Duration = setting(
        300.0, "Longest wait for an answer, from when its request is sent.", option="--timeout", panel=_TRAFFIC, gt=0
    )
    seed: int = setting(0, "Random seed for arrival times.", panel=_TRAFFIC)
    processes: int = setting(1, "Number of Locust worker processes that share the load.", panel=_CLUSTER, ge=1)
    slos: tuple[str, ...] = setting(
        (),
        "Objective such as ttft_p99=500ms, itl_p95=50ms, tpot_mean=40ms, e2e_p50=2s, answer_p90=1s or errors=1%. "
        "May be repeated; a missed objective ends with exit code 1.",
        option="--slo",
        panel=_GOALS,
        metavar="OBJECTIVE",
    )
    price_per_hour: float | None = setting(
        None, "Price of the server per hour, to report the cost per token, item and answer.", panel=_GOALS, ge=0
    )
    suite: SuiteOptions = SuiteOptions()

    @property
    def is_open_loop(self) -> bool:
        return bool(self.rate or self.trace)

    @property
    def total_s(self) -> float:
        """Seconds of load: warm-up, measured window and cool-down."""
        return self.warmup_s + self.duration_s + self.cooldown_s

    def check(self) -> None:
        """Raise UserError for the first setting that does not describe a load."""
        if self.rate and self.trace:
            raise UserError("--trace", self.trace, "conflicts with --rate", "give only one of them")
        for text in self.slos:
            parse_objective(text)
        for option, size in (
            ("--history", self.suite.history),
            ("--candidates", self.suite.candidates),
            ("--max-tokens", self.suite.max_tokens),
        ):
            SizeDistribution(option, size)
        if self.is_open_loop:
            self.scheduled_s()

    def scheduled_s(self) -> list[float]:
        """Return the scheduled time of each open-loop request in seconds from the start."""
        if self.trace:
            return read_trace(Path(self.trace), self.trace_unit).until(self.total_s)
        return scheduled_times(parse_rate(self.rate, self.total_s), self.arrival, self.burstiness, self.seed)


class LoadtestOptions(Settings):
    """Options of `slimserve loadtest`."""

    url: str = setting(..., "Address of the server, such as http://127.0.0.1:8000.")
    model: str | None = setting(None, "Model name on the server (default: its only model).")
    output: Path | None = setting(
        None,
        "Folder for the report, metrics and raw rows (default: a new folder in results/).",
        option=("-o", "--output"),
    )
    load: LoadSettings = LoadSettings()
    find_max_rate: bool = setting(False, "Search for the highest rate that meets every --slo.", panel=_GOALS)
    sweep: str = setting(
        "", "Run once at each of these rates and plot their curve.", panel=_GOALS, metavar="RATE,RATE,…"
    )
    calibrate: bool = setting(
        False, "First measure this client's own error against a mock server of known latency.", panel=_GOALS
    )
    master: int = setting(
        0, "Be the Locust master of N workers that are started elsewhere.", panel=_CLUSTER, metavar="N"
    )
    master_host: str = setting("127.0.0.1", "Address where the master listens for workers.", panel=_CLUSTER)
    master_port: int = setting(5557, "Port where the master listens for workers.", panel=_CLUSTER)


def suite_arguments(options: SuiteOptions) -> list[str]:
    """Return the options as command-line arguments of a locustfile."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in options]
