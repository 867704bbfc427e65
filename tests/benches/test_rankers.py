"""Tests of the rankers' scores in process against separate sequences, and of metrics over seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM

from benches.ranker_kd import over_seeds
from benches.rankers import list_scores
from slimserve.core.tokenizer import load_tokenizer
from slimserve.workloads.interface import ScoringPrompt
from slimserve.workloads.metrics import ranking_metrics
from slimserve.workloads.recommendation import WORKLOAD
from tests.distill.conftest import save_tiny


@torch.no_grad()
def test_list_scores_are_those_of_one_sequence_per_candidate(smollm2: Path, tmp_path: Path) -> None:
    directory = save_tiny(smollm2, tmp_path / "model", 3, initializer_range=0.4)
    drawn = cast("list[ScoringPrompt]", WORKLOAD.make_prompts("load", 2))
    prompts = [replace(one, query="".join(one.lines[:5])).with_candidates(range(4)) for one in drawn]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), load_tokenizer(smollm2)
    labels = [tokenizer(label)["input_ids"][0] for label in prompts[0].labels]
    expected = []
    for prompt in prompts:
        for item in prompt.items:
            ids = tokenizer(prompt.query + item, return_tensors="pt")["input_ids"]
            expected.append(float(model(ids).logits[0, -1, labels].softmax(-1)[0]))
    scores = [score for row in list_scores(directory, prompts) for score in row]
    assert np.std(expected) > 0.1
    # The scores are in bfloat16 on machines with such products.
    assert scores == pytest.approx(expected, abs=0.05)


def test_a_metric_over_seeds_is_the_mean_of_the_seeds_metrics() -> None:
    draw = np.random.default_rng(0)
    truths = [[1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0], [1, 1, 0, 0]]
    seeds = draw.random((2, 4, 4)).tolist()
    data = [ranking_metrics(truths, scores, [0, 1, 1, 2]) for scores in seeds]
    chosen = [0, 2, 2, 3]

    def auc(scores: list[list[float]]) -> float:
        labels, values = ([one for row in chosen for one in rows[row]] for rows in (truths, scores))
        return float(roc_auc_score(labels, values))

    pooled = over_seeds([one["auc"] for one in data])
    assert pooled.statistic(chosen) == pytest.approx(np.mean([auc(scores) for scores in seeds]))
    within = over_seeds([one["within_group_auc"] for one in data])
    by_list = [[roc_auc_score(truths[row], scores[row]) for scores in seeds] for row in (0, 2, 3)]
    assert within.value == pytest.approx(np.mean(by_list)), "a list without an irrelevant item has no AUC"
    assert within.values is not None
    assert np.isnan(within.values[1])
