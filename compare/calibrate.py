"""`slimserve calibrate`: fits the calibration of a variant's label scores on a workload's calibration split.

The scores come from the served variant, as in a comparison. Two maps are tried, a logistic one (Platt 1999) and an
isotonic one, and the one with the smaller log loss in a cross-validation over groups is kept. Isotonic regression is
constant over blocks of scores, which would make ties; the map therefore connects the centres of its blocks (Oron and
Flournoy 2017) and never has a slope below `_LEAST_SLOPE`, so that no order changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slimserve.compare.quality import ask_prompts
from slimserve.core.errors import UserError
from slimserve.core.model_files import count_parameters, model_hash
from slimserve.core.openai_client import Target
from slimserve.core.score_calibration import Fit, LabelMap, ScoreCalibration, logits_of
from slimserve.core.variant import BaseModelRecord, Manifest, read_manifest, write_manifest
from slimserve.workloads import load_workload
from slimserve.workloads.interface import ChoicePrompt, Prompt, ScoringPrompt
from slimserve.workloads.metrics import brier_score, calibration_error

_Floats = NDArray[np.float64]
_Method = Literal["logistic", "isotonic", "temperature"]
_NUM_PROBED = 8
"""Number of prompts that show whether a workload scores one set of labels."""
_LEAST_SLOPE = 0.01
"""Least slope of a map in logits. It keeps scores apart that a model ranks no better than chance."""
_OUTER_SLOPE = 0.05
"""Largest slope outside of the fitted scores, where nothing is known."""
_LARGEST_LOGIT = 20.0
_MIN_ITEMS = 50
_FOLDS = 5
_MAX_LOG_TEMPERATURE = 4.0


@dataclass(frozen=True)
class LabelScores:
    """Scores of labels with their outcomes: one row per item, or per choice."""

    labels: tuple[str, ...]
    shares: Sequence[Sequence[float]]
    """Share of each label."""
    truths: Sequence[int]
    """Number of the true label."""
    groups: Sequence[int]


def calibrate_target(target: Target, workload: str, num_prompts: int, seed: int = 0) -> ScoreCalibration:
    """Ask a served model the calibration split of a workload and fit the calibration of its scores.

    Raises UserError if the workload does not score a fixed set of labels or has too few items.
    """
    prompts = load_workload(workload).score_calibration_prompts(num_prompts, seed)
    check_prompts(workload, prompts)
    answers = ask_prompts(target, f"calibration {workload}, {target.model}", prompts)
    return fit_calibration(workload, label_scores(prompts, answers))


def keep_calibration(directory: Path, calibration: ScoreCalibration) -> Path:
    """Write a calibration into the manifest in `directory`, in place of an earlier one for the same workload."""
    manifest = read_manifest(directory) or Manifest(
        name=directory.name,
        recipe="dense",
        base=BaseModelRecord(model=directory.name, sha256=model_hash(directory)),
        steps=[],
        num_parameters=count_parameters(directory),
    )
    kept = manifest.score_calibrations | {calibration.workload: calibration}
    return write_manifest(directory, manifest.model_copy(update={"score_calibrations": kept}))


@cache
def can_calibrate(workload: str) -> bool:
    """Return whether a workload's prompts score one set of labels."""
    try:
        check_prompts(workload, load_workload(workload).make_prompts("calibration", _NUM_PROBED))
    except UserError:
        return False
    return True


