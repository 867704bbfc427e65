"""The result document of a comparison: what is known of each variant, as typed rows and as JSON.

A comparison serves every variant once per round. Quality is measured in the first round, load in every one, so a
figure of speed is a median over rounds with its minimum and maximum, and a figure of quality an estimate with a
95% interval. `results.json` is this module's `Comparison`; `load_comparison` reads it back.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from slimserve.core.errors import UserError
from slimserve.core.provenance import provenance
from slimserve.core.storage import write_atomically
from slimserve.loadtest.summary import LoadSummary
from slimserve.workloads.interface import Estimate

RESULTS_FILE = "results.json"
TEXT = "text"
"""The part of quality that no load goes with: perplexity, KL to the reference and top-1 agreement."""


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds of a comparison."""

    median: float
    min: float
    max: float
    n: int
    """Rounds in which it was measured."""


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of those values that are known; None where there is none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return Spread(statistics.median(known), min(known), max(known), len(known)) if known else None


@dataclass(frozen=True)
class Difference:
    """A quality figure of a variant minus that of the reference, over the same prompts."""

    value: float
    low: float
    high: float
    p_value: float
    """Two-sided, of no difference: exact McNemar for shares of right answers, paired bootstrap for the rest."""
    n: int
    """Pairs, or groups of pairs where a test resamples groups."""
    test: Literal["mcnemar", "bootstrap"]


@dataclass(frozen=True)
class LoadRun:
    """One load of one workload in one round."""

    rate_rps: float | None
    """Requests a second of Poisson arrivals, the same for every variant; None: closed loop, which measures capacity."""
    users: int | None
    """Requests under way at once in closed loop; None in open loop."""
    summary: LoadSummary
    rows: str
    """File of the raw rows, relative to the folder of the results."""
    energy_j: float | None = None
    """Joules that the processor's own meter counted during the run, idle power included; None where it has none."""


@dataclass
class Round:
    """One start of a variant and the loads that it got."""

    number: int
    """From 1; odd rounds serve the variants in their order, even ones in reverse."""
    ready_s: float | None = None
    """Seconds from the engine's start until it answered; None for an endpoint that was not started here."""
    peak_rss_bytes: int | None = None
    """Peak resident memory of the engine's processes, the reserved KV cache included."""
    capacity: dict[str, LoadRun] = field(default_factory=dict)
    """By workload, the closed loop."""
    at_rate: dict[str, list[LoadRun]] = field(default_factory=dict)
    """By workload, the open loops, in ascending order of their rates."""
    beyond: dict[str, list[float]] = field(default_factory=dict)
    """By workload, open-loop rates that were not run, as they are far above what the closed loop got through: the queue
    would grow without end, so no objective is met at them."""


@dataclass(frozen=True)
class Regime:
    """What a workload asks of the hardware at capacity: prompts (arithmetic) or single tokens (memory bandwidth)."""

    bound: Literal["prefill", "decode"] | None
    """Which of the two would take longer at the hardware's roof; None where neither roof is known."""
    prefill_tokens_per_s: float | None
    """Prompt tokens computed, those of the prefix cache left out; None where the server does not count them."""
    prefill_roof_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    decode_roof_tokens_per_s: float | None
    """Of as many streams as ran at once: they share the reading of the weights, so it is one stream's times them."""
    achieved_frac: float | None
    """Share of the run that both would have taken at their roofs: 1 is as fast as the hardware allows."""


