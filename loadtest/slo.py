"""Service-level objectives such as `ttft_p99=500ms`, evaluated over a run, and per request for goodput."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from slimserve.core.errors import UserError
from slimserve.core.statistics import percentile
from slimserve.loadtest.rows import Row
from slimserve.loadtest.summary import ObjectiveResult

Metric = Literal["ttft", "itl", "tpot", "e2e", "answer"]
_OBJECTIVE = re.compile(r"([a-z0-9]+)_(p\d{1,2}(?:\.\d+)?|mean)\s*(?:<=|=|≤)\s*(\d+(?:\.\d+)?)(ms|s)")
_ERRORS = re.compile(r"errors\s*(?:<=|=|≤)\s*(\d+(?:\.\d+)?)%")
_SYNTAX = "write ttft_p99=500ms, itl_p99=50ms, tpot_p95=40ms, e2e_p50=2s or errors=1%"


@dataclass(frozen=True)
class Objective:
    """An upper bound on a latency statistic of a run in seconds, or on the fraction of failed requests."""

    text: str
    metric: Metric | Literal["errors"]
    frac: float | None
    """Percentile as a fraction; None selects the mean."""
    limit: float

    def value_of(self, rows: Sequence[Row]) -> float | None:
        """Return the statistic over the rows; None if there is no sample or if it falls on a failed request."""
        if self.metric == "errors":
            return sum(row.error is not None for row in rows) / len(rows) if rows else None
        samples = [sample for row in rows for sample in samples_of(row, self.metric)]
        if not samples:
            return None
        value = sum(samples) / len(samples) if self.frac is None else percentile(samples, self.frac)
        return value if math.isfinite(value) else None

    def evaluate(self, rows: Sequence[Row]) -> ObjectiveResult:
        """Return whether the rows meet the objective; without samples it is missed."""
        value = self.value_of(rows)
        return ObjectiveResult(self.text, value, self.limit, value is not None and value <= self.limit)

    def is_met_by(self, row: Row) -> bool:
        """Tell whether every latency sample of one request is within the limit; for errors, whether it succeeded."""
        if self.metric == "errors":
            return row.error is None
        return all(sample <= self.limit for sample in samples_of(row, self.metric))


def parse_objective(text: str) -> Objective:
    """Return the objective of a command-line text; UserError if it is not one."""
    if share := _ERRORS.fullmatch(text.strip()):
        return Objective(text, "errors", None, float(share[1]) / 100)
    match = _OBJECTIVE.fullmatch(text.strip())
    if match is None or match[1] not in get_args(Metric):
        raise UserError("--slo", text, "is not an objective", _SYNTAX)
    metric: Metric = match[1]  # type: ignore[assignment]  # checked above
    frac = None if match[2] == "mean" else float(match[2][1:]) / 100
    return Objective(text, metric, frac, float(match[3]) / (1000 if match[4] == "ms" else 1))


def samples_of(row: Row, metric: Metric) -> list[float]:
    """Return the latency samples of one request in seconds: one, or for ITL one per token after the first chunk.

    A failed request counts as infinitely slow, so that a server gains nothing by rejecting requests. For `answer`, a
    reply that never left its chain of thought counts as infinitely slow as well.
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
    """Return the requests per second that met every objective; a failed request meets none."""
    return sum(all(objective.is_met_by(row) for objective in objectives) for row in rows) / window_s