def check_prompts(workload: str, prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """Return the labels that all prompts have in common; UserError if they have none."""
    labels = {
        prompt.labels if isinstance(prompt, ScoringPrompt) else tuple(prompt.choices)
        for prompt in prompts
        if isinstance(prompt, ScoringPrompt | ChoicePrompt)
    }
    is_scored = all(
        isinstance(prompt, ScoringPrompt) or (isinstance(prompt, ChoicePrompt) and not prompt.is_normalized)
        for prompt in prompts
    )
    if len(labels) != 1 or not is_scored:
        problem = "does not score the same labels in every prompt, so its scores cannot be calibrated"
        raise UserError(
            "workload",
            workload,
            problem,
            "use a workload of kind rank with labels, or of kind classify without normalize",
        )
    return labels.pop()


def label_scores(prompts: Sequence[Prompt], answers: Sequence[Any]) -> LabelScores:
    """Return the labels' shares and outcomes from the answers to prompts of one set of labels."""
    shares: list[tuple[float, ...]] = []
    truths: list[int] = []
    groups: list[int] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if isinstance(prompt, ScoringPrompt):
            shares += [(score, 1 - score) for score in answer]
            truths += [0 if is_first else 1 for is_first in prompt.truth]
            groups += [prompt.group] * len(prompt.items)
        else:
            assert isinstance(prompt, ChoicePrompt)
            shares.append(prompt.probabilities(answer))
            truths.append(prompt.truth)
            groups.append(prompt.group)
    first = prompts[0]
    labels = first.labels if isinstance(first, ScoringPrompt) else tuple(getattr(first, "choices", ()))
    return LabelScores(labels, shares, truths, groups)


def fit_calibration(workload: str, scores: LabelScores) -> ScoreCalibration:
    """Fit the calibration with the smallest cross-validated log loss; UserError if there are too few items."""
    num_groups = len(set(scores.groups))
    if len(scores.truths) < _MIN_ITEMS or num_groups < 2 or len(set(scores.truths)) < 2:
        problem = f"has {len(scores.truths)} items of {num_groups} groups with {len(set(scores.truths))} true labels"
        remedy = f"give at least {_MIN_ITEMS} items of 2 groups, with 2 true labels"
        raise UserError("workload", workload, problem, remedy)
    methods: list[_Method] = ["logistic", "isotonic"] if len(scores.labels) == 2 else ["temperature"]
    held_out = {method: _cross_validated(method, scores) for method in methods}
    best = min(methods, key=lambda method: _log_loss(held_out[method], scores.truths))
    return ScoreCalibration(
        workload=workload,
        labels=list(scores.labels),
        method=best,
        **_fitted_map(best, scores.shares, scores.truths),
        num_items=len(scores.truths),
        num_groups=num_groups,
        before=_fit(np.asarray(scores.shares), scores),
        after=_fit(held_out[best], scores),
    )


def _fitted_map(method: _Method, shares: Sequence[Sequence[float]], truths: Sequence[int]) -> dict[str, Any]:
    """Return the fields of a ScoreCalibration that a method fits."""
    if method == "temperature":
        return {"temperature": fit_temperature(shares, truths)}
    outcomes = np.asarray([truth == 0 for truth in truths], dtype=np.float64)
    x = logits_of([row[0] for row in shares])
    knots, values, slope = (fit_logistic if method == "logistic" else fit_isotonic)(x, outcomes)
    return {"logits": knots, "calibrated_logits": values, "outer_slope": slope}


def fit_logistic(x: _Floats, outcomes: _Floats) -> tuple[list[float], list[float], float]:
    """Return knots, values and slope of the line in logits with the smallest log loss.

    The outcomes are smoothed as by Platt, so that separable scores have a finite slope.
    """
    from scipy.optimize import minimize

    num_positive = outcomes.sum()
    high, low = (num_positive + 1) / (num_positive + 2), 1 / (len(outcomes) - num_positive + 2)
    targets = np.where(outcomes > 0, high, low)
    centre, scale = float(x.mean()), float(x.std()) or 1.0
    z = (x - centre) / scale

    def loss(parameters: _Floats) -> float:
        y = parameters[0] * z + parameters[1]
        return float(np.mean(np.logaddexp(0, y) - targets * y))

    base_rate = float(np.clip(targets.mean(), 1e-6, 1 - 1e-6))
    least = _LEAST_SLOPE * scale
    start = [max(1.0, least), math.log(base_rate / (1 - base_rate))]
    slope, offset = minimize(loss, start, bounds=[(least, None), (None, None)], method="L-BFGS-B").x
    # Beyond the fitted scores, and where the probability is nearly 0 or 1, a steep line would round scores to ties.
    steep = float(slope / scale)
    first, last = (centre + (end - offset) / steep for end in (-_LARGEST_LOGIT, _LARGEST_LOGIT))
    ends = [max(float(x.min()), first), min(float(x.max()), last)]
    if ends[0] >= ends[1]:
        ends = [centre - 1.0, centre + 1.0]
    values = [float(offset + steep * (end - centre)) for end in ends]
    return ends, values, min(steep, _OUTER_SLOPE)


def fit_isotonic(x: _Floats, outcomes: _Floats) -> tuple[list[float], list[float], float]:
    """Return knots, values and outer slope of a strictly increasing map through the centres of the isotonic blocks."""
    from sklearn.isotonic import IsotonicRegression

    order = np.argsort(x, kind="stable")
    fitted = IsotonicRegression().fit_transform(x[order], outcomes[order])
    starts = np.flatnonzero(np.r_[True, np.diff(fitted) > 0])
    sizes = np.diff(np.r_[starts, len(x)])
    centres = np.add.reduceat(x[order], starts) / sizes
    # Laplace's rule keeps a block of one outcome away from 0 and 1; what it disorders, the running maximum repairs.
    rates = (np.add.reduceat(outcomes[order], starts) + 1) / (sizes + 2)
    values = np.maximum.accumulate(logits_of(rates))
    for block in range(1, len(centres)):
        values[block] = max(values[block], values[block - 1] + _LEAST_SLOPE * (centres[block] - centres[block - 1]))
    return [float(value) for value in centres], [float(value) for value in values], _LEAST_SLOPE


def fit_temperature(shares: Sequence[Sequence[float]], truths: Sequence[int]) -> float:
    """Return the temperature of the labels' log-probabilities with the smallest log loss (Guo et al. 2017)."""
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    logs = np.log(np.clip(np.asarray(shares, dtype=np.float64), 1e-15, 1.0))

    def loss(log_temperature: float) -> float:
        logprobs = log_softmax(logs / math.exp(log_temperature), axis=1)
        return float(-np.mean(logprobs[np.arange(len(truths)), truths]))

    bounds = (-_MAX_LOG_TEMPERATURE, _MAX_LOG_TEMPERATURE)
    return math.exp(float(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def _cross_validated(method: _Method, scores: LabelScores) -> _Floats:
    """Return the calibrated shares of every row, each by a map that was fitted without its group."""
    from sklearn.model_selection import GroupKFold

    folds = GroupKFold(min(_FOLDS, len(set(scores.groups)))).split(scores.truths, groups=scores.groups)
    calibrated = np.zeros((len(scores.truths), len(scores.labels)))
    for training, test in folds:
        shares, truths = [scores.shares[row] for row in training], [scores.truths[row] for row in training]
        label_map = LabelMap(method=method, **_fitted_map(method, shares, truths))
        calibrated[test] = [label_map.apply(scores.shares[row]) for row in test]
    return calibrated


def _log_loss(shares: _Floats, truths: Sequence[int]) -> float:
    return float(-np.mean(np.log(np.clip(shares[np.arange(len(truths)), truths], 1e-15, 1.0))))


def _fit(shares: _Floats, scores: LabelScores) -> Fit:
    """Return the agreement of shares with outcomes; for more than two labels, that of the most likely label."""
    if len(scores.labels) == 2:
        outcomes, predicted = [float(truth == 0) for truth in scores.truths], shares[:, 0]
    else:
        chosen = shares.argmax(axis=1)
        outcomes = [float(one == truth) for one, truth in zip(chosen, scores.truths, strict=True)]
        predicted = shares.max(axis=1)
    values = predicted.tolist()
    return Fit(calibration_error=calibration_error(outcomes, values), brier=brier_score(outcomes, values))
