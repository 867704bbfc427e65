import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from slimserve.core.errors import UserError
from slimserve.core.openai_client import (
    AnswerError,
    OpenAIClient,
    Reply,
    Target,
    ask_all,
    count_of,
    find_target,
    read_replies,
    server_sentence,
)
from slimserve.serve.launch.process import answers, free_port
from tests.conftest import FAKE_SERVER


@pytest.fixture
def locked_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the URL of a server with one model that requires a key."""
    monkeypatch.setenv("FAKE_KEY", "secret")
    monkeypatch.setenv("FAKE_MODELS", "only")
    port = free_port()
    server = subprocess.Popen([sys.executable, str(FAKE_SERVER), "--port", str(port)])
    while not answers(f"http://127.0.0.1:{port}/health"):
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


def test_the_only_model_needs_no_name(locked_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="answers 401 to /v1/models; set VLLM_API_KEY"):
        find_target(locked_url, None)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert find_target(f"{locked_url}/v1/", None) == Target(locked_url, "only")


@pytest.mark.parametrize("model", [None, "unknown"])
def test_the_error_for_a_model_that_is_not_served_lists_the_served_ones(fake_url: str, model: str | None) -> None:
    with pytest.raises(UserError, match="is not served .* give --model good or http-500"):
        find_target(fake_url, model)


def test_a_server_that_does_not_answer_is_reported_with_a_remedy() -> None:
    with pytest.raises(UserError, match="does not answer .*slimserve serve MODEL"):
        find_target(f"http://127.0.0.1:{free_port()}", None)


@pytest.mark.parametrize("url", ["localhost:8000", "127.0.0.1", ""])
def test_a_url_without_scheme_is_rejected(url: str) -> None:
    with pytest.raises(UserError, match="has no scheme"):
        find_target(url, None)


@contextmanager
def server_of(*answers: tuple[int, str]) -> Iterator[str]:
    """Yield the URL of a server that gives these statuses and bodies in turn, the last one again and again."""
    remaining = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body = remaining.pop(0) if len(remaining) > 1 else remaining[0]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "answer",
    [
        (404, "{}"),
        (404, "<html>no</html>"),
        (405, ""),
        (501, ""),
        (200, "<html>hi</html>"),
        (200, "[]"),
        (200, '{"data": 3}'),
    ],
)
def test_a_server_without_a_list_of_models_needs_the_models_name(answer: tuple[int, str]) -> None:
    with server_of(answer) as url:
        assert find_target(url, "mine") == Target(url, "mine")
        with pytest.raises(UserError, match="/v1/models.*; give the model's name with --model"):
            find_target(url, None)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, '{"error": {"message": "wrong key"}}'), "answers 401 to /v1/models: wrong key; set VLLM_API_KEY"),
        ((403, "<html><title>Forbidden</title></html>"), "answers 403 to /v1/models: Forbidden; set VLLM_API_KEY"),
        (
            (503, '{"error": {"message": "The model is being loaded."}}'),
            "answers 503 to .*: The model is being loaded.;",
        ),
        (
            (502, "<html><head><title>502 Bad Gateway</title></head></html>"),
            "answers 502 to /v1/models: 502 Bad Gateway;",
        ),
        ((200, '{"data": []}'), "is not served at .*; load a model"),
        ((200, '{"data": [{"id": "a"}, {"id": "b"}]}'), "is not served at .*; give --model a or b"),
    ],
)
def test_a_server_that_refuses_is_quoted_also_if_a_model_is_given(answer: tuple[int, str], message: str) -> None:
    with server_of(answer) as url, pytest.raises(UserError, match=message):
        find_target(url, "mine")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ('{"error": {"message": "max_tokens is\\ntoo large", "code": 400}}', "max_tokens is too large"),
        ('{"error": "no such model"}', "no such model"),
        ('{"object": "error", "message": "prompt too long", "code": 400}', "prompt too long"),
        ('{"detail": [{"loc": ["body", "messages", 0], "msg": "Field required"}]}', "messages.0: Field required"),
        ('{"detail": "Not Found"}', "Not Found"),
        ('{"message": "no Route matched with those values"}', "no Route matched with those values"),
        ('{"errors": [{"message": "a"}, "b"]}', "a; b"),
        ('{"error": {"type": "x"}}', '{"type": "x"}'),
        ('[{"error": {"code": 429, "message": "quota"}}]', "quota"),
        ("<html><head><title>504 Gateway &amp; Time-out</title></head><body>x</body></html>", "504 Gateway & Time-out"),
        ("<h1>It works</h1><script>alert(1)</script>", "It works"),
        ("upstream connect error\r\n", "upstream connect error"),
        ("", ""),
        ("{}", ""),
        ("null", ""),
        ("[" * 5000, "[" * 198 + " …"),
        ("x" * 300, "x" * 198 + " …"),
    ],
)
def test_what_a_server_says_is_one_line_in_each_of_the_usual_forms(body: str, sentence: str) -> None:
    assert server_sentence(body.encode()) == sentence
    assert server_sentence(b"\xff\xfe")


@pytest.mark.parametrize(
    ("choice", "reply"),
    [
        ({"message": {"content": "a", "reasoning": "b"}, "finish_reason": "stop"}, Reply("a", "b", "stop")),
        ({"message": {"content": "a", "reasoning_content": "b", "reasoning": "b"}}, Reply("a", "b")),
        ({"delta": {"content": None, "reasoning_content": "b"}}, Reply("", "b")),
        ({"delta": {}, "message": None, "finish_reason": None}, Reply()),
        ({"delta": {"tool_calls": [{"index": 0}]}, "finish_reason": "tool_calls"}, Reply("", "", "tool_calls", True)),
        ({"message": {"content": None, "function_call": {"name": "f"}}}, Reply(has_tool_calls=True)),
        ({"message": {"refusal": "no"}}, Reply(has_tool_calls=True)),
        ({"text": "a", "finish_reason": "length"}, Reply("a", "", "length")),
        ({"message": {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}}, Reply("ab")),
        (
            {"delta": {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "h"}]}]}},
            Reply("", "h"),
        ),
        ({"message": {"content": 3, "reasoning": {"x": 1}}, "finish_reason": 7}, Reply()),
    ],
)
def test_a_choice_is_read_in_the_dialects_of_servers(choice: dict[str, object], reply: Reply) -> None:
    assert read_replies({"choices": [choice]}) == [reply]


_BROKEN: list[object] = [
    {},
    {"choices": None},
    {"choices": []},
    {"choices": [{}]},
    {"choices": [{"finish_reason": "stop"}]},
    {"choices": [{"message": None}]},
    {"choices": [{"message": "hi"}]},
    {"choices": ["hi"]},
    {"choices": {"message": {"content": "hi"}}},
    {"choices": 3},
    {"error": {"message": "boom"}},
    {"error": "boom"},
    {"object": "error", "message": "boom"},
    [],
    "hi",
    None,
]


@pytest.mark.parametrize("answer", _BROKEN, ids=json.dumps)
def test_an_answer_without_a_reply_is_one_error_line_that_quotes_it(answer: object) -> None:
    with pytest.raises(AnswerError):
        read_replies(answer, is_complete=True)

    async def ask(client: OpenAIClient, path: str) -> list[Reply]:
        return await client.ask(path, {}, lambda answer: read_replies(answer, is_complete=True))

    with (
        server_of((200, json.dumps(answer))) as url,
        pytest.raises(UserError, match="request: '/v1/x' was answered") as info,
    ):
        ask_all(Target(url, "m"), "title", ["/v1/x"], ask)
    if "boom" in json.dumps(answer):
        assert "boom" in str(info.value)
    assert len(str(info.value)) < 450


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, '{"error": {"message": "too long"}}', "failed with 400: too long"),
        (500, "<html><title>Oops</title></html>", "failed with 500: Oops"),
        (200, "<html><title>Login</title></html>", "was not answered with JSON but with 'Login'"),
        (200, "", "was not answered with JSON but with ''"),
    ],
)
def test_a_request_that_fails_quotes_the_server(status: int, body: str, message: str) -> None:
    with server_of((status, body)) as url, pytest.raises(UserError, match=message):
        ask_all(Target(url, "m"), "title", ["/v1/x"], lambda client, path: client.post(path, {}))


@pytest.mark.parametrize(
    ("usage", "count"),
    [({"n": 3}, 3), ({"n": 3.0}, 3), ({"n": None}, None), ({}, None), (None, None), ([], None), ({"n": -1}, None)]
    + [({"n": value}, None) for value in ("3", True, float("nan"), float("inf"))],
)
def test_a_count_that_is_missing_or_no_number_is_not_known(usage: object, count: int | None) -> None:
    assert count_of(usage, "n") == count
