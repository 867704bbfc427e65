"""The result document of a comparison: everything that is known about each variant, as typed rows and as JSON.

A comparison serves every variant once per round. Quality is measured in the first round and load in every round. A
speed is therefore a median over rounds with its range, and a quality metric is an estimate with a 95% interval.
`results.json` is a `Comparison`; `load_comparison` reads it back. JSON has no NaN, so an undefined value is null.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from slimserve.compare.decision import Ruling
from slimserve.core.errors import UserError
from slimserve.core.hardware import probe_hardware
from slimserve.core.provenance import commit, versions
from slimserve.core.score_calibration import ScoreCalibration
from slimserve.core.storage import write_atomically
from slimserve.loadtest.summary import LoadSummary
from slimserve.workloads.interface import Estimate

RESULTS_FILE = "results.json"
TEXT = "text"
"""Name under which the metrics of held-out text are kept: perplexity, KL divergence and top-1 agreement."""


def _restore_nan(value: Any) -> Any:
    return (
        {key: math.nan if entry is None else entry for key, entry in value.items()}
        if isinstance(value, dict)
        else value
    )


Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A float that may be NaN."""
QualityEstimate = Annotated[Estimate, BeforeValidator(_restore_nan)]


@dataclass(frozen=True)
class Spread:
    """A value over the rounds of a comparison."""

    median: float
    min: float
    max: float
    n: int
    """Number of rounds in which the value was measured."""


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return the spread of the finite values; None if there is no finite value."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return Spread(statistics.median(known), min(known), max(known), len(known)) if known else None


@dataclass(frozen=True)
class Difference:
    """A quality metric of a variant minus the metric of the reference, over the same prompts."""

    value: float
    low: float
    high: float
    p_value: float
    """Two-sided p-value of no difference: exact McNemar for shares of correct answers, paired bootstrap otherwise."""
    n: int
    """Number of pairs, or of groups of pairs if the test resamples groups."""
    test: Literal["mcnemar", "bootstrap"]


@dataclass(frozen=True)
class LoadRun:
    """One load test of one workload in one round."""

    rate_rps: float | None
    """Poisson arrivals in requests/s, the same for every variant; None for a closed loop, which measures capacity."""
    users: int | None
    """Number of closed-loop users; None for an open loop."""
    summary: LoadSummary
    rows_file: str
    """File of the raw rows, relative to the folder of the results."""
    energy_j: float | None = None
    """Joules that the processors' energy counters measured, idle power included; None if there is no counter."""


@dataclass
class Round:
    """One start of a variant and the load tests that ran against it."""

    number: int
    """Number from 1; odd rounds serve the variants in order, even rounds in reverse order."""
    ready_s: float | None = None
    """Seconds from the engine's start until it answered; None for an external endpoint."""
    peak_rss_bytes: int | None = None
    """Peak resident memory of the engine's processes, which includes the reserved KV cache."""
    capacity: dict[str, LoadRun] = field(default_factory=dict)
    """Closed-loop run of each workload."""
    at_rate: dict[str, list[LoadRun]] = field(default_factory=dict)
    """Open-loop runs of each workload, in ascending order of their rates."""
    overloaded: dict[str, list[float]] = field(default_factory=dict)
    """Open-loop rates of each workload that were not run because they far exceed the variant's capacity. The queue
    would grow without end, so the variant meets no objective at these rates."""


@dataclass(frozen=True)
class Bottleneck:
    """The phase that limits a workload at capacity: prefill (compute-bound) or decode (memory-bound)."""

    limited_by: Literal["prefill", "decode"] | None
    """Phase that would take longer at the hardware's roofline; None if a roofline is unknown."""
    prefill_tokens_per_s: float | None
    """Computed prompt tokens per second, without cached ones; None if the server does not count them."""
    prefill_roofline_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    decode_roofline_tokens_per_s: float | None
    """Roofline of all concurrent streams: one stream's times their number, as they share each read of the weights."""
    roofline_frac: float | None
    """Fraction of the run that both phases would take at their rooflines; 1 is as fast as the hardware allows."""


