"""The decision rule: whether a variant keeps quality, loses it, or whether the answers cannot tell.

Quality kept is counted from the floor, the value of a model that knows nothing: (v - f) / (r - f) for a variant's value
v, the reference's value r and the floor f. A variant with tolerance t truly keeps quality if

    D = (v - f) - (1 - t) (r - f) >= 0.

`keep_probability` is the posterior probability of D >= 0, given both models' answers to the same prompts. With a vague
prior it equals one minus the one-sided p-value in large samples, so a threshold on it has a known error rate:

* A variant *keeps quality* if the joint probability over all workloads is at least 1 - a.
* It *loses quality* if the probability of one workload is at most a / (number of workloads).
* Otherwise it is *undecided*.

The error rate a is (1 - confidence) / (number of variants tried), Bonferroni's bound: trying more variants does not
make it more likely that one with too large a loss is shipped. If the answers are looked at several times, each look
gets a part of a (`look_errors`): an alpha-spending function (Lan and DeMets, Discrete sequential boundaries for
clinical trials, Biometrika 1983) of the power family a * s^p in the fraction s of the planned prompts (Kim and DeMets,
Design and analysis of group sequential tests based on the type I error spending rate function, Biometrika 1987).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm
from scipy.stats import t as student_t

from slimserve.workloads.interface import Estimate, MetricData
from slimserve.workloads.intervals import num_groups, paired_samples, paired_standard_error

Ruling = Literal["keeps", "loses", "undecided"]
"""What the answers say of a variant's quality."""

_PERIOD_SDS = 40.0
"""Least period of the inversion's grid, in standard deviations."""
_NUM_INVERSION = 1000
"""Points of the grid; the characteristic function of a few pairs already vanishes before its end."""
_POWER = 0.9
"""Probability with which the planned number of prompts decides for a variant that loses nothing."""
_SPENDING_POWER = 1.0
"""Exponent of the spending function. Small exponents spend early, which ends clear cases after few prompts."""
_GRID_STEP, _GRID_LIMIT = 0.02, 8.0
_LEAST_GROUPS = 2


@dataclass(frozen=True)
class Margin:
    """The posterior of D for one workload, from paired answers."""

    value: float
    """Estimate of D."""
    keep_probability: float
    """Probability that D is not negative; NaN if the answers do not define it."""
    sd: float
    """Standard deviation of D for one prompt: that of D's estimate times the square root of the number of prompts."""
    tolerated: float
    """The loss that is tolerated in the metric's unit, t (r - f): the value of D for a variant that loses nothing."""
    num_prompts: int


@dataclass(frozen=True)
class DecisionRule:
    """Thresholds that give a comparison its error rates."""

    max_loss_frac: float = 0.03
    """Tolerance t: maximum loss of the quality above the floor, as a fraction of the reference's."""
    confidence: float = 0.9
    """Least probability with which no variant that keeps less than this is said to keep quality."""
    num_variants: int = 1
    """Number of variants that were tried, without the reference."""

    @property
    def error(self) -> float:
        """Error rate of one variant: the probability of a wrong `keeps`, and of a wrong `loses`."""
        return (1 - self.confidence) / max(1, self.num_variants)

    def decide(self, keep_probabilities: Sequence[float], error: float | None = None) -> Ruling:
        """Decide about one variant from its keep probability on each workload; NaN is never decided.

        `error` replaces the rule's own error rate, as the looks of a sequential test do.
        """
        error = self.error if error is None else error
        known = [probability for probability in keep_probabilities if math.isfinite(probability)]
        if any(probability <= error / len(keep_probabilities) for probability in known):
            return "loses"
        is_complete = bool(keep_probabilities) and len(known) == len(keep_probabilities)
        return "keeps" if is_complete and math.prod(known) >= 1 - error else "undecided"

    def margin(self, metric: MetricData, reference: MetricData, num_prompts: int, seed: int = 0) -> Margin:
        """Return the posterior of D of two models that answered the same `num_prompts` prompts.

        For shares of successes the posterior is that of the four kinds of pairs with Jeffreys' prior, because a
        bootstrap of a few discordant pairs looks certain. For other metrics it is Student's t around the estimate. Its
        standard deviation is linearized over groups for means, and comes from a paired bootstrap for other metrics.
        Metrics that are better when lower are mirrored.
        """
        floor = reference.floor
        if floor is None or not math.isfinite(metric.value - reference.value):
            return Margin(math.nan, math.nan, math.nan, math.nan, num_prompts)
        sign = 1.0 if reference.higher_is_better else -1.0
        kept = 1 - self.max_loss_frac
        value = sign * (metric.value - floor - kept * (reference.value - floor))
        tolerated = sign * self.max_loss_frac * (reference.value - floor)
        if metric.successes is not None and reference.successes is not None:
            probability, sd = _pair_posterior(metric.successes, reference.successes, floor, kept)
        elif metric.values is not None and reference.values is not None:
            sd = paired_standard_error(metric, reference, kept)
            probability = _student_probability(value, sd, num_groups(metric))
        else:
            samples = paired_samples(metric, reference, seed)
            draws = sign * (samples[:, 0] - floor - kept * (samples[:, 1] - floor))
            sd = float(np.std(draws)) if len(draws) else math.nan
            probability = _student_probability(value, sd, num_groups(metric))
        return Margin(value, probability, sd * math.sqrt(num_prompts), tolerated, num_prompts)

    def prompts_needed(self, margin: Margin, effect: float | None = None) -> int | None:
        """Return the number of prompts that decides with probability 0.9 for a variant whose D is `effect`.

        By default the effect is that of a variant that loses nothing. None if no number would decide.
        """
        effect = margin.tolerated if effect is None else effect
        if not abs(effect) > 0 or not math.isfinite(margin.sd):
            return None
        z = norm.isf(self.error) + norm.ppf(_POWER)
        return math.ceil(float(z * margin.sd / effect) ** 2)


