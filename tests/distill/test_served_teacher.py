"""Tests of a served teacher against the same teacher in this process; the server answers in vLLM's format."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimserve.core.errors import UserError
from slimserve.distill.run import distill
from tests.distill.conftest import VOCABULARY, make_recipe, save_tiny
from tests.distill.test_train import detail_of, losses_of, start_distill

TOP_K = 100
NUM_SEQUENCES, NUM_VALIDATION = 6, 1


class Server:
    """A vLLM server of one model that answers `/v1/completions` with `prompt_logprobs`."""

    def __init__(self, directory: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        self.words = [
            tokenizer.convert_tokens_to_string([token]) for token in tokenizer.convert_ids_to_tokens(range(VOCABULARY))
        ]
        self.prompts: list[list[int]] = []
        """Answered prompts."""
        self.num_answers = 1000
        """Number of prompts that are answered; for any other the server waits for `is_released` and then fails."""
        self.is_released = threading.Event()
        self.changes: dict[str, Any] = {}
        """Changes of the answers' entries."""
        self.key = ""
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body["prompt_logprobs"] > TOP_K:
            return 400, {"error": {"message": f"Requested prompt logprobs of {body['prompt_logprobs']}"}}
        assert (body["model"], body["max_tokens"]) == ("teacher", 1)
        with self.lock:
            self.num_answers -= 1
            is_answered = self.num_answers >= 0
        if not is_answered:
            self.is_released.wait(30)
            return 500, {"error": {"message": "stopped by the test"}}
        with self.lock, torch.no_grad():
            self.prompts.append(body["prompt"])
            log_p = self.model(torch.tensor([body["prompt"]])).logits[0].float().log_softmax(-1)
        positions: list[Any] = [None]
        for row, token in zip(log_p[:-1], body["prompt"][1:], strict=True):
            top = row.topk(self.changes.get("num_tokens", body["prompt_logprobs"])).indices.tolist()
            entries = {}
            for rank, one in enumerate(dict.fromkeys([token, *top])):  # vLLM adds the prompt's own token
                word = self.changes.get("word") or self.words[one]
                entries[str(one)] = {"logprob": float(row[one]), "rank": rank, "decoded_token": word}
            positions.append(entries)
        choice = {"index": 0, "text": " the", "finish_reason": "length", "prompt_logprobs": positions}
        return 200, {"model": "teacher", "choices": [{**choice, **self.changes.get("choice", {})}]}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._send(200, {"data": [{"id": "teacher"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if server.key and self.headers["Authorization"] != f"Bearer {server.key}":
                    return self._send(401, {"error": "Unauthorized"})
                return self._send(*server.answer(body))

            def _send(self, status: int, document: dict[str, Any]) -> None:
                content = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        return Handler


@pytest.fixture
def peaked_teacher(smollm2: Path, tmp_path: Path) -> Path:
    """Return a teacher whose distributions have few likely tokens, as those of a trained model."""
    sizes = {"hidden_size": 36, "tie_word_embeddings": False, "initializer_range": 0.7}
    return save_tiny(smollm2, tmp_path / "teacher", 2, **sizes)


@pytest.fixture
def server(peaked_teacher: Path) -> Iterator[Server]:
    served = Server(peaked_teacher)
    thread = threading.Thread(target=served.http.serve_forever, daemon=True)
    thread.start()
    yield served
    served.is_released.set()
    served.http.shutdown()
    served.http.server_close()


def recipe_of(top_k: int = TOP_K, **loss: Any) -> Any:
    return make_recipe(
        data={"num_examples": NUM_SEQUENCES, "num_validation": NUM_VALIDATION},
        supervision={"sections": "answer"},
        loss={"kd_weight": 1.0, "top_k": top_k, **loss},
        training={"batch_size": NUM_SEQUENCES},
        stages=[{"steps": 2}],
    )


def test_a_served_teacher_gives_the_loss_of_the_local_one_within_the_missing_mass(
    tiny_student: Path, peaked_teacher: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "secret"
    with pytest.raises(UserError, match="failed with 401: Unauthorized"):
        distill(str(tiny_student), server.url, recipe_of(), tmp_path / "locked")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    served = distill(str(tiny_student), server.url, recipe_of(), tmp_path / "served")
    cached = distill(str(tiny_student), str(peaked_teacher), recipe_of(), tmp_path / "cached")
    running = distill(str(tiny_student), str(peaked_teacher), recipe_of(top_k=0), tmp_path / "running")
    assert losses_of(served) == pytest.approx(losses_of(cached), rel=1e-4)
    ours, theirs = detail_of(served), detail_of(cached)
    missing = ours["cache_error"]["missing_mass"]
    assert missing == pytest.approx(theirs["cache_error"]["missing_mass"], rel=1e-3)
    assert 0 < missing < 0.2
    lost = 1 - losses_of(served)[0] / losses_of(running)[0]
    assert 0 < lost < missing, "the other tokens hold this share of the divergence"
    # A cache of the validation sequences stands for the teacher there.
    assert len(server.prompts) == NUM_SEQUENCES + NUM_VALIDATION
    first = [detail_of(one)["validation"][0]["loss"] for one in (served, running)]
    assert 0.7 * first[1] < first[0] < first[1]
    assert ours["teacher_cache"]["tokens"] == theirs["teacher_cache"]["tokens"]
    assert ours["teacher_cache"]["seconds"] > 0
    assert ours["teacher_cache"]["flops"] == 0, "the served model's shape is not known"
    assert ours["teacher"] == server.url


def test_a_killed_run_asks_only_for_the_answers_that_are_not_on_disk(
    tiny_student: Path, server: Server, tmp_path: Path
) -> None:
    target, recipe = tmp_path / "out", recipe_of()
    server.num_answers = NUM_VALIDATION + 3
    two_at_a_time = "import slimserve.distill.served_teacher as served\nserved._PART_SEQUENCES = 2\n"
    process = start_distill(tiny_student, server.url, target, recipe, before=two_at_a_time)

    def parts() -> list[Path]:
        # The only validation sequence has a part named 0-0.
        return [file for file in (tmp_path / ".out.building").glob("*/?-?.safetensors") if file.stem != "0-0"]

    while not any((file.parent / "progress.json").is_file() for file in parts()):
        assert process.poll() is None, process.communicate()[0]
        threading.Event().wait(0.02)
    process.kill()
    process.wait()
    server.num_answers = 0
    server.is_released.set()
    with pytest.raises(UserError, match="failed with 500: stopped by the test"):
        distill(str(tiny_student), server.url, recipe, target)
    assert parts(), "a failed run keeps them too"
    num_before, server.num_answers = len(server.prompts), 1000
    distill(str(tiny_student), server.url, recipe, target)
    # The failed run's last requests may be answered after its end, so a prompt may be here twice.
    asked = {tuple(prompt) for prompt in server.prompts[num_before:]}
    assert len(asked) <= NUM_SEQUENCES - 2
    assert not (tmp_path / ".out.building").exists()
    again = distill(str(tiny_student), server.url, recipe, tmp_path / "again")
    assert losses_of(target) == losses_of(again)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"top_k": 0}, "is a server, which returns only the likeliest tokens; set loss.top_k"),
        ({"temperature": 2.0}, "is a server, which returns probabilities at temperature 1 only"),
        ({"top_k": TOP_K + 1}, "failed with 400: Requested prompt logprobs of 101"),
    ],
)
def test_what_a_server_cannot_return_is_refused(
    tiny_student: Path, server: Server, tmp_path: Path, loss: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        distill(str(tiny_student), server.url, recipe_of(**loss), tmp_path / "out")
    assert not server.prompts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 5}, "loss.top_k: '100' is more than the [56] tokens that the server returns"),
        ({"word": "Wort"}, "is 'Wort' at the server of the teacher and .* in the student's tokenizer"),
        ({"choice": {"prompt_logprobs": None}}, "does not return prompt_logprobs; serve it with vLLM"),
        ({"choice": {"prompt_logprobs": [None]}}, "1 positions for"),
    ],
)
def test_an_answer_without_the_teachers_tokens_is_one_error(
    tiny_student: Path, server: Server, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    server.changes = changes
    with pytest.raises(UserError, match=message):
        distill(str(tiny_student), server.url, recipe_of(), tmp_path / "out")
