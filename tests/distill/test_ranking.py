"""Tests of the listwise loss and of soft labels against loops in float64, and of a ranker's training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from slimserve.core.errors import UserError
from slimserve.distill.batches import make_batches
from slimserve.distill.chunked import TeacherMixture, TeacherStates
from slimserve.distill.losses import Targets, cross_entropy_per_token, mixture_logits
from slimserve.distill.ranking import LabelLists, listwise_loss, log_odds, teacher_log_odds
from slimserve.distill.recipe import LossSettings
from slimserve.distill.run import distill
from slimserve.distill.sections import Label
from slimserve.distill.student import OnlineTeacher, StudentLoss
from slimserve.distill.supervision import SupervisedSequence
from tests.distill.conftest import make_recipe, save_tiny
from tests.distill.test_train import assert_same_weights, losses_of, steps_of

LENGTHS = (5, 1, 3)
"""Numbers of labels of three lists: one full row, one list of a single label, and one with padding."""


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask() -> Tensor:
    return torch.arange(5)[None] < torch.tensor(LENGTHS)[:, None]


def softmax(scores: list[float], temperature: float) -> list[float]:
    powers = [math.exp(score / temperature) for score in scores]
    return [power / sum(powers) for power in powers]


def by_hand(student: list[float], shares: list[float], teacher: list[float] | None, loss: LossSettings) -> float:
    """Return the loss of one list by its definition."""
    q = softmax(student, 1.0)
    cross_entropy = -sum(g / sum(shares) * math.log(p) for g, p in zip(shares, q, strict=True)) if any(shares) else 0.0
    if teacher is None:
        return cross_entropy
    q, p = softmax(student, loss.temperature), softmax(teacher, loss.temperature)
    if loss.divergence == "reverse_kl":
        p, q = q, p
    divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) * loss.temperature**2
    return (1 - loss.kd_weight) * cross_entropy + loss.kd_weight * divergence


@pytest.mark.parametrize("has_teacher", [False, True])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("kind", ["hard", "graded", "irrelevant"])
def test_the_listwise_loss_equals_its_definition(kind: str, divergence: Any, has_teacher: bool) -> None:
    loss = LossSettings(divergence=divergence, kd_weight=0.3, temperature=1.7)
    student, teacher = draw(3, 5, seed=1), draw(3, 5, seed=2) if has_teacher else None
    grades = {"hard": draw(3, 5, seed=3) > 0, "graded": draw(3, 5, seed=3).abs(), "irrelevant": torch.zeros(3, 5)}
    shares = torch.where(mask(), grades[kind].double(), 0.0)
    student.requires_grad_()
    values = listwise_loss(student, shares, mask(), teacher, loss)
    rows = [
        (
            student[row, :length].tolist(),
            shares[row, :length].tolist(),
            teacher[row, :length].tolist() if teacher is not None else None,
        )
        for row, length in enumerate(LENGTHS)
    ]
    assert values.tolist() == pytest.approx([by_hand(*row, loss) for row in rows], abs=1e-9)
    # The gradient by central differences.
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert gradient[~mask()].tolist() == [0.0] * 6
    for row, length in enumerate(LENGTHS):
        for at in range(length):
            sides = []
            for step in (1e-5, -1e-5):
                scores, given, known = rows[row]
                moved = [*scores[:at], scores[at] + step, *scores[at + 1 :]]
                sides.append(by_hand(moved, given, known, loss))
            assert float(gradient[row, at]) == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=1e-6)


def test_scores_are_log_odds_of_the_two_labels_and_teachers_are_mixed_over_the_list() -> None:
    rows = [[(4, Label(0, 7, 9, 1.0)), (0, Label(0, 9, 2, 0.25))], [(3, Label(0, 1, 0, 0.0))]]
    lists = LabelLists.of(rows)
    assert lists is not None
    parts = tuple(TeacherStates(draw(5, 6, seed=seed), draw(11, 6, seed=seed + 1)) for seed in (1, 3))
    for states in parts:
        log_p = (states.hidden_ND @ states.head_VD.T).log_softmax(-1)
        expected = [log_p[4, 7] - log_p[4, 9], log_p[0, 9] - log_p[0, 2], log_p[3, 1] - log_p[3, 0]]
        scores = log_odds(states.hidden_ND, states.head_VD, lists)[lists.is_label_MK]
        assert scores.tolist() == pytest.approx([float(one) for one in expected], abs=1e-5)
    mixed = teacher_log_odds(TeacherMixture(parts, (0.3, 0.7)), lists, 2.0)
    assert mixed is not None
    alone = [log_odds(one.hidden_ND, one.head_VD, lists)[0].tolist() for one in parts]
    shares = [softmax(scores, 2.0) for scores in alone]
    expected_shares = [0.3 * a + 0.7 * b for a, b in zip(*shares, strict=True)]
    assert (mixed[0] / 2.0).softmax(-1).tolist() == pytest.approx(expected_shares, rel=1e-5)


def test_a_mixture_of_teachers_is_the_weighted_mean_of_their_probabilities() -> None:
    logits, weights, temperature = (draw(4, 13, seed=1), draw(4, 11, seed=2)), (0.2, 0.8), 1.5
    mixed = (mixture_logits(logits, weights, temperature).double() / temperature).softmax(-1)
    parts = [(one[:, :11] / temperature).softmax(-1) * weight for one, weight in zip(logits, weights, strict=True)]
    torch.testing.assert_close(mixed, parts[0] + parts[1], rtol=1e-5, atol=1e-7)


def test_the_cross_entropy_of_soft_labels_is_the_mean_over_both_labels() -> None:
    logits, first, second = draw(3, 7, seed=1), torch.tensor([1, 2, 6]), torch.tensor([0, 5, 6])
    shares = torch.tensor([0.25, 1.0, 0.5])
    log_q = logits.log_softmax(-1)
    expected = [-sum(w * log_q[row, t] for w, t in pairs) for row, pairs in enumerate(_pairs(first, second, shares))]
    values = cross_entropy_per_token(logits, Targets(first, second, shares, torch.ones(3)))
    assert values.tolist() == pytest.approx([float(one) for one in expected], rel=1e-6)


def _pairs(first: Tensor, second: Tensor, shares: Tensor) -> list[list[tuple[float, int]]]:
    return [
        [(share, a), (1 - share, b)]
        for a, b, share in zip(first.tolist(), second.tolist(), shares.tolist(), strict=True)
    ]


def test_labels_of_a_batch_are_found_among_all_targets() -> None:
    sequences = [
        SupervisedSequence("a", (3, 4, 5, 6), (1, 2, 3), (Label(2, 5, 8, 0.5),)),
        SupervisedSequence("b", (1, 2, 3), (1, 2)),
        SupervisedSequence("c", (7, 9, 7, 8), (1, 3), (Label(1, 7, 9, 0.0), Label(3, 8, 9, 1.0))),
    ]
    (batch,) = make_batches(sequences, range(3), 100)
    assert batch.names == ("a", "c", "b")
    lists = batch.lists
    assert lists is not None
    assert lists.is_label_MK.tolist() == [[True, False], [True, True]]
    assert lists.target_MK[lists.is_label_MK].tolist() == [1, 3, 4]
    loss = LossSettings(list_weight=0.75)
    targets = lists.targets(batch.labels_N, loss)
    assert isinstance(targets, Targets)
    assert targets.weight_N.tolist() == [1, 0.25, 1, 0.25, 0.25, 1, 1]
    assert targets.first_N.tolist() == [4, 5, 6, 7, 8, 2, 3]
    assert targets.share_N.tolist() == [1, 0.5, 1, 0, 1, 1, 1]
    hard = loss.model_copy(update={"labels": "hard"})
    assert lists.shares(batch.labels_N, hard).tolist() == [[1, 0], [0, 1]], "those of the text"
    assert lists.shares(batch.labels_N, loss).tolist() == [[0.5, 0], [0, 1]], "those of the data"


def test_a_listwise_training_does_not_depend_on_the_micro_batches_and_lowers_the_loss(
    tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    def train(name: str, **training: Any) -> Path:
        recipe = make_recipe(
            data={"source": "recommendation", "num_examples": 4, "num_validation": 2, "max_tokens": 200},
            supervision={"sections": "answer"},
            loss={"list_weight": 1.0, "kd_weight": 0.5, "temperature": 2.0},
            training={"keep": "last", "learning_rate": 5e-3, "save_every_s": 99, **training},
            stages=[{"steps": 4}],
        )
        return distill(str(tiny_student), str(tiny_teacher), recipe, tmp_path / name)

    reference, single = train("reference", micro_batch_tokens=10_000), train("single", micro_batch_tokens=1)
    assert losses_of(single) == pytest.approx(losses_of(reference), rel=1e-4)
    history = json.loads((reference / "slimserve.json").read_text())["steps"][0]["detail"]["validation"]
    assert history[-1]["loss"] < history[0]["loss"]
    assert losses_of(reference)[-1] < losses_of(reference)[0]
    # The token losses are reported, but only the lists are in the loss.
    assert losses_of(reference)[0] < 0.5 * steps_of(reference)[0]["cross_entropy"]


def test_a_student_imitates_the_mixture_of_its_teachers() -> None:
    sizes = {"vocab_size": 97, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    models: list[Any] = []
    for seed, width in ((1, 12), (2, 16), (3, 20)):
        torch.manual_seed(seed)
        config = LlamaConfig(hidden_size=width, num_key_value_heads=1, initializer_range=0.5, **sizes)
        models.append(AutoModelForCausalLM.from_config(config))
    student, first, second = models
    (batch,) = make_batches([SupervisedSequence("a", (3, 50, 90, 7, 11), (1, 3, 4))], [0], 100)
    loss = LossSettings(kd_weight=1.0, temperature=1.5)
    teacher = OnlineTeacher(first, loss, [(second, 0.25)])
    total = StudentLoss(student)(batch, teacher.predict(batch), loss).total
    with torch.no_grad():
        q, a, b = ((model(batch.tokens_BT).logits[0, [0, 2, 3]].double() / 1.5).softmax(-1) for model in models)
    mixture = 0.75 * a + 0.25 * b
    assert float(total.detach()) == pytest.approx(float((mixture * (mixture / q).log()).sum() * 1.5**2), rel=1e-5)
    assert teacher.flops(batch) == sum(OnlineTeacher(one).flops(batch) for one in (first, second))


def test_further_teachers_of_a_recipe_are_part_of_the_cache(
    smollm2: Path, tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    other = save_tiny(smollm2, tmp_path / "other", 5)

    def first_loss(name: str, further: Path | None = None) -> float:
        recipe = make_recipe(
            data={"num_examples": 4, "num_validation": 0},
            supervision={"sections": "answer"},
            loss={"kd_weight": 1.0, "top_k": 2000},
            teachers=[{"model": str(further), "weight": 0.25}] if further else [],
            stages=[{"steps": 1}],
        )
        return losses_of(distill(str(tiny_student), str(tiny_teacher), recipe, tmp_path / name))[0]

    alone = first_loss("alone")
    assert first_loss("equal", tiny_teacher) == pytest.approx(alone, rel=1e-5)
    assert first_loss("mixed", other) != pytest.approx(alone, rel=1e-3)


def test_soft_labels_of_conversations_change_the_target_of_the_answer(tiny_student: Path, tmp_path: Path) -> None:
    def train(name: str, soft: dict[str, float]) -> Path:
        rows = [
            {"messages": [{"role": "user", "content": f"Good film {n}?"}, {"role": "assistant", "content": "yes"}]}
            for n in range(20)
        ]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({**row, **({"soft_labels": soft} if soft else {})}) + "\n" for row in rows))
        data = {"source": str(file), "num_examples": 4, "num_validation": 0}
        recipe = make_recipe(data=data, loss={"kd_weight": 0.0}, stages=[{"steps": 1}])
        return distill(str(tiny_student), None, recipe, tmp_path / name)

    hard, certain = train("hard", {}), train("certain", {"yes": 1.0, "no": 0.0})
    assert losses_of(certain) == losses_of(hard)
    assert_same_weights(certain, hard, rtol=0, atol=0)
    losses = [
        losses_of(one)[0]
        for one in (hard, train("soft", {"no": 0.25, "yes": 0.75}), train("half", {"yes": 0.5, "no": 0.5}))
    ]
    assert losses[2] != pytest.approx(losses[0], rel=1e-4)
    assert losses[1] - losses[0] == pytest.approx((losses[2] - losses[0]) / 2, rel=1e-4), "linear in the share"


@pytest.mark.parametrize(
    ("soft", "message"),
    [
        ({"good": 0.5, "bad": 0.5}, "has the answer 'yes', which is none of its soft_labels"),
        ({"yes": 0.5}, "has soft_labels that are not two probabilities"),
        ({"yes": 0.9, "no": 0.9}, "has soft_labels that are not two probabilities"),
        ({"yes": 0.5, "impossibly": 0.5}, "'impossibly' has 2 tokens"),
    ],
)
def test_soft_labels_that_do_not_fit_the_reply_are_refused(
    tiny_student: Path, tmp_path: Path, soft: dict[str, float], message: str
) -> None:
    row = {"messages": [{"role": "user", "content": "Good?"}, {"role": "assistant", "content": "yes"}]}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({**row, "soft_labels": soft}) + "\n")
    recipe = make_recipe(data={"source": str(file), "num_validation": 0}, loss={"kd_weight": 0.0})
    with pytest.raises(UserError, match=message):
        distill(str(tiny_student), None, recipe, tmp_path / "out")


def test_ranking_losses_that_could_have_no_effect_are_refused(
    tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="loss.list_weight: '0.5' has no effect, because the data has no labels"):
        distill(str(tiny_student), str(tiny_teacher), make_recipe(loss={"list_weight": 0.5}), tmp_path / "out")
    for keys, message in (
        ({"loss": {"list_weight": 0.5, "top_k": 8}}, "list_weight needs a running teacher or none"),
        ({"loss": {"kd_weight": 0}, "teachers": [{"model": "x", "weight": 0.5}]}, "teachers have no effect"),
        ({"teachers": [{"model": "x", "weight": 0.5}] * 2}, "must leave a rest"),
    ):
        with pytest.raises(UserError, match=message):
            make_recipe(**keys)
