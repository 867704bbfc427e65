"""Service-level objectives: `ttft_p99=500ms` over a run, and per request for goodput."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from slimserve.core.errors import UserError
from slimserve.loadtest.rows import Row
from slimserve.loadtest.summary import ObjectiveResult, percentile

Metric = Literal["ttft", "itl", "tpot", "e2e", "answer"]
_OBJECTIVE = re.compile(r"([a-z0-9]+)_(p\d{1,2}(?:\.\d+)?|mean)\s*(?:<=|=|≤)\s*(\d+(?:\.\d+)?)(ms|s)")
_ERRORS = re.compile(r"errors\s*(?:<=|=|≤)\s*(\d+(?:\.\d+)?)%")
_SYNTAX = "write ttft_p99=500ms, itl_p99=50ms, tpot_p95=40ms, e2e_p50=2s or errors=1%"


@dataclass(frozen=True)
class Objective:
    """A bound on a statistic of the latencies of a run, in seconds; or on the share of failed requests."""

    text: str
    metric: Metric | Literal["errors"]
    frac: float | None
    """Percentile as a fraction; None: the mean."""
    limit: float

    def value_of(self, rows: Sequence[Row]) -> float | None:
        """The statistic over these rows; None where there is no sample, or where it falls on a request that failed."""
        if self.metric == "errors":
            return sum(row.error is not None for row in rows) / len(rows) if rows else None
        samples = [sample for row in rows for sample in samples_of(row, self.metric)]
        if not samples:
            return None
        value = sum(samples) / len(samples) if self.frac is None else percentile(sorted(samples), self.frac)
        return value if math.isfinite(value) else None

    def judge(self, rows: Sequence[Row]) -> ObjectiveResult:
        """Whether these rows keep the bound; where there is no sample, nothing is met."""
        value = self.value_of(rows)
        return ObjectiveResult(self.text, value, self.limit, value is not None and value <= self.limit)

    def is_met_by(self, row: Row) -> bool:
        """Whether one request keeps the bound: each of its samples for latencies, being answered for errors."""
        if self.metric == "errors":
            return row.error is None
        return all(sample <= self.limit for sample in samples_of(row, self.metric))


def parse_objective(text: str) -> Objective:
    """One objective as it is written on the command line; UserError where it is none."""
    if share := _ERRORS.fullmatch(text.strip()):
        return Objective(text, "errors", None, float(share[1]) / 100)
    match = _OBJECTIVE.fullmatch(text.strip())
    if match is None or match[1] not in get_args(Metric):
        raise UserError("--slo", text, "is no objective", _SYNTAX)
    metric: Metric = match[1]  # type: ignore[assignment]  # checked above
    frac = None if match[2] == "mean" else float(match[2][1:]) / 100
    return Objective(text, metric, frac, float(match[3]) / (1000 if match[4] == "ms" else 1))


def samples_of(row: Row, metric: Metric) -> list[float]:
    """The latencies of one request, in seconds: one of each kind, but one ITL per token after the first chunk.

    A failed request took for ever, so that a server gains nothing by refusing; so did an answer that never left its
    chain of thought.
    """
    if row.error is not None:
        return [math.inf]
    if metric == "e2e":
        return [row.e2e_s]
    if metric == "itl":
        return list(row.inter_token_gaps_s())
    if metric == "answer":
        if row.first_answer_s is not None:
            return [row.first_answer_s - row.scheduled_s]
        return [math.inf] if row.arrivals else []
    value = row.ttft_s if metric == "ttft" else row.tpot_s
    return [] if value is None else [value]


def goodput(rows: Sequence[Row], objectives: Sequence[Objective], window_s: float) -> float:
    """Requests per second that were answered within every objective; a failed one is never good."""
    return sum(all(objective.is_met_by(row) for objective in objectives) for row in rows) / window_s
