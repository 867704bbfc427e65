import pytest

from compare.quality import measure_quality
from contracts.errors import UserError
from loadtest.target import Target
from serve.engine import free_port
from workloads import load_workload
from workloads.reasoning import Reasoning, is_right


def test_scores_come_back_in_the_order_of_the_items(fake_url: str) -> None:
    figures = measure_quality(Target(fake_url, "good"), load_workload("recommendation"), 5)
    assert figures["auc"].value == 0.5
    assert figures["auc"].n == 5 * 16


def test_answers_are_judged_by_the_verifier(fake_url: str) -> None:
    workload = Reasoning()
    figures = measure_quality(Target(fake_url, "good"), workload, 30)
    # The fake server answers every problem with 42.
    right = sum(is_right(problem, "42") for problem in workload.make_prompts("quality", 30))  # type: ignore[arg-type]
    assert figures["accuracy"].value == right / 30
    assert figures["tokens_per_answer"].value == 7


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("http-500", "quality request: '/tokenize' was answered 500"),
        ("split-label", "label: ' yes' is 2 tokens of split-label"),
    ],
)
def test_a_failed_request_ends_the_measurement(fake_url: str, model: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure_quality(Target(fake_url, model), load_workload("recommendation"), 3)


def test_a_server_that_is_gone_ends_the_measurement() -> None:
    with pytest.raises(UserError, match="got no answer"):
        measure_quality(Target(f"http://127.0.0.1:{free_port()}", "m"), load_workload("reasoning"), 2)