def is_informative(reference: Estimate, metric: MetricData) -> bool:
    """Whether a workload can compare models: the reference's 95% interval is on the good side of the floor."""
    if metric.floor is None or not math.isfinite(reference.value):
        return False
    return reference.low > metric.floor if metric.higher_is_better else reference.high < metric.floor


def kept_frac(value: float, reference: float, floor: float | None) -> float:
    """Return the fraction of the reference's quality above the floor that a value keeps; NaN where undefined."""
    if floor is None or reference == floor:
        return math.nan
    return (value - floor) / (reference - floor)


@lru_cache
def look_errors(fractions: tuple[float, ...], error: float) -> tuple[float, ...]:
    """Return the one-sided error rate of each look, so that all looks together have the error rate `error`.

    `fractions` are the ascending fractions of the planned prompts at which the answers are looked at; the last need not
    be 1. The joint distribution of the looks is that of a Brownian motion. Its density is carried from look to look on
    a grid (Armitage, McPherson and Rowe, Repeated significance tests on accumulating data, 1969). Raises ValueError for
    fractions that do not ascend within (0, 1].
    """
    ascends = all(before < after for before, after in zip((0.0, *fractions), fractions, strict=False))
    if not ascends or max(fractions, default=1) > 1:
        raise ValueError(f"the fractions {fractions} do not ascend within (0, 1]")
    grid = np.linspace(-_GRID_LIMIT, _GRID_LIMIT, round(2 * _GRID_LIMIT / _GRID_STEP) + 1, dtype=np.float64)
    density: NDArray[np.float64] | None = None
    before, spent, errors = 0.0, 0.0, []
    for fraction in fractions:
        share = error * fraction**_SPENDING_POWER - spent
        spent += share
        step = math.sqrt(fraction - before)
        if density is None:
            bound = step * float(norm.isf(share))
            after = norm.pdf(grid, scale=step)
        else:
            bound = _bound(grid, density, step, share)
            kernel = norm.pdf(grid[:, None] - grid[None, :], scale=step) * _GRID_STEP
            after = kernel @ density
        errors.append(float(norm.sf(bound / math.sqrt(fraction))))
        density = np.where(grid < bound, after, 0.0)
        before = fraction
    return tuple(errors)


def _bound(grid: NDArray[np.float64], density: NDArray[np.float64], step: float, share: float) -> float:
    """Return the bound that a Brownian motion with this density crosses with probability `share` after one step."""

    def excess(bound: float) -> float:
        return float(np.sum(density * norm.sf((bound - grid) / step))) * _GRID_STEP - share

    return float(brentq(excess, -_GRID_LIMIT, _GRID_LIMIT))


def _pair_posterior(
    successes: Sequence[bool], reference: Sequence[bool], floor: float, kept: float
) -> tuple[float, float]:
    """Return the probability that D is not negative and the sd of D, from the counts of the four kinds of pairs.

    The posterior of their shares is Dirichlet's, with Jeffreys' prior.
    """
    ours, theirs = np.asarray(successes, bool), np.asarray(reference, bool)
    kinds = [(a, b) for a in (True, False) for b in (True, False)]
    shapes = np.array([float(np.sum((ours == a) & (theirs == b))) + 0.5 for a, b in kinds])
    weights = np.array([a - floor - kept * (b - floor) for a, b in kinds])
    total = float(shapes.sum())
    mean = float(weights @ shapes) / total
    variance = (float(weights**2 @ shapes) / total - mean**2) / (total + 1)
    return _probability_of_gammas(weights, shapes), math.sqrt(max(0.0, variance))


def _probability_of_gammas(weights: NDArray[np.float64], shapes: NDArray[np.float64]) -> float:
    """Return the probability that a weighted sum of independent gamma variables of these shapes is not negative.

    Shares with Dirichlet's distribution are gamma variables divided by their sum, so this is the probability for the
    shares too. The characteristic function is inverted on a regular grid (Davies, Numerical inversion of a
    characteristic function, Biometrika 1973, formula 6). Where the answer is a Beta distribution, the error was at
    most 1e-7.
    """
    scale = math.sqrt(float(weights**2 @ shapes))
    if scale == 0:
        return 1.0
    step = 2 * math.pi / (abs(float(weights @ shapes)) / scale + _PERIOD_SDS)
    halves = np.arange(_NUM_INVERSION) + 0.5
    products = (weights / scale)[:, None] * (halves * step)
    log_modulus = -shapes @ np.log1p(products**2) / 2
    phase = shapes @ np.arctan(products)
    return float(np.clip(0.5 + np.sum(np.exp(log_modulus) * np.sin(phase) / halves) / math.pi, 0.0, 1.0))


def _student_probability(value: float, sd: float, groups: int) -> float:
    if groups < _LEAST_GROUPS or not math.isfinite(value) or not math.isfinite(sd):
        return math.nan
    if sd == 0:
        return 1.0 if value >= 0 else 0.0
    return float(student_t.cdf(value / sd, groups - 1))
