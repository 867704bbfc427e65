import pytest

from slimserve.workloads.interface import ChatAnswer, ChatPrompt, Split
from slimserve.workloads.metrics import evaluate
from slimserve.workloads.reasoning import Reasoning

SPLITS: tuple[Split, ...] = ("calibration", "quality", "load")


def problems(split: Split, num: int, seed: int = 0) -> list[ChatPrompt]:
    return [prompt for prompt in Reasoning().make_prompts(split, num, seed) if isinstance(prompt, ChatPrompt)]


def test_kinds_take_turns_and_questions_are_unique_across_splits() -> None:
    questions: list[str] = []
    for split in SPLITS:
        prompts = problems(split, 60)
        assert [problem.kind for problem in prompts[:8]] == ["short_sum", "long_sum"] * 4
        questions += [problem.messages[-1]["content"] for problem in prompts]
    assert len(questions) == len(set(questions)) == 180


def test_the_worked_chain_ends_in_the_answer_that_the_verifier_accepts() -> None:
    for problem in problems("quality", 60):
        assert Reasoning().is_correct(problem, f"<think>\n{problem.chain_of_thought}\n</think>\n{problem.answer}")


def test_every_step_of_a_worked_sum_is_correct() -> None:
    for problem in problems("quality", 30):
        for step in problem.chain_of_thought.rstrip(".").split(". "):
            left, result = step.split(" = ")
            first, sign, second = left.split(" ")
            assert int(first) + (int(second) if sign == "+" else -int(second)) == int(result)


@pytest.mark.parametrize(
    ("template", "right"),
    [
        ("{answer}", True),
        ("<think>1 2 3</think>\nThe answer is {answer}.", True),
        ("<think>no</think> {wrong} <think>again</think> {answer}", True),
        ("<think>{answer}", True),
        ("<think>{answer}</think> {wrong}", False),
        ("<think>{answer}</think> none", False),
        ("", False),
    ],
)
def test_the_last_number_after_the_think_tags_counts(template: str, right: bool) -> None:
    problem = problems("quality", 1)[0]
    text = template.format(answer=problem.answer, wrong=int(problem.answer) + 1)
    assert Reasoning().is_correct(problem, text) is right


def test_evaluation_counts_correct_answers_by_kind_and_tokens() -> None:
    prompts = problems("quality", 8)
    answers = [
        ChatAnswer(problem.answer if problem.kind == "short_sum" else "", num_tokens=10 * (index % 2))
        for index, problem in enumerate(prompts)
    ]
    results = evaluate(Reasoning(), prompts, answers)
    assert results["accuracy"].value == 0.5
    assert results["accuracy_short_sum"].value == 1.0
    assert results["accuracy_long_sum"].value == 0.0
    assert results["accuracy_long_sum"].n == 4
    assert results["tokens_per_answer"].value == 5.0


def test_the_seed_determines_the_order() -> None:
    assert problems("load", 20, seed=1) == problems("load", 20, seed=1)
    assert problems("load", 20, seed=1) != problems("load", 20, seed=2)


def test_asking_for_more_problems_does_not_change_the_first_ones() -> None:
    assert problems("quality", 600)[:40] == problems("quality", 40)