@dataclass
class VariantResult:
    """Results of one variant or of one external endpoint: how it was built, its quality and its speed."""

    name: str
    """Unique name in the comparison: the recipe's name, or the name that the user gave."""
    recipe: str
    """Name of the recipe; empty for an existing model or an endpoint."""
    summary: str
    """Description of the recipe in words."""
    directory: str | None = None
    """Directory of the model; None for an endpoint."""
    url: str | None = None
    """Base URL of an endpoint; None for a variant that this run serves."""
    identity: str = ""
    """Hash of config, tokenizer, weights and launch plan; for an endpoint, of its URL and model name. Earlier
    measurements are reused only while it is unchanged."""
    disk_bytes: int | None = None
    num_parameters: int | None = None
    build_s: float | None = None
    """Seconds that the build took, possibly in an earlier run."""
    build_reused: bool | None = None
    """Whether the variant was already built before this run."""
    calibration_source: str = ""
    """Source of the texts on which the recipe was calibrated; empty if it needed none, or if that is unknown."""
    rounds: list[Round] = field(default_factory=list)
    quality: dict[str, dict[str, QualityEstimate]] = field(default_factory=dict)
    """Estimates by workload (and TEXT), then by metric."""
    differences: dict[str, dict[str, Annotated[Difference, BeforeValidator(_restore_nan)]]] = field(
        default_factory=dict
    )
    """Differences from the reference by workload (and TEXT), then by metric; empty for the reference itself."""
    rank_agreement: dict[str, dict[str, QualityEstimate]] = field(default_factory=dict)
    """`kendall_tau` and `top10_overlap` by workload. They compare the scores returned under load with the reference's
    scores of the same candidate lists. The reference and workloads without scores have none."""
    calibrations: dict[str, ScoreCalibration] = field(default_factory=dict)
    """Calibration of the label scores by workload, from the manifest or fitted in the first round."""
    bottlenecks: dict[str, Bottleneck] = field(default_factory=dict)
    """Bottleneck of each workload in the closed loop of the first round."""
    costs: dict[str, dict[str, Spread]] = field(default_factory=dict)
    """Costs at capacity by workload: `per_million_items`, `per_million_output_tokens`, `per_thousand_answers` and
    `per_correct_answer`. The unit is the currency of the price, or seconds of the machine if there is no price."""

    @property
    def ready_s(self) -> Spread | None:
        return spread(one.ready_s for one in self.rounds)

    @property
    def peak_rss_bytes(self) -> Spread | None:
        return spread(one.peak_rss_bytes for one in self.rounds)

    def capacity(self, workload: str) -> list[LoadSummary]:
        """Return the closed-loop summary of each round."""
        return [one.capacity[workload].summary for one in self.rounds if workload in one.capacity]

    def at_rate(self, workload: str, rate_rps: float) -> list[LoadSummary]:
        """Return the open-loop summary at one rate of each round."""
        runs = [run for one in self.rounds for run in one.at_rate.get(workload, [])]
        return [run.summary for run in runs if run.rate_rps == rate_rps]

    def is_overloaded(self, workload: str, rate_rps: float | None) -> bool:
        """Whether the rate was skipped in a round because it far exceeds the variant's capacity."""
        return any(rate_rps in one.overloaded.get(workload, []) for one in self.rounds)


@dataclass(frozen=True)
class Preset:
    """Amount of measurement. These settings change the measured values, so one output folder holds one preset."""

    quality_prompts: dict[str, int]
    """Number of quality prompts of each workload; with `looks` the maximum."""
    users: dict[str, int]
    """Number of closed-loop users of each workload."""
    duration_s: float
    """Measured seconds of each load test."""
    warmup_s: float
    cooldown_s: float = 2.0
    num_rounds: int = 2
    num_texts: int = 8
    """Number of held-out texts for perplexity and KL divergence; 0 skips them."""
    text_tokens: int = 512
    """Number of tokens of each text."""
    calibration_prompts: int = 0
    """Number of prompts of the calibration split that a missing calibration is fitted on; 0 fits none."""
    rate_fracs: tuple[float, ...] = (0.5, 0.8)
    """Open-loop rates as fractions of the reference's capacity in the first round."""
    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Open-loop rates in requests/s by workload, which replace `rate_fracs`."""
    looks: tuple[float, ...] = ()
    """Fractions of the quality prompts after which asking ends if the variant's quality is decided; empty asks all."""
    loads_losers: bool = True
    """Whether a variant is load-tested that has lost too much quality."""
    seed: int = 0