@dataclass
class VariantResult:
    """One variant, or one external endpoint: how it was made, how good it is, how it serves."""

    name: str
    """Unique in the comparison: the recipe's name, or the name that an endpoint was given."""
    recipe: str
    """Empty for an endpoint."""
    summary: str
    """What the recipe does, in words."""
    directory: str | None = None
    """Where the model lies; None for an endpoint."""
    url: str | None = None
    """Where an endpoint answers; None for a variant that is served here."""
    identity: str = ""
    """Hash of config, tokenizer, weights and launch plan; of address and model name for an endpoint. What was measured
    is used again only where it is the same."""
    disk_bytes: int | None = None
    num_parameters: int | None = None
    build_s: float | None = None
    """Seconds that building took, when it was built."""
    build_reused: bool | None = None
    """Whether this run found it built already."""
    rounds: list[Round] = field(default_factory=list)
    quality: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    """By workload (and TEXT), then figure."""
    differences: dict[str, dict[str, Difference]] = field(default_factory=dict)
    """To the reference, by workload (and TEXT), then figure; empty for the reference itself."""
    rank_drift: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    """By workload: `kendall_tau` and `top10_overlap` of the scores that came back under load, against the reference's
    scores of the same slates. Workloads without scores, and the reference, have none."""
    regime: dict[str, Regime] = field(default_factory=dict)
    """By workload, of the first round's closed loop."""
    costs: dict[str, dict[str, Spread]] = field(default_factory=dict)
    """By workload, at capacity: `per_million_items`, `per_million_output_tokens`, `per_thousand_answers`,
    `per_correct_answer`. In units of the price where one was given, else in seconds of the whole machine."""

    @property
    def ready_s(self) -> Spread | None:
        return spread(one.ready_s for one in self.rounds)

    @property
    def peak_rss_bytes(self) -> Spread | None:
        return spread(one.peak_rss_bytes for one in self.rounds)

    def capacity(self, workload: str) -> list[LoadSummary]:
        """The closed loop's summary of each round."""
        return [one.capacity[workload].summary for one in self.rounds if workload in one.capacity]

    def at_rate(self, workload: str, rate_rps: float) -> list[LoadSummary]:
        """The open loop's summary at one rate, of each round."""
        runs = [run for one in self.rounds for run in one.at_rate.get(workload, [])]
        return [run.summary for run in runs if run.rate_rps == rate_rps]


@dataclass(frozen=True)
class Effort:
    """What is measured, and for how long: settings that change figures, so one folder holds one effort."""

    quality_prompts: dict[str, int]
    """By workload, prompts whose answers are judged."""
    users: dict[str, int]
    """By workload, requests under way at once in the closed loop."""
    duration_s: float
    """Measured seconds of a load."""
    warmup_s: float
    cooldown_s: float = 2.0
    rounds: int = 2
    text_sequences: int = 8
    """Held-out texts for perplexity and KL; 0: not measured."""
    text_tokens: int = 512
    """Tokens of each."""
    rate_fracs: tuple[float, ...] = (0.5, 0.8)
    """Open-loop rates as shares of the reference's capacity in the first round."""
    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """By workload, open-loop rates in requests/s that were asked for in their place."""
    seed: int = 0


@dataclass(frozen=True)
class Requirements:
    """What a variant must hold to be shipped: settings that change the verdict, not the figures."""

    quality_tolerance_frac: float = 0.03
    """Largest loss of each headline figure, as a share of the reference's."""
    slos: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By workload, objectives such as `e2e_p99=2s`; a workload without any is not judged by latency."""
    price_per_hour: float | None = None
    """Of the machine, in any currency."""


@dataclass(frozen=True)
class QualityOutcome:
    """Whether a variant keeps a workload's headline figure."""

    figure: str
    kept_frac: float
    """The variant's figure over the reference's: 1 is no loss."""
    is_kept: bool
    """Whether that is at least 1 minus the tolerance."""
    probability: float
    """How likely that is of all prompts, by resampling those that were asked (slimserve.workloads.metrics.probability_kept)."""


@dataclass(frozen=True)
class SloOutcome:
    """Whether a variant keeps a workload's objectives at the judged rate."""

    rate_rps: float
    num_met: int
    """Rounds in which every objective was met."""
    num_rounds: int
    worst: dict[str, float | None]
    """By objective, its largest value over rounds, in seconds or as a share; None: no sample in a round."""


@dataclass(frozen=True)
class Outcome:
    """What the verdict is made of, for one variant."""

    name: str
    quality: dict[str, QualityOutcome]
    """By workload."""
    keeps_quality: bool
    quality_probability: float
    """That every workload's headline is kept; workloads are independent samples, so their product."""
    slo: dict[str, SloOutcome]
    """By workload that has objectives."""
    meets_slo: bool
    """In every round of every workload."""
    cost_ratio: Spread | None
    """Cost over the reference's at capacity, mean over workloads: 0.5 is half as expensive. Per item of a slate, per
    answer of a chat."""
    dominated_by: list[str]
    """Variants that are at least as good in quality, cost and latency, and clearly better in one of them."""
    alike: list[str]
    """Variants from which no axis tells it apart: all intervals overlap."""
    reason: str
    """One sentence: why it may be shipped, or why not."""

    @property
    def qualifies(self) -> bool:
        return self.keeps_quality and self.meets_slo


