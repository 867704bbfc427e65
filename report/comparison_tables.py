"""The tables of a comparison: one row per variant, and each value with its interval or its range over rounds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from slimserve.compare.results import TEXT, Comparison, Difference, Spread, VariantDecision, VariantResult, spread
from slimserve.loadtest.summary import LoadSummary, Percentiles
from slimserve.report.page import NOT_KNOWN, ms_text, number_text, percent_text, plain_text, words
from slimserve.workloads import load_workload
from slimserve.workloads.interface import Estimate

Cell = tuple[str, str]
"""A value, and its interval or range in smaller type."""
NO_BREAK = "\u00a0"
_UNKNOWN: Cell = (NOT_KNOWN, "")


@dataclass(frozen=True)
class VariantRow:
    """The row of one variant."""

    name: str
    status: str
    """The verdict on the variant in a few words."""
    css_class: str
    """`winner`, `dominated` or empty."""
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """A table with a title and a note above it."""

    title: str
    note: str
    headings: list[str]
    rows: list[VariantRow]


@dataclass
class Tables:
    """Makes the tables of one comparison, for the page and the terminal."""

    comparison: Comparison
    decisions: dict[str, VariantDecision] = field(init=False)

    def __post_init__(self) -> None:
        verdict = self.comparison.verdict
        self.decisions = {one.name: one for one in verdict.decisions} if verdict else {}

    def overview(self) -> Table:
        """Return cost, kept quality, objectives and resources of each variant."""
        reference = self.comparison.reference
        return Table(
            "Variants",
            f"Cost and quality relative to {reference}. Quality kept is counted from chance, the value of a model that "
            "knows nothing. In small type: the range over rounds of a speed, the 95% interval of a quality.",
            [
                "variant",
                f"cost, {reference} = 100%",
                *(f"{name} quality kept" for name in self.comparison.workloads),
                "objectives",
                "disk, MiB",
                "peak memory, GiB",
                "ready after, s",
            ],
            self._rows(self._overview_cells),
        )

    def _overview_cells(self, variant: VariantResult) -> list[Cell]:
        decision = self.decisions.get(variant.name)
        return [
            _spread_cell(decision.cost_ratio if decision else None, percent_text),
            *(self._kept_cell(variant, name) for name in self.comparison.workloads),
            _objectives_cell(decision),
            (NOT_KNOWN if variant.disk_bytes is None else f"{variant.disk_bytes / 2**20:,.0f}", ""),
            _spread_cell(variant.peak_rss_bytes, lambda value: f"{value / 2**30:.2f}"),
            _spread_cell(variant.ready_s, lambda value: f"{value:.0f}"),
        ]

    def kept_interval(self, variant: VariantResult, workload: str) -> tuple[float, float] | None:
        """Return the 95% interval of the kept fraction of the primary metric; None for the reference."""
        metric = self.comparison.workloads[workload]
        difference = variant.differences.get(workload, {}).get(metric)
        base = self.comparison.variant(self.comparison.reference).quality.get(workload, {}).get(metric)
        signal = self.comparison.signals.get(workload)
        if difference is None or base is None or signal is None or not abs(base.value - signal.floor) > 0:
            return None
        above = base.value - signal.floor
        low, high = sorted((1 + difference.low / above, 1 + difference.high / above))
        return low, high

    def _kept_cell(self, variant: VariantResult, workload: str) -> Cell:
        decision = self.decisions.get(variant.name)
        quality = decision.quality.get(workload) if decision else None
        if quality is None:
            return _UNKNOWN
        interval = self.kept_interval(variant, workload)
        return percent_text(quality.kept_frac, 1), _range(
            *interval, lambda value: f"{100 * value:.1f}"
        ) if interval else ""

    def workload(self, workload: str) -> Table:
        """Return a workload's quality, capacity, latency at the SLO rate and cost."""
        view, rate = load_workload(workload).view, self.comparison.slo_rates.get(workload)
        slos = self.comparison.requirements.slos.get(workload, ())
        has_slo = bool(slos) and rate is not None
        users = self.comparison.preset.users.get(workload, NOT_KNOWN)
        return Table(
            workload.capitalize(),
            f"Capacity is the throughput with {users} concurrent requests."
            + ("" if rate is None else f" Latency is measured at {number_text(rate)} requests/s (Poisson arrivals).")
            + (f" Objectives: {', '.join(slos)}." if has_slo else "")
            + " Values are medians over rounds; the range is in small type.",
            [
                "variant",
                view.quality_label,
                f"difference from {self.comparison.reference}",
                f"capacity, {view.speed_label}",
                *([] if rate is None else [f"{name} p50 / p99, ms" for name in view.latencies]),
                *(["objectives"] if has_slo else []),
                f"{self.comparison.cost_unit} {words(view.cost)}",
                "prompt tokens from cache",
                "failed",
            ],
            self._rows(lambda variant: self._workload_cells(variant, workload, rate, has_slo)),
        )

    def _workload_cells(self, variant: VariantResult, workload: str, rate: float | None, has_slo: bool) -> list[Cell]:
        view, metric = load_workload(workload).view, self.comparison.workloads[workload]
        capacity = variant.capacity(workload)
        loads = [] if rate is None else variant.at_rate(workload, rate)
        decision = self.decisions.get(variant.name)
        slo = decision.slo.get(workload) if decision else None
        cells = [
            estimate_cell(variant.quality.get(workload, {}).get(metric)),
            difference_cell(variant.differences.get(workload, {}).get(metric)),
            _spread_cell(spread(getattr(load, view.speed) for load in capacity), number_text),
        ]
        if rate is not None:
            missing: Cell = ("overloaded", "not run") if variant.is_overloaded(workload, rate) else _UNKNOWN
            latencies = view.latencies.values()
            cells += [_latency_cell([getattr(load, latency) for load in loads]) or missing for latency in latencies]
        if has_slo:
            text = "met" if slo and slo.num_met == slo.num_rounds else "MISSED"
            cells.append((text, f"{slo.num_met}/{slo.num_rounds} rounds") if slo and slo.num_rounds else _UNKNOWN)
        return [
            *cells,
            _spread_cell(variant.costs.get(workload, {}).get(view.cost), number_text),
            _spread_cell(spread(_cached_frac(load) for load in capacity), percent_text),
            _errors_cell([*capacity, *loads]),
        ]

    def quality(self) -> list[Table]:
        """Return all quality metrics of each workload and of the held-out text."""
        tables = []
        for workload in (*self.comparison.workloads, TEXT):
            names = dict.fromkeys(name for one in self.comparison.variants for name in one.quality.get(workload, {}))
            if not names:
                continue
            cells = partial(_quality_cells, workload=workload, names=tuple(names))
            title = "held-out text" if workload == TEXT else workload
            tables.append(Table(f"Quality: {title}", "", ["variant", *map(words, names)], self._rows(cells)))
        return tables

    def signals(self) -> list[Table]:
        """Return, per workload, what the reference reaches against chance and baselines without a language model."""
        tables = []
        for workload, signal in self.comparison.signals.items():
            reference = self.comparison.variant(self.comparison.reference)
            value = reference.quality.get(workload, {}).get(signal.metric)
            can = "can" if signal.is_informative else "CANNOT"
            chance: Cell = _UNKNOWN if math.isnan(signal.floor) else (plain_text(signal.floor), "")
            cells = [("chance", "a model that knows nothing", chance)]
            cells += [(words(name), "no language model", estimate_cell(one)) for name, one in signal.baselines.items()]
            cells.append((reference.name, "the reference", estimate_cell(value)))
            rows = [VariantRow(name, status, "", [cell]) for name, status, cell in cells]
            note = f"This workload {can} compare these models: the reference's 95% interval must lie above chance."
            tables.append(Table(f"Signal of {workload}", note, ["", words(signal.metric)], rows))
        return tables

    def bottlenecks(self) -> list[Table]:
        """Return, per workload, the phase that limits each variant and the fraction of the roofline that it reaches."""
        return [
            Table(
                f"Bottleneck of {workload}",
                "Measured in the closed loop of the first round. Prefill computes prompts and is compute-bound; decode "
                "generates tokens one by one and is memory-bound. At 100% of the roofline nothing could be faster.",
                ["variant", "limited by", "of the roofline", "prefill, tokens/s", "decode, tokens/s"],
                self._rows(partial(_bottleneck_cells, workload=workload)),
            )
            for workload in self.comparison.workloads
            if any(workload in variant.bottlenecks for variant in self.comparison.variants)
        ]

    def rank_agreement(self) -> list[Table]:
        """Return, per scoring workload, how well the order of candidates under load agrees with the reference's."""
        tables = []
        for workload in self.comparison.workloads:
            if not any(variant.rank_agreement.get(workload) for variant in self.comparison.variants):
                continue
            rows = self._rows(partial(_rank_cells, workload=workload))
            table = Table(
                f"Order of candidates: {workload}",
                f"Scores returned under load, compared with {self.comparison.reference}'s scores of the same lists. "
                "Kendall's tau is 1 for the same order. Top-10 overlap is the fraction of the ten best candidates that "
                "both have.",
                ["variant", "Kendall's tau", "top-10 overlap"],
                [row for row in rows if row.name != self.comparison.reference],
            )
            tables.append(table)
        return tables

    def status(self, variant: VariantResult) -> str:
        """Return the verdict on a variant in a few words."""
        decision = self.decisions.get(variant.name)
        verdict = self.comparison.verdict
        if decision is None or verdict is None:
            return "not evaluated"
        parts = ["SHIP THIS"] if verdict.winner == variant.name else []
        if variant.name == self.comparison.reference:
            parts.append("the reference")
        if variant.name != self.comparison.reference and verdict.uninformative:
            parts.append("no verdict")
        elif decision.ruling != "keeps":
            parts.append("loses too much quality" if decision.ruling == "loses" else "quality undecided")
        if not decision.meets_slo:
            parts.append("misses objectives" if decision.is_loaded else "not load-tested")
        if decision.dominated_by:
            parts.append(f"dominated by {' and '.join(decision.dominated_by)}")
        return ", ".join(parts) or "qualifies, costs more"

    def _rows(self, cells: Callable[[VariantResult], list[Cell]]) -> list[VariantRow]:
        return [
            VariantRow(variant.name, self.status(variant), self._css_class(variant), cells(variant))
            for variant in self.comparison.variants
        ]

    def _css_class(self, variant: VariantResult) -> str:
        decision, verdict = self.decisions.get(variant.name), self.comparison.verdict
        if verdict and verdict.winner == variant.name:
            return "winner"
        return "dominated" if decision and decision.dominated_by else ""