@dataclass(frozen=True)
class Requirements:
    """Conditions for shipping a variant. These settings change the verdict and not the measured values."""

    max_quality_loss_frac: float = 0.03
    """Maximum loss of each primary metric, as a fraction of the reference's value above the floor."""
    confidence: float = 0.9
    """Least probability with which no variant that loses more is said to keep quality (compare.decision)."""
    slos: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Objectives such as `e2e_p99=2s` by workload; latency does not count for a workload without objectives."""
    price_per_hour: float | None = None
    """Price of the machine, in any currency."""


@dataclass(frozen=True)
class QualityOutcome:
    """What the answers say of a variant's primary metric on one workload."""

    metric: str
    kept_frac: Number
    """Quality above the floor, over the reference's quality above the floor; 1 is no loss."""
    probability: Number
    """Probability that the variant keeps at least 1 minus the maximum quality loss."""
    num_prompts: int = 0
    """Number of prompts that both the variant and the reference answered."""
    prompts_needed: int | None = None
    """About the number of prompts that would decide: for a variant that loses nothing, or whose loss is as estimated if
    that is clearly too large. None if no number would."""


@dataclass(frozen=True)
class Signal:
    """Tells whether a workload can compare these models: what the reference and simple baselines reach."""

    metric: str
    floor: Number
    """Value of the primary metric for a model that knows nothing; NaN if it has none."""
    is_informative: bool
    """Whether the reference's 95% interval lies above the floor."""
    baselines: dict[str, QualityEstimate] = field(default_factory=dict)
    """Primary metric of baselines that use no language model, by name."""
    better_baselines: list[str] = field(default_factory=list)
    """Baselines that reach at least the reference's value."""


@dataclass(frozen=True)
class SloOutcome:
    """Tells whether a variant meets a workload's objectives at the SLO rate."""

    rate_rps: float | None
    """The SLO rate; None if the reference's capacity is unknown."""
    num_met: int
    """Number of rounds in which every objective was met."""
    num_rounds: int
    worst: dict[str, float | None]
    """Largest value of each objective over rounds, in seconds or as a fraction; None if a round has no sample."""


@dataclass(frozen=True)
class VariantDecision:
    """Everything that the verdict considers about one variant."""

    name: str
    quality: dict[str, QualityOutcome]
    """Outcome of each workload."""
    ruling: Ruling
    """Whether the variant keeps quality on every workload, loses it on one, or the answers do not tell."""
    quality_probability: Number
    """Probability that every primary metric is kept. Workloads are independent samples, so it is their product."""
    slo: dict[str, SloOutcome]
    """Outcome of each workload that has objectives."""
    meets_slo: bool
    """Whether every objective is met in every round of every workload."""
    cost_ratio: Spread | None
    """Cost at capacity over the reference's, as the mean over workloads: 0.5 is half as expensive. The unit of work is
    one scored item or one chat answer."""
    dominated_by: list[str]
    """Variants that are at least as good in quality, cost and latency, and clearly better in one of them."""
    indistinguishable_from: list[str]
    """Variants whose intervals overlap this one's in quality, cost and latency."""
    reason: str
    """Why the variant may or may not be shipped, as one or more sentences without their subject and last full stop."""

    @property
    def is_loaded(self) -> bool:
        """Whether the variant was measured against an objective."""
        return any(one.num_rounds for one in self.slo.values())

    @property
    def qualifies(self) -> bool:
        return self.ruling == "keeps" and self.meets_slo


