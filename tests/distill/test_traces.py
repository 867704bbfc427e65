"""Tests of rejection sampling from a server that gives wrong, incomplete and correct answers, or fails."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from slimserve.core.errors import UserError
from slimserve.core.openai_client import Target
from slimserve.distill.data import load_examples
from slimserve.distill.sections import Section
from slimserve.distill.settings import TracesSettings
from slimserve.distill.traces import TraceCounts, write_traces
from slimserve.workloads import load_workload

TRUTH = {
    prompt.messages[-1]["content"]: prompt.answer  # type: ignore[union-attr]
    for prompt in load_workload("reasoning").make_prompts("calibration", 8, 0)
}


class Teacher(BaseHTTPRequestHandler):
    """A teacher whose first answer is wrong, whose second is cut short and whose third is correct.

    It never gives a correct answer to the first problem.
    """

    num_requests: ClassVar[Counter[str]] = Counter()
    seeds: ClassVar[list[int]] = []
    status = 200

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        Teacher.num_requests[question] += 1
        Teacher.seeds.append(body["seed"])
        tries = Teacher.num_requests[question]
        is_correct = tries >= 3 and question != next(iter(TRUTH))
        reply = f"<think>hm</think>{TRUTH[question]}" if is_correct or tries == 2 else "<think>hm</think>-1.5"
        choice = {"message": {"content": reply}, "finish_reason": "length" if tries == 2 else "stop"}
        text = json.dumps({"choices": [choice]}).encode()
        self.send_response(Teacher.status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Teacher.num_requests, Teacher.seeds, Teacher.status = Counter(), [], 200
    server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def ask(url: str, file: Path, num_problems: int, workload: str = "reasoning") -> TraceCounts:
    settings = TracesSettings(url=url, output=file, num_problems=num_problems, workload=workload)
    return write_traces(Target(url, "m"), settings)


def test_only_correct_replies_that_ended_by_themselves_are_kept(url: str, tmp_path: Path) -> None:
    file = tmp_path / "traces.jsonl"
    counts = ask(url, file, 8)
    assert (counts.num_problems, counts.num_solved, counts.num_replies) == (8, 7, 7 * 3 + 4)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 8
    for row in rows:
        if "messages" in row:
            assert row["messages"][-1]["content"].endswith(TRUTH[row["question"]])
    assert [row for row in rows if "messages" not in row] == [{"question": next(iter(TRUTH))}]
    assert len(set(Teacher.seeds)) == len(Teacher.seeds)


def test_a_repeated_command_requests_only_the_missing_problems(url: str, tmp_path: Path) -> None:
    file = tmp_path / "traces.jsonl"
    ask(url, file, 4)
    text = file.read_text()
    file.write_text(text + '{"question": "cut sho')
    Teacher.num_requests.clear()
    again = ask(url, file, 8)
    assert len(Teacher.num_requests) == 4
    assert (again.num_problems, again.num_solved) == (8, 7)
    assert len(file.read_text().splitlines()) == 8


def test_a_failing_server_and_a_workload_without_verifier_are_errors(url: str, tmp_path: Path) -> None:
    Teacher.status = 500
    with pytest.raises(UserError, match="failed with 500"):
        ask(url, tmp_path / "traces.jsonl", 4)
    with pytest.raises(UserError, match="has no replies to verify"):
        ask(url, tmp_path / "other.jsonl", 4, workload="recommendation")


def served_by(answers: Callable[[str], Any]) -> ThreadingHTTPServer:
    """Return a running teacher that answers each question with `answers(question)` as JSON."""

    class Scripted(Teacher):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = json.dumps(answers(body["messages"][-1]["content"])).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def chosen(message: Any, finish_reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"message": message, "finish_reason": finish_reason}]}


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "thinking"])
@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\v", "\f", "\x1c", "\r\n", "\ufeff"])
def test_the_chain_of_thought_of_every_server_reaches_the_training_data(
    tokenizer: Any, smollm2: Path, tmp_path: Path, field: str, separator: str
) -> None:
    file = tmp_path / "traces.jsonl"
    chain = f"first{separator}then"
    server = served_by(lambda question: chosen({"role": "assistant", "content": TRUTH[question], field: chain}))
    try:
        counts = ask(f"http://127.0.0.1:{server.server_port}", file, 8)
        assert (counts.num_solved, counts.num_chains, counts.num_replies) == (8, 8, 8)
        again = ask(f"http://127.0.0.1:{server.server_port}", file, 8)
    finally:
        server.shutdown()
    assert (again.num_solved, again.num_replies) == (8, 0), "the file that was written can be read"
    examples = load_examples(tokenizer, smollm2, str(file), 8, 0, 2048, 0)
    assert examples.training
    for example in examples.training:
        assert chain in tokenizer.decode(
            [token for token, section in zip(example.tokens, example.sections, strict=True) if section is Section.COT]
        )


@pytest.mark.parametrize(
    "answer",
    [
        [],
        {},
        {"choices": []},
        {"choices": [{"finish_reason": "stop"}]},
        chosen(None),
        chosen({"content": 5}),
        chosen({"content": "5", "reasoning": ["a"]}),
    ],
)
def test_a_server_that_answers_without_a_message_is_one_error_line(tmp_path: Path, answer: Any) -> None:
    server = served_by(lambda _: answer)
    try:
        sentence = "/v1/chat/completions' (got an answer that cannot be read|was answered with JSON that)"
        with pytest.raises(UserError, match=sentence):
            ask(f"http://127.0.0.1:{server.server_port}", tmp_path / "traces.jsonl", 2)
    finally:
        server.shutdown()


def test_a_server_that_answers_with_an_error_is_quoted(tmp_path: Path) -> None:
    server = served_by(lambda _: {"error": {"message": "the model is loading"}})
    try:
        with pytest.raises(UserError, match="was answered with an error: the model is loading"):
            ask(f"http://127.0.0.1:{server.server_port}", tmp_path / "traces.jsonl", 2)
    finally:
        server.shutdown()


def test_replies_that_are_no_text_or_cut_off_are_counted_and_not_kept(tmp_path: Path) -> None:
    first = next(iter(TRUTH))
    server = served_by(
        lambda question: (
            chosen({"content": f"{TRUTH[question]}", "reasoning": "\ud83d"})
            if question == first
            else chosen({"content": None, "reasoning": "hm"}, "length")
        )
    )
    file = tmp_path / "traces.jsonl"
    try:
        counts = ask(f"http://127.0.0.1:{server.server_port}", file, 2)
    finally:
        server.shutdown()
    assert (counts.num_solved, counts.num_replies, counts.num_cut) == (0, 8, 4)
    assert all(set(json.loads(line)) == {"question"} for line in file.read_text().split("\n") if line)


@pytest.mark.parametrize("content", ["my notes", '{"prompt": "a"}\n', '{"question": 5}\n', '{"question": "a"}\nb\n'])
def test_a_file_of_something_else_is_refused_and_left_as_it_is(url: str, tmp_path: Path, content: str) -> None:
    file = tmp_path / "notes.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=r"notes.jsonl:\d+' is not a trace"):
        ask(url, file, 2)
    assert file.read_text() == content


def test_a_last_trace_without_a_line_feed_is_kept(url: str, tmp_path: Path) -> None:
    file = tmp_path / "traces.jsonl"
    ask(url, file, 4)
    text = file.read_text()
    file.write_text(text.rstrip("\n"))
    Teacher.num_requests.clear()
    assert ask(url, file, 4).num_problems == 4
    assert not Teacher.num_requests
    assert file.read_text() == text
