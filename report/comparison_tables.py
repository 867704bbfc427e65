"""The comparison as tables: variants down, figures across, each with its interval or its range over rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from slimserve.compare.results import TEXT, Comparison, Difference, Spread, VariantDecision, VariantResult, spread
from slimserve.loadtest.summary import LoadSummary, Percentiles
from slimserve.report.page import NOT_KNOWN, ms_text, number_text, percent_text, plain_text, words
from slimserve.workloads import load_workload
from slimserve.workloads.interface import Estimate

Cell = tuple[str, str]
"""A figure, and its interval or range in smaller type."""
NO_BREAK = "\u00a0"
_UNKNOWN: Cell = (NOT_KNOWN, "")


@dataclass(frozen=True)
class VariantLine:
    """One variant's row."""

    name: str
    status: str
    """What became of it, in words."""
    mood: str
    """`winner`, `dominated`, or nothing."""
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    headings: list[str]
    lines: list[VariantLine]


@dataclass
class Tables:
    """What the page and the terminal show of one comparison."""

    comparison: Comparison
    decisions: dict[str, VariantDecision] = field(init=False)

    def __post_init__(self) -> None:
        verdict = self.comparison.verdict
        self.decisions = {one.name: one for one in verdict.decisions} if verdict else {}

    def overview(self) -> Table:
        """One line per variant: what it costs, what it keeps, what it needs."""
        reference = self.comparison.reference
        return Table(
            "The variants",
            f"Cost and quality against {reference}. Small: the range over rounds of a speed, the 95% interval of a "
            "quality.",
            [
                "variant",
                f"cost, {reference} = 100%",
                *(f"{name} quality kept" for name in self.comparison.workloads),
                "objectives",
                "disk, MiB",
                "peak memory, GiB",
                "ready, s",
            ],
            [self._line(variant, self._overview_cells(variant)) for variant in self.comparison.variants],
        )

    def _overview_cells(self, variant: VariantResult) -> list[Cell]:
        decision = self.decisions.get(variant.name)
        peak = variant.peak_rss_bytes
        return [
            _spread_cell(decision.cost_ratio if decision else None, percent_text),
            *(self._kept_cell(variant, name) for name in self.comparison.workloads),
            self._objectives_cell(decision),
            (NOT_KNOWN if variant.disk_bytes is None else f"{variant.disk_bytes / 2**20:,.0f}", ""),
            _spread_cell(peak, lambda value: f"{value / 2**30:.2f}"),
            _spread_cell(variant.ready_s, lambda value: f"{value:.0f}"),
        ]

    def kept_interval(self, variant: VariantResult, workload: str) -> tuple[float, float] | None:
        """Return the 95% interval of the kept fraction of the primary metric; None for the reference."""
        primary_metric = self.comparison.workloads[workload]
        difference = variant.differences.get(workload, {}).get(primary_metric)
        whole = self.comparison.variant(self.comparison.reference).quality.get(workload, {}).get(primary_metric)
        if difference is None or whole is None or not whole.value > 0:
            return None
        return 1 + difference.low / whole.value, 1 + difference.high / whole.value

    def _kept_cell(self, variant: VariantResult, workload: str) -> Cell:
        decision = self.decisions.get(variant.name)
        found = decision.quality.get(workload) if decision else None
        if found is None:
            return _UNKNOWN
        interval = self.kept_interval(variant, workload)
        return percent_text(found.kept_frac, 1), _range(
            *interval, lambda value: f"{100 * value:.1f}"
        ) if interval else ""

    def _objectives_cell(self, decision: VariantDecision | None) -> Cell:
        if decision is None or not decision.slo:
            return "none asked", ""
        rounds = ", ".join(f"{name} {slo.num_met}/{slo.num_rounds}" for name, slo in decision.slo.items())
        return "met" if decision.meets_slo else "MISSED", f"{rounds} rounds"

    def workload(self, workload: str) -> Table:
        """A workload's quality, capacity, latency at the judged rate and cost."""
        view, rate = load_workload(workload).view, self.comparison.slo_rates.get(workload)
        slos = self.comparison.requirements.slos.get(workload, ())
        at = [] if rate is None else [f"{name} p50 / p99, ms" for name in view.latencies]
        loaded = "" if rate is None else f" Latency at {number_text(rate)} requests/s (Poisson)."
        asked = f" Objectives: {', '.join(slos)}." if slos and rate is not None else ""
        return Table(
            workload.capitalize(),
            f"Capacity is what {self.comparison.preset.users.get(workload, '–')} requests at once get through.{loaded}"
            f"{asked} Medians over rounds; small: their range.",
            [
                "variant",
                view.quality_label,
                f"against {self.comparison.reference}",
                f"capacity, {view.speed_label}",
                *at,
                *(["objectives"] if asked else []),
                f"{self.comparison.cost_unit} {words(view.cost)}",
                "prompt from cache",
                "failed",
            ],
            [
                self._line(variant, self._workload_cells(variant, workload, rate, bool(asked)))
                for variant in self.comparison.variants
            ],
        )

    def _workload_cells(self, variant: VariantResult, workload: str, rate: float | None, has_slo: bool) -> list[Cell]:
        view, primary_metric = load_workload(workload).view, self.comparison.workloads[workload]
        capacity = variant.capacity(workload)
        loads = [] if rate is None else variant.at_rate(workload, rate)
        is_overloaded = variant.is_overloaded(workload, rate)
        decision = self.decisions.get(variant.name)
        slo = decision.slo.get(workload) if decision else None
        cells = [
            estimate_cell(variant.quality.get(workload, {}).get(primary_metric)),
            difference_cell(variant.differences.get(workload, {}).get(primary_metric)),
            _spread_cell(spread(getattr(load, view.speed) for load in capacity), number_text),
        ]
        if rate is not None:
            missing: Cell = ("beyond capacity", "not run") if is_overloaded else _UNKNOWN
            cells += [
                _latency_cell([getattr(load, latency) for load in loads]) or missing
                for latency in view.latencies.values()
            ]
        if has_slo:
            text = "met" if slo and slo.num_rounds and slo.num_met == slo.num_rounds else "MISSED"
            cells.append((text, f"{slo.num_met}/{slo.num_rounds} rounds") if slo else _UNKNOWN)
        return [
            *cells,
            _spread_cell(variant.costs.get(workload, {}).get(view.cost), number_text),
            _spread_cell(spread(_cached(load) for load in capacity), percent_text),
            _errors_cell([*capacity, *loads]),
        ]

    def quality(self) -> list[Table]:
        """All quality figures of each workload, and of the texts."""
        tables = []
        for workload in (*self.comparison.workloads, TEXT):
            figures = list(
                dict.fromkeys(name for one in self.comparison.variants for name in one.quality.get(workload, {}))
            )
            if figures:
                title = "held-out text" if workload == TEXT else workload
                lines = [
                    self._line(
                        variant,
                        [
                            _both(
                                estimate_cell(variant.quality.get(workload, {}).get(name)),
                                difference_cell(variant.differences.get(workload, {}).get(name)),
                            )
                            for name in figures
                        ],
                    )
                    for variant in self.comparison.variants
                ]
                tables.append(Table(f"Quality: {title}", "", ["variant", *map(words, figures)], lines))
        return tables

    def bottlenecks(self) -> list[Table]:
        """Per workload, what binds each variant and how near the hardware's roof it comes."""
        return [
            Table(
                f"What limits {workload}",
                "Of the first round's closed loop. Prefill computes prompts and is bound by arithmetic; decode makes "
                "tokens one by one and is bound by memory bandwidth. 100% is as fast as the hardware allows.",
                ["variant", "bound by", "of the roof in all", "prefill, tokens/s", "decode, tokens/s"],
                [self._line(variant, _bottleneck_cells(variant, workload)) for variant in self.comparison.variants],
            )
            for workload in self.comparison.workloads
            if any(workload in variant.bottlenecks for variant in self.comparison.variants)
        ]

    def rank_agreement(self) -> list[Table]:
        """Per workload with scores, how much the order of candidates under load differs from the reference's."""
        return [
            Table(
                f"Order of candidates: {workload}",
                f"Scores that came back under load against {self.comparison.reference}'s of the same slates. Kendall's "
                "tau is 1 for the same order; top-10 overlap is the share of the ten best that are the same.",
                ["variant", "Kendall's tau", "top-10 overlap"],
                [
                    self._line(
                        variant,
                        [
                            estimate_cell(variant.rank_agreement.get(workload, {}).get(name))
                            for name in ("kendall_tau", "top10_overlap")
                        ],
                    )
                    for variant in self.comparison.variants
                    if variant.name != self.comparison.reference
                ],
            )
            for workload in self.comparison.workloads
            if any(variant.rank_agreement.get(workload) for variant in self.comparison.variants)
        ]

    def status(self, variant: VariantResult) -> str:
        """What became of a variant, in a few words."""
        decision = self.decisions.get(variant.name)
        verdict = self.comparison.verdict
        if decision is None or verdict is None:
            return "not judged"
        parts = ["SHIP THIS"] if verdict.winner == variant.name else []
        if variant.name == self.comparison.reference:
            parts.append("the reference")
        if not decision.keeps_quality:
            parts.append("loses too much quality")
        if not decision.meets_slo:
            parts.append("misses objectives")
        if decision.dominated_by:
            parts.append(f"dominated by {' and '.join(decision.dominated_by)}")
        return ", ".join(parts) or "qualifies, costs more"

    def _line(self, variant: VariantResult, cells: list[Cell]) -> VariantLine:
        decision, verdict = self.decisions.get(variant.name), self.comparison.verdict
        mood = "dominated" if decision and decision.dominated_by else ""
        return VariantLine(
            variant.name,
            self.status(variant),
            "winner" if verdict and verdict.winner == variant.name else mood,
            cells,
        )