@dataclass(frozen=True)
class Verdict:
    """The variant to ship, with the reasons."""

    winner: str | None
    """The cheapest variant that keeps quality and meets the objectives; None if no variant does, or if a workload
    cannot compare these models."""
    sentences: list[str]
    """Conclusions and reasons for a reader who has read nothing else."""
    confidence: Number
    """Probability that the winner keeps quality, with the number of variants tried accounted for. For the reference,
    that each cheaper variant that was not chosen loses too much. If there is no winner, that no variant qualifies."""
    confidence_words: str
    uninformative: list[str] = field(default_factory=list)
    """Workloads that cannot compare these models; then there is no winner."""
    decisions: list[VariantDecision] = field(default_factory=list)


@dataclass(frozen=True)
class Loss:
    """One metric of one variant, compared with the same variant of an earlier run."""

    variant: str
    workload: str
    metric: str
    kind: Literal["quality", "goodput"]
    loss_frac: float
    """Lost fraction of the earlier value; negative for a gain."""
    low: float
    high: float
    """Bounds of the loss. Quality: 95% interval of the paired bootstrap. Goodput: minimum and maximum over rounds."""
    limit_frac: float
    fails: bool
    """Whether the loss exceeds the limit and its interval excludes 0."""


@dataclass(frozen=True)
class BaselineOutcome:
    """The comparison with an earlier run."""

    baseline: str
    """Path of the earlier run."""
    losses: list[Loss]
    notes: list[str]
    """Limits of this comparison, such as that the machine itself may have changed its speed."""

    @property
    def passed(self) -> bool:
        return not any(loss.fails for loss in self.losses)


@dataclass(kw_only=True)
class Comparison:
    """One run of `slimserve compare`."""

    format: Literal[3] = 3
    command: Literal["compare"] = "compare"
    commit: str = field(default_factory=commit)
    hardware: dict[str, Any] = field(default_factory=lambda: probe_hardware().as_dict())
    versions: dict[str, str] = field(default_factory=versions)
    model: str
    workloads: dict[str, str]
    """Name of each workload and of its primary metric."""
    preset: Preset
    requirements: Requirements
    started: str
    """Start time in ISO format."""
    reference: str = ""
    """Name of the variant that the others are compared with: `dense`, or else the first one."""
    signals: dict[str, Signal] = field(default_factory=dict)
    """What each workload can tell, by its name."""
    slo_rates: dict[str, float] = field(default_factory=dict)
    """Open-loop rate of each workload at which objectives are evaluated: the highest rate that the user gave, or else
    the lowest fraction of the reference's capacity."""
    elapsed_s: float = 0.0
    """Seconds of building and measuring, over all starts of an interrupted run."""
    variants: list[VariantResult] = field(default_factory=list)
    verdict: Verdict | None = None
    """Verdict; None until every variant is measured."""
    baseline: BaselineOutcome | None = None
    baseline_variants: list[VariantResult] = field(default_factory=list)
    """Variants of the baseline that are measured again in the same rounds; they are not part of the verdict."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    @property
    def cost_unit(self) -> str:
        """Unit of all costs, for labels."""
        return "machine-seconds" if self.requirements.price_per_hour is None else "currency units"

    def variant(self, name: str) -> VariantResult:
        return next(variant for variant in self.variants if variant.name == name)

    def rates(self, workload: str) -> list[float]:
        """Return the open-loop rates of a workload in ascending order."""
        runs = [run for variant in self.variants for one in variant.rounds for run in one.at_rate.get(workload, [])]
        return sorted({run.rate_rps for run in runs if run.rate_rps is not None})

    def write(self, directory: Path) -> Path:
        """Write results.json. Called after every measurement, so that an interrupted run keeps what it has."""
        path = directory / RESULTS_FILE
        write_atomically(path, TypeAdapter(Comparison).dump_json(self, indent=2).decode() + "\n")
        return path


def load_comparison(path: Path) -> Comparison:
    """Read a results.json, given its path or its directory; UserError if it is not a comparison of this format."""
    file = path / RESULTS_FILE if path.is_dir() else path
    try:
        return TypeAdapter(Comparison).validate_json(file.read_bytes())
    except OSError as error:
        remedy = "give the folder of an earlier compare, or its results.json"
        raise UserError("results", file, f"cannot be read ({error.strerror})", remedy) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        problem = f"is not a comparison of this version ({where}: {first['msg']})"
        raise UserError("results", file, problem, "run the comparison again") from error
