"""Tests of calibrations of label scores: synthetic scores with known probabilities, and MovieLens candidates."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from slimserve.compare.calibrate import (
    LabelScores,
    can_calibrate,
    check_prompts,
    fit_calibration,
    keep_calibration,
    label_scores,
)
from slimserve.compare.quality import Answers, calibrated_metrics, quality_metrics
from slimserve.core.errors import UserError
from slimserve.core.score_calibration import ScoreCalibration
from slimserve.core.variant import BaseModelRecord, Manifest, read_manifest, write_manifest
from slimserve.workloads.interface import ScoringPrompt
from slimserve.workloads.metrics import calibration_error, roc_auc

LABELS = (" yes", " no")


def sigmoid(x: np.ndarray) -> Any:
    return 1 / (1 + np.exp(-x))


def drawn(true_logit: Callable[[np.ndarray], np.ndarray], n: int = 4000, seed: int = 0) -> LabelScores:
    """Return scores around 0.3 with outcomes whose probability is `true_logit` of the score's logit."""
    numbers = np.random.default_rng(seed)
    x = numbers.normal(-1.0, 0.8, n)
    positive = numbers.random(n) < sigmoid(true_logit(x))
    shares = [(float(p), 1 - float(p)) for p in sigmoid(x)]
    return LabelScores(LABELS, shares, [0 if one else 1 for one in positive], (np.arange(n) // 16).tolist())


TRUTHS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "calibrated": lambda x: x,
    "overconfident and biased": lambda x: 0.3 * x + 1.5,
    "underconfident": lambda x: 4 * x + 3,
    "no better than chance": lambda x: 0 * x + 0.4,
    "upside down": lambda x: -x,
    "a step": lambda x: np.where(x > -1, 2.0, -2.0),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_held_out_scores_are_calibrated_and_keep_their_order(name: str) -> None:
    calibration = fit_calibration("w", drawn(TRUTHS[name]))
    test = drawn(TRUTHS[name], seed=1)
    scores = [row[0] for row in test.shares]
    outcomes = [float(truth == 0) for truth in test.truths]
    mapped = calibration.apply_map(scores)
    assert calibration_error(outcomes, mapped.tolist()) <= 0.03
    assert calibration.after.calibration_error <= 0.03
    assert calibration.after.brier <= calibration.before.brier + 0.001
    order = np.argsort(scores)
    assert (np.diff(mapped[order]) > 0).all()
    assert roc_auc(outcomes, mapped.tolist()) == roc_auc(outcomes, scores)


def test_no_order_changes_for_any_scores_at_all() -> None:
    """Scores from float32 log-probabilities: tiny differences, ties, and values near 0 and 1."""
    numbers = np.random.default_rng(0)
    for seed in range(12):
        names = list(TRUTHS)
        calibration = fit_calibration("w", drawn(TRUTHS[names[seed % len(names)]], n=80 + 100 * seed, seed=seed))
        centre = numbers.normal(-1, 3)
        logits = np.concatenate(
            [centre + np.float32(1e-6) * np.arange(50), numbers.normal(0, 8, 200), np.linspace(-20, 20, 50)]
        )
        scores = np.sort(sigmoid(logits.astype(np.float64)))
        gaps = np.diff(scores)
        mapped = np.diff(calibration.apply_map(scores.tolist()))
        assert (mapped[gaps > 1e-13] > 0).all()
        assert (mapped[gaps == 0] == 0).all()
        assert (mapped >= 0).all()


def test_more_than_two_labels_share_the_temperature_that_was_planted() -> None:
    numbers = np.random.default_rng(0)
    true = numbers.dirichlet([1.0] * 4, 5000)
    sharp = true**2.5 / (true**2.5).sum(axis=1, keepdims=True)
    truths = [int(numbers.choice(4, p=row)) for row in true]
    labels = (" a", " b", " c", " d")
    calibration = fit_calibration("w", LabelScores(labels, sharp.tolist(), truths, list(range(5000))))
    assert calibration.method == "temperature"
    assert calibration.temperature == pytest.approx(2.5, rel=0.1)
    mapped = calibration.apply(sharp[0].tolist())
    assert mapped == pytest.approx(true[0].tolist(), abs=0.05)
    assert np.argsort(mapped).tolist() == np.argsort(sharp[0]).tolist()
    assert sum(mapped) == pytest.approx(1.0)
    assert calibration.after.calibration_error < calibration.before.calibration_error / 3


def test_a_pair_of_labels_sums_to_one() -> None:
    calibration = fit_calibration("w", drawn(TRUTHS["underconfident"]))
    first, second = calibration.apply([0.2, 0.8])
    assert first + second == pytest.approx(1.0)
    assert first == pytest.approx(float(calibration.apply_map([0.2])[0]))


@pytest.mark.parametrize(("rows", "groups", "truths"), [(20, 20, (0, 1)), (200, 1, (0, 1)), (200, 20, (0,))])
def test_too_little_data_is_one_clear_line(rows: int, groups: int, truths: tuple[int, ...]) -> None:
    numbers = [index % len(truths) for index in range(rows)]
    scores = LabelScores(
        LABELS, [(0.3, 0.7)] * rows, [truths[one] for one in numbers], [index % groups for index in range(rows)]
    )
    with pytest.raises(UserError, match=r"give at least 50 items of 2 groups, with 2 true labels"):
        fit_calibration("w", scores)


def test_only_workloads_with_one_set_of_labels_can_be_calibrated() -> None:
    assert can_calibrate("recommendation")
    assert not can_calibrate("reasoning")
    prompts = [ScoringPrompt("q", ("i",), labels, (True,), 0) for labels in (LABELS, (" a", " b"))]
    with pytest.raises(UserError, match="does not score the same labels"):
        check_prompts("w", prompts)


def test_the_manifest_keeps_one_calibration_per_workload(tmp_path: Path) -> None:
    base = BaseModelRecord(model="m", sha256="0")
    write_manifest(tmp_path, Manifest(name="v", recipe="r", base=base, steps=[], num_parameters=1))
    first = fit_calibration("one", drawn(TRUTHS["underconfident"]))
    keep_calibration(tmp_path, first)
    keep_calibration(tmp_path, first.model_copy(update={"workload": "two"}))
    again = fit_calibration("one", drawn(TRUTHS["calibrated"]))
    keep_calibration(tmp_path, again)
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert set(manifest.score_calibrations) == {"one", "two"}
    assert manifest.score_calibrations["one"] == again
    assert manifest.recipe == "r"


def invented_answers(split: str, distort: Callable[[np.ndarray], np.ndarray], count: int) -> list[tuple[float, ...]]:
    """Return scores of MovieLens candidates by a model that knows a little of the truth."""
    numbers = np.random.default_rng(3)
    prompts = _prompts_of(split, count)
    answers = []
    for prompt in prompts:
        taste = prompt.query.count(" yes") / (prompt.query.count(" yes") + prompt.query.count(" no"))
        x = 1.2 * (taste - 0.5) + 0.4 * np.array(prompt.truth, dtype=float) + numbers.normal(0, 0.6, len(prompt.items))
        answers.append(tuple(sigmoid(distort(x)).tolist()))
    return answers


@cache
def _prompts_of(split: str, count: int) -> list[ScoringPrompt]:
    from slimserve.workloads.recommendation import WORKLOAD

    is_quality = split == "quality"
    drawn = WORKLOAD.make_prompts("quality", count) if is_quality else WORKLOAD.score_calibration_prompts(count)
    return cast("list[ScoringPrompt]", drawn)


@pytest.mark.parametrize(
    "distort", [lambda x: 3 * x - 1, lambda x: 0.2 * x + 1, lambda x: x - 2.5], ids=["sharp", "flat", "biased"]
)
def test_movielens_is_calibrated_on_unseen_users_and_compare_shows_before_and_after(
    distort: Callable[[np.ndarray], np.ndarray],
) -> None:
    """The calibration split and the quality split have different users, as for every recipe."""
    calibration = fit_calibration(
        "recommendation",
        label_scores(_prompts_of("calibration", 256), invented_answers("calibration", distort, 256)),
    )
    answers = Answers("", list(invented_answers("quality", distort, 160)))
    before = quality_metrics("recommendation", 160, 0, answers)
    after = calibrated_metrics("recommendation", 160, 0, answers, calibration)
    assert set(after) == {"calibration_error_calibrated", "brier_calibrated"}
    assert before["calibration_error"].value > 0.1
    assert after["calibration_error_calibrated"].value <= 0.03
    assert after["brier_calibrated"].value < before["brier"].value


def test_every_user_of_the_calibration_split_comes_once_before_any_comes_twice() -> None:
    groups = [prompt.group for prompt in _prompts_of("calibration", 256)]
    assert len(set(groups[:250])) == 250
    quality = {prompt.group for prompt in _prompts_of("quality", 160)}
    assert not quality & set(groups)


def test_a_calibration_survives_json() -> None:
    calibration = fit_calibration("w", drawn(TRUTHS["a step"]))
    again = ScoreCalibration.model_validate_json(calibration.model_dump_json())
    assert again == calibration
    assert math.isfinite(again.apply([1.0, 0.0])[0])
    assert math.isfinite(again.apply([0.0, 1.0])[0])