def estimate_cell(estimate: Estimate | None) -> Cell:
    """Return a value with its 95% interval."""
    if estimate is None or estimate.value != estimate.value:
        return _UNKNOWN
    return plain_text(estimate.value), _range(estimate.low, estimate.high, plain_text)


def difference_cell(difference: Difference | None) -> Cell:
    """Return a paired difference with its 95% interval and the p-value of no difference."""
    if difference is None or difference.value != difference.value:
        return _UNKNOWN
    p_text = "p < 0.001" if difference.p_value < 0.001 else f"p = {difference.p_value:.2g}"
    interval = f"{signed_text(difference.low)} to {signed_text(difference.high)},"
    # Non-breaking spaces keep the interval and the p-value on one line each.
    return signed_text(difference.value), " ".join(part.replace(" ", NO_BREAK) for part in (interval, p_text))


def signed_text(value: float) -> str:
    return ("+" if value > 0 else "−" if value < 0 else "") + plain_text(abs(value))


def _both(value: Cell, difference: Cell) -> Cell:
    if difference == _UNKNOWN:
        return value
    return value[0], f"{value[1]}; difference {difference[0]} ({difference[1]})"


def _quality_cells(variant: VariantResult, workload: str, names: Sequence[str]) -> list[Cell]:
    estimates, differences = variant.quality.get(workload, {}), variant.differences.get(workload, {})
    return [_both(estimate_cell(estimates.get(name)), difference_cell(differences.get(name))) for name in names]


