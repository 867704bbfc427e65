"""Tests of a teacher that reads a prompt of its own before the same reply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from slimserve.core.errors import UserError
from slimserve.distill.batches import make_batches
from slimserve.distill.cost import ModelShape
from slimserve.distill.recipe import LossSettings, load_distill_recipe
from slimserve.distill.run import distill
from slimserve.distill.sections import Example, Section, chat_example
from slimserve.distill.student import OnlineTeacher, StudentLoss
from slimserve.distill.supervision import Supervision
from tests.distill.conftest import make_recipe
from tests.distill.test_train import losses_of, steps_of

P, C, A = Section.PROMPT, Section.COT, Section.ANSWER
LONG = Example("long", (1, 2, 3, 40, 41, 42, 43), (P, P, P, C, C, C, A), 3, (1, 9, 8, 2, 3))
SHORT = Example("short", (5, 6, 50, 51), (P, P, C, A), 2, (5, 9, 8, 7, 7, 6))


def tiny(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 97, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads, initializer_range=0.5)).eval()


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("span", [1.0, 0.75])
def test_the_targets_are_the_replys_tokens_after_either_prompt(span: float, is_packed: bool) -> None:
    student, teacher = tiny(1), tiny(2)
    loss = LossSettings(kd_weight=1.0, divergence="reverse_kl")
    sequences = Supervision(lead_span=span).apply_all([LONG, SHORT])
    (batch,) = make_batches(sequences, range(2), 100, is_packed=is_packed)
    online = OnlineTeacher(teacher, loss)
    total = StudentLoss(student)(batch, online.predict(batch), loss).total
    expected, num_targets, lengths = 0.0, 0, []
    for example in (LONG, SHORT):
        reply = example.tokens[example.num_prompt : int(span * len(example.tokens))]
        rows = []
        for model, prompt in ((student, example.tokens[: example.num_prompt]), (teacher, example.teacher_prompt)):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *reply]])).logits[0].double()
            rows.append(logits[len(prompt) - 1 : -1].softmax(-1))
        q, p = rows
        expected += float((q * (q / p).log()).sum())
        num_targets += len(reply)
        lengths.append(len(example.teacher_prompt) + len(reply))
    assert batch.num_targets == num_targets
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)
    shape = ModelShape.of(teacher.config.to_dict())
    assert online.flops(batch) == shape.forward_flops(lengths, num_targets), "the teacher reads its longer prompts"


def test_a_teacher_with_the_same_prompt_is_the_same_teacher() -> None:
    model, loss = tiny(1), LossSettings(kd_weight=1.0)
    same = Example("same", LONG.tokens, LONG.sections, 3, LONG.tokens[:3])
    (batch,) = make_batches(Supervision().apply_all([same]), [0], 100)
    assert batch.num_targets == 4
    total = StudentLoss(model)(batch, OnlineTeacher(model, loss).predict(batch), loss).total
    assert float(total.detach()) == pytest.approx(0.0, abs=1e-5)


def test_the_instruction_precedes_the_last_user_message(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "You count."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "What is 2 + 3?"},
        {"role": "assistant", "content": "5"},
    ]
    plain = chat_example(tokenizer, messages, "x", 500, {2})
    example = chat_example(tokenizer, messages, "x", 500, {2}, teacher_instruction="Be concise.")
    assert plain is not None
    assert example is not None
    assert (example.tokens, plain.teacher_prompt) == (plain.tokens, ())
    own, teachers = tokenizer.decode(plain.tokens[: plain.num_prompt]), tokenizer.decode(example.teacher_prompt)
    assert teachers == own.replace("What is", "Be concise.\n\nWhat is")
    with pytest.raises(UserError, match=r"has no user message for loss\.teacher_instruction"):
        chat_example(tokenizer, [messages[0], messages[-1]], "x", 500, {2}, teacher_instruction="Be concise.")


def test_a_student_learns_on_its_own_replies_what_an_instruction_changes(tiny_student: Path, tmp_path: Path) -> None:
    def sampler(student: Any, prompts: Any, stage: Any, seed: int) -> list[list[int]]:
        return [[101, 5, 6, 2] for _ in prompts]

    def train(name: str, instruction: str, **stage: Any) -> Path:
        recipe = make_recipe(
            data={"num_examples": 4, "num_validation": 0},
            loss={"kd_weight": 1.0, "divergence": "reverse_kl", "teacher_instruction": instruction},
            training={"learning_rate": 1e-3, "keep": "last", "warmup_frac": 0.0, "save_every_s": 99},
            stages=[{"kind": "on_policy", "fraction": 1.0, "steps": 12, **stage}],
        )
        return distill(str(tiny_student), str(tiny_student), recipe, tmp_path / name, sampler=sampler)

    rows = steps_of(train("concise", "Be concise."))
    assert [row["targets"] for row in rows] == [16] * 12, "four replies of four tokens"
    assert rows[0]["loss"] > 1e-3
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    plain = steps_of(train("plain", "", steps=1))
    assert plain[0]["loss"] == pytest.approx(0.0, abs=1e-5), "without an instruction the model is its own teacher"
    assert rows[0]["flops"] > plain[0]["flops"]


def test_a_cache_holds_what_the_teacher_reads_after_its_own_prompt(
    tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    def loss_of(name: str, instruction: str, top_k: int) -> float:
        recipe = make_recipe(
            data={"num_examples": 2, "num_validation": 0},
            supervision={"sections": "answer"},
            loss={"kd_weight": 1.0, "top_k": top_k, "teacher_instruction": instruction},
            stages=[{"steps": 1}],
        )
        return losses_of(distill(str(tiny_student), str(tiny_teacher), recipe, tmp_path / name))[0]

    plain, running, cached = loss_of("plain", "", 49_152), loss_of("run", "Hm.", 0), loss_of("cached", "Hm.", 49_152)
    assert cached == pytest.approx(running, rel=1e-4)
    assert cached != pytest.approx(plain, rel=1e-4)


def test_an_instruction_that_could_have_no_effect_is_refused(
    tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    loss = {"teacher_instruction": "Be concise."}
    scoring = make_recipe(data={"source": "recommendation"}, loss=loss)
    with pytest.raises(UserError, match="has no effect, because the data has no conversations"):
        distill(str(tiny_student), str(tiny_teacher), scoring, tmp_path / "out")
    for tables in ({"loss": {**loss, "kd_weight": 0.0}}, {"loss": loss, "supervision": {"window": "right"}}):
        with pytest.raises(UserError, match="teacher_instruction needs a teacher and the left window"):
            make_recipe(**tables)


def test_the_recipe_of_concise_chains_samples_everything_and_is_valid() -> None:
    recipe = load_distill_recipe(Path("concise"))
    assert (recipe.loss.divergence, recipe.loss.kd_weight, recipe.stages[0].fraction) == ("reverse_kl", 1.0, 1.0)
    assert "concisely" in recipe.loss.teacher_instruction
