import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from slimserve.compare.quality import Answers, ask_quality, ask_text, quality_metrics, read_answers, write_answers
from slimserve.core.errors import UserError
from slimserve.core.openai_client import Target
from slimserve.serve.launch.process import free_port
from slimserve.workloads import intervals, load_workload, metrics
from slimserve.workloads.interface import ChatAnswer, TextReading
from slimserve.workloads.reasoning import Reasoning


def test_scores_come_back_in_the_order_of_the_items(fake_url: str) -> None:
    answers = ask_quality(Target(fake_url, "good"), "recommendation", 5, 0)
    results = quality_metrics("recommendation", 5, 0, answers)
    assert results["auc"].value == 0.5
    assert results["auc"].n == 5 * 16


def test_answers_are_checked_by_the_verifier(fake_url: str) -> None:
    answers = ask_quality(Target(fake_url, "good"), "reasoning", 30, 0)
    results = quality_metrics("reasoning", 30, 0, answers)
    # The fake server answers every problem with 42.
    right = sum(Reasoning().is_correct(problem, "42") for problem in Reasoning().make_prompts("quality", 30))  # type: ignore[arg-type]
    assert results["accuracy"].value == right / 30
    assert results["tokens_per_answer"].value == 7


def test_a_batch_of_chats_is_in_flight_at_once() -> None:
    num_chats = 16
    together = threading.Barrier(num_chats, timeout=20)

    class Server(ThreadingHTTPServer):
        request_queue_size = num_chats

    class Waits(BaseHTTPRequestHandler):
        """Answers as soon as all chats have arrived."""

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            together.wait()
            body = json.dumps({"choices": [{"message": {"content": "42"}}], "usage": {"completion_tokens": 3}})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            """Keep the terminal clean."""

    with Server(("127.0.0.1", 0), Waits) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        target = Target(f"http://127.0.0.1:{server.server_port}", "m")
        answers = ask_quality(target, "reasoning", num_chats, 0, chat_concurrency=num_chats)
        server.shutdown()
    assert answers.answers == [ChatAnswer("42", 3)] * num_chats


@pytest.mark.parametrize("workload", ["recommendation", "reasoning"])
def test_metrics_equal_the_workloads_own(workload: str) -> None:
    prompts = load_workload(workload).make_prompts("quality", 12)
    kept = [
        tuple(math.sin(7 * row + item) / 2 + 0.5 for item in range(16))
        if workload == "recommendation"
        else ChatAnswer(f"<think></think>{row}", 10 + row)
        for row in range(12)
    ]
    results = quality_metrics(workload, 12, 0, Answers("", list(kept)))
    expected = metrics.evaluate(load_workload(workload), prompts, kept)
    assert {name: intervals.estimate(metric) for name, metric in results.items()} == expected


def test_raw_answers_are_kept_and_read_back(tmp_path: Path) -> None:
    reading = TextReading((5, 6, 7), (-0.5, -1.0), ({6: -0.5, 1: -2.0}, {7: -1.0}))
    answers = Answers("abc", [(0.25, 0.5), ChatAnswer("so\n42", 7), reading])
    write_answers(tmp_path / "new" / "answers.jsonl", answers)
    assert read_answers(tmp_path / "new" / "answers.jsonl") == answers
    lines = (tmp_path / "new" / "answers.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"prompt": 0, "scores": [0.25, 0.5]}


def test_a_broken_file_of_answers_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"prompts_sha256": "a"}\n{"prompt"')
    with pytest.raises(UserError, match=r"answers: .*answers.jsonl:2' is not JSON"):
        read_answers(tmp_path / "answers.jsonl")


def test_other_prompts_have_another_hash(fake_url: str) -> None:
    hashes = {ask_quality(Target(fake_url, "good"), "reasoning", 4, seed).prompts_sha256 for seed in (0, 0, 1)}
    assert len(hashes) == 2


def test_a_server_without_log_probabilities_of_prompts_gives_no_text_metrics(fake_url: str) -> None:
    assert ask_text(Target(fake_url, "good"), 2, 8, 0).answers == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("http-500", "request: .* failed with 500"),
        ("few-scores", "quality request: '/v1/score' returned 15 scores for 16 items"),
    ],
)
def test_a_failed_request_ends_the_measurement(fake_url: str, model: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ask_quality(Target(fake_url, model), "recommendation", 3, 0)


def test_a_server_that_is_gone_ends_the_measurement() -> None:
    with pytest.raises(UserError, match="was not answered"):
        ask_quality(Target(f"http://127.0.0.1:{free_port()}", "m"), "reasoning", 2, 0)