def estimate_cell(estimate: Estimate | None) -> Cell:
    if estimate is None or estimate.value != estimate.value:
        return _UNKNOWN
    return plain_text(estimate.value), _range(estimate.low, estimate.high, plain_text)


def difference_cell(difference: Difference | None) -> Cell:
    """A paired difference with its 95% interval and the p-value of there being none."""
    if difference is None or difference.value != difference.value:
        return _UNKNOWN
    p_text = "p < 0.001" if difference.p_value < 0.001 else f"p = {difference.p_value:.2g}"
    interval = f"{signed_text(difference.low)} to {signed_text(difference.high)},"
    # Spaces that do not break: a line of its own for each.
    return signed_text(difference.value), " ".join(part.replace(" ", NO_BREAK) for part in (interval, p_text))


def signed_text(value: float) -> str:
    return ("+" if value > 0 else "−" if value < 0 else "") + plain_text(abs(value))


def _both(figure: Cell, difference: Cell) -> Cell:
    if difference == _UNKNOWN:
        return figure
    return figure[0], f"{figure[1]}; difference {difference[0]} ({difference[1]})"


def _range(low: float, high: float, text: Callable[[float], str]) -> str:
    return f"{text(low)}–{text(high)}"


def _spread_cell(found: Spread | None, text: Callable[[float], str]) -> Cell:
    if found is None:
        return _UNKNOWN
    return text(found.median), _range(found.min, found.max, text) if found.n > 1 else ""