def _rank_cells(variant: VariantResult, workload: str) -> list[Cell]:
    agreement = variant.rank_agreement.get(workload, {})
    return [estimate_cell(agreement.get(name)) for name in ("kendall_tau", "top10_overlap")]


def _range(low: float, high: float, text: Callable[[float], str]) -> str:
    return f"{text(low)}–{text(high)}"


def _spread_cell(values: Spread | None, text: Callable[[float], str]) -> Cell:
    if values is None:
        return _UNKNOWN
    return text(values.median), _range(values.min, values.max, text) if values.n > 1 else ""


def _objectives_cell(decision: VariantDecision | None) -> Cell:
    if decision is None or not decision.slo:
        return "none given", ""
    if not decision.is_loaded:
        return _UNKNOWN
    rounds = ", ".join(f"{name} {slo.num_met}/{slo.num_rounds}" for name, slo in decision.slo.items())
    return "met" if decision.meets_slo else "MISSED", f"{rounds} rounds"


def _latency_cell(loads: Sequence[Percentiles]) -> Cell | None:
    """Return p50 and p99 in ms as medians over rounds, with the range of p99; None if there is no sample."""
    middle, tail = spread(one.p50 for one in loads), spread(one.p99 for one in loads)
    if middle is None or tail is None:
        return None
    text = f"{ms_text(middle.median)}{NO_BREAK}/{NO_BREAK}{ms_text(tail.median)}"
    return text, f"p99 {_range(tail.min, tail.max, ms_text)}" if tail.n > 1 else ""


def _cached_frac(load: LoadSummary) -> float | None:
    return load.cached_frac if load.cached_frac is not None else load.server.prefix_cache_hit_frac


def _errors_cell(loads: Sequence[LoadSummary]) -> Cell:
    """Return the number of failed requests, by kind."""
    if not loads:
        return _UNKNOWN
    counts = sum((Counter(load.errors) for load in loads), Counter())
    total = sum(load.num_requests for load in loads)
    kinds = ", ".join(f"{count:,} × {kind}" for kind, count in counts.items())
    return f"{counts.total():,}/{total:,}", kinds


def _bottleneck_cells(variant: VariantResult, workload: str) -> list[Cell]:
    bottleneck = variant.bottlenecks.get(workload)
    if bottleneck is None:
        return [_UNKNOWN] * 4
    parts = (
        (bottleneck.prefill_tokens_per_s, bottleneck.prefill_roofline_tokens_per_s),
        (bottleneck.decode_tokens_per_s, bottleneck.decode_roofline_tokens_per_s),
    )
    return [
        (bottleneck.limited_by or NOT_KNOWN, ""),
        (percent_text(bottleneck.roofline_frac), ""),
        *(
            (number_text(rate), f"{rate / roofline:.0%} of {number_text(roofline)}" if rate and roofline else "")
            for rate, roofline in parts
        ),
    ]