@dataclass(frozen=True)
class Verdict:
    """Which variant to ship."""

    winner: str | None
    """The cheapest one that keeps quality and objectives; None where none does."""
    sentences: list[str]
    """What was found and why, for a person who has read nothing else."""
    confidence: float
    """Between 0 and 1: how sure it is that the winner keeps quality; that none does, where there is no winner."""
    confidence_words: str
    outcomes: list[Outcome] = field(default_factory=list)


@dataclass(frozen=True)
class Loss:
    """One figure of one variant against the same variant of an earlier run."""

    variant: str
    workload: str
    figure: str
    kind: Literal["quality", "goodput"]
    loss_frac: float
    """Share of the earlier figure that is gone; negative for a gain."""
    low: float
    high: float
    """Quality: 95% interval of the paired bootstrap. Goodput: least and largest over paired rounds."""
    limit_frac: float
    fails: bool
    """Whether the loss is above the limit and its interval excludes no loss."""


@dataclass(frozen=True)
class BaselineOutcome:
    """The comparison with an earlier run."""

    baseline: str
    losses: list[Loss]
    notes: list[str]
    """What the comparison cannot say, such as that drift of the machine is not excluded."""

    @property
    def passed(self) -> bool:
        return not any(loss.fails for loss in self.losses)


@dataclass
class Comparison:
    """One run of `slimserve compare`."""

    model: str
    workloads: dict[str, str]
    """Workload names, each with the quality figure that is its headline."""
    effort: Effort
    requirements: Requirements
    started: str
    reference: str = ""
    """Name of the variant that others are measured against: `dense`, else the first."""
    judged_rates: dict[str, float] = field(default_factory=dict)
    """By workload, the open-loop rate at which objectives are judged: the highest that the user stated, else the
    lowest share of the reference's capacity."""
    origin: dict[str, Any] = field(default_factory=provenance)
    """Commit, hardware and versions."""
    seconds: float = 0.0
    """Of measuring, over all starts of an interrupted run."""
    variants: list[VariantResult] = field(default_factory=list)
    verdict: Verdict | None = None
    """None until every variant is measured."""
    baseline: BaselineOutcome | None = None
    counterparts: list[VariantResult] = field(default_factory=list)
    """Variants of the baseline, loaded in the same rounds under the names that they had there; neither judged nor part
    of the verdict."""

    @property
    def cost_unit(self) -> str:
        """What figures of cost count."""
        return "machine-seconds" if self.requirements.price_per_hour is None else "currency units"

    def variant(self, name: str) -> VariantResult:
        return next(variant for variant in self.variants if variant.name == name)

    def rates(self, workload: str) -> list[float]:
        """The open-loop rates of a workload, ascending."""
        runs = [run for variant in self.variants for one in variant.rounds for run in one.at_rate.get(workload, [])]
        return sorted({run.rate_rps for run in runs if run.rate_rps is not None})

    def write(self, directory: Path) -> Path:
        """Write results.json; call it after every variant, so that an interrupted run keeps what it has."""
        described = asdict(self)
        document = {"command": "compare", **described.pop("origin"), **described}
        path = directory / RESULTS_FILE
        write_atomically(path, json.dumps(_without_nan(document), indent=2, allow_nan=False) + "\n")
        return path


def load_comparison(path: Path) -> Comparison:
    """The comparison in a results.json, or in a directory that has one; UserError where there is none."""
    from pydantic import TypeAdapter, ValidationError

    file = path / RESULTS_FILE if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        origin = {key: document.pop(key) for key in ("commit", "hardware", "versions")}
        document.pop("command")
        return TypeAdapter(Comparison).validate_python({**_with_nan(document), "origin": origin})
    except OSError as error:
        remedy = "give the folder of an earlier compare, or its results.json"
        raise UserError("results", file, f"cannot be read ({error.strerror})", remedy) from error
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        problem = f"is not a comparison of this version ({' '.join(str(error).split())[:200]})"
        raise UserError("results", file, problem, "measure it again") from error


def _without_nan(value: Any) -> Any:
    """The same document with null for undefined figures, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(value: Any) -> Any:
    """The reverse for estimates and differences, whose figures are numbers or undefined."""
    if isinstance(value, list):
        return [_with_nan(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if {"value", "low", "high"} <= value.keys():
        return {key: math.nan if entry is None else entry for key, entry in value.items()}
    return {key: _with_nan(entry) for key, entry in value.items()}