def _latency_cell(loads: Sequence[Percentiles]) -> Cell | None:
    """p50 and p99 in ms as medians over rounds, and the rounds' range of p99; None where there is no sample."""
    middle, tail = spread(one.p50 for one in loads), spread(one.p99 for one in loads)
    if middle is None or tail is None:
        return None
    text = f"{ms_text(middle.median)}{NO_BREAK}/{NO_BREAK}{ms_text(tail.median)}"
    return text, f"p99 {_range(tail.min, tail.max, ms_text)}" if tail.n > 1 else ""


def _cached(load: LoadSummary) -> float | None:
    return load.cached_frac if load.cached_frac is not None else load.server.prefix_cache_hit_frac


def _errors_cell(loads: Sequence[LoadSummary]) -> Cell:
    """Failed requests of these loads, by kind."""
    counts: dict[str, int] = {}
    for load in loads:
        for kind, count in load.errors.items():
            counts[kind] = counts.get(kind, 0) + count
    if not loads:
        return _UNKNOWN
    total = sum(load.num_requests for load in loads)
    kinds = ", ".join(f"{count:,} × {kind}" for kind, count in counts.items())
    return f"{sum(counts.values()):,}/{total:,}", kinds


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
            (number_text(rate), f"{rate / roof:.0%} of {number_text(roof)}" if rate and roof else "")
            for rate, roof in parts
        ),
    ]
