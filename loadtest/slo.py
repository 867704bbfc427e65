"""Service-level objectives such as `ttft_p99=500ms`, evaluated over a run, and per request for goodput."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from slimserve.core.errors import UserError
from slimserve.core.statistics import nearest_rank
from slimserve.loadtest.rows import Row
from slimserve.loadtest.summary import ObjectiveResult

Metric = Literal["ttft", "itl", "tpot", "e2e", "answer"]
_STREAMED = {"ttft", "itl", "tpot", "answer"}
"""Metrics of streamed tokens, which scoring requests do not have."""
_OBJECTIVE = re.compile(r"([a-z0-9]+)_(p\d{1,2}(?:\.\d+)?|mean)\s*(?:<=|=|≤)\s*(\d+(?:\.\d+)?)(ms|s)")
_ERRORS = re.compile(r"errors\s*(?:<=|=|≤)\s*(\d+(?:\.\d+)?)%")
_SYNTAX = "write ttft_p99=500ms, itl_p99=50ms, tpot_p95=40ms, e2e_p50=2s or errors=1%"


@dataclass(frozen=True)
class Objective:
    """An upper bound on a latency statistic of a run in seconds, or on the fraction of failed requests."""

    text: str
    metric: Metric | Literal["errors"]
    frac: Fraction | None
    """Percentile as an exact fraction; None selects the mean."""
    limit: float

    def applies_to(self, rows: Sequence[Row]) -> bool:
        """Tell whether requests such as these can have the metric; scoring requests have no tokens to time."""
        return self.metric not in _STREAMED or not rows or any(not row.num_items for row in rows)

    def value_of(self, rows: Sequence[Row]) -> float | None:
        """Return the statistic over the rows; None if there is no sample or if it falls on a failed request."""
        if self.metric == "errors":
            return sum(row.error is not None for row in rows) / len(rows) if rows else None
        good = [row for row in rows if row.error is None]
        samples = sorted(sample for row in good for sample in samples_of(row, self.metric))
        weight = _failed_weight(rows, self.metric)
        if not samples or (self.frac is None and weight):
            return None
        if self.frac is None:
            value = sum(samples) / len(samples)
        else:
            rank = nearest_rank(self.frac, len(samples) + weight)
            value = samples[rank - 1] if rank <= len(samples) else math.inf
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
        return Objective(text, "errors", None, float(Fraction(share[1]) / 100))
    match = _OBJECTIVE.fullmatch(text.strip())
    if match is None or match[1] not in get_args(Metric):
        raise UserError("--slo", text, "is not an objective", _SYNTAX)
    metric: Metric = match[1]  # type: ignore[assignment]  # checked above
    frac = None if match[2] == "mean" else Fraction(match[2][1:]) / 100
    return Objective(text, metric, frac, float(Fraction(match[3]) / (1000 if match[4] == "ms" else 1)))


def samples_of(row: Row, metric: Metric) -> list[float]:
    """Return the latency samples of one request in seconds: one, or for ITL one per token after the first chunk.

    A failed request counts as infinitely slow, so that a server gains nothing by rejecting requests; it has one sample
    here, and `Objective.value_of` gives it the weight of the samples that it would have had. For `answer`, a reply that
    never left its chain of thought counts as infinitely slow as well.
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


def _failed_weight(rows: Sequence[Row], metric: Metric) -> Fraction:
    """Return the number of samples that the failed requests would have given; each of them is infinitely slow.

    That is one per request. For ITL it is the number of gaps of a complete answer: of its fixed length, or else the
    mean of the successful answers. With answers of unknown length, the share of failed gaps is then the share of
    failed requests.
    """
    failed = [row for row in rows if row.error is not None]
    if metric != "itl":
        return Fraction(len(failed))
    answers = [row for row in rows if row.error is None and row.arrivals]
    num_gaps = sum(count for row in answers for _, count in row.arrivals[1:])
    mean_gaps = Fraction(num_gaps, len(answers)) if answers else Fraction(1)
    return sum((Fraction(row.fixed_tokens - 1) if row.fixed_tokens else mean_gaps for row in failed), Fraction(0))


def goodput(rows: Sequence[Row], objectives: Sequence[Objective], window_s: float) -> float:
    """Return the requests per second that met every objective; a failed request meets none."""
    return sum(all(objective.is_met_by(row) for objective in objectives) for row in rows) / window_s
