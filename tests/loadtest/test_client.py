import json
import time
from collections.abc import Iterator
from typing import cast

import pytest

from slimserve.core.errors import UserError
from slimserve.loadtest.client import ModelClient
from slimserve.loadtest.http_client import Exchange
from slimserve.loadtest.rows import Row
from slimserve.loadtest.timer import Timer
from slimserve.workloads.interface import ChatPrompt, Prompt, ScoringPrompt
from tests.conftest import measures_time
from tests.fake_server import CHUNKS, GAP_S, SCORE_S, TTFT_S
from tests.loadtest.faulty_server import ANSWERS, SENTENCES
from tests.loadtest.test_http_client import faulty_server

pytestmark = measures_time

_TOLERANCE_S = 0.015
"""Tolerance for the scheduling noise of a test machine, for the best of five tries."""
_CHAT = ChatPrompt(({"role": "user", "content": "?"},), 20, "", "", "", {})
_CANDIDATES = ScoringPrompt("history", ("a", "b"), (" yes", " no"), (True, False), 0)


@pytest.fixture(scope="module")
def faulty_url() -> Iterator[str]:
    with faulty_server() as port:
        yield f"http://127.0.0.1:{port}"


def ask(url: str, model: str, prompt: Prompt, endpoint: str = "auto", count: int = 1) -> list[Row]:
    client = ModelClient(url, model, {}, 20.0, endpoint)
    kind = "recommendation" if isinstance(prompt, ScoringPrompt) else "reasoning"
    client.prepare([prompt])
    request = client.make_request(3, kind, prompt, exact_tokens=False)
    epoch = time.perf_counter()
    return [client.send(request, time.perf_counter() - epoch, epoch) for _ in range(count)]


def test_times_are_those_of_the_bytes_and_not_of_full_buffers(fake_url: str) -> None:
    row = min(ask(fake_url, "good", _CHAT, count=5), key=lambda row: row.e2e_s)
    assert (row.error, row.kind, row.prompt) == (None, "reasoning", 3)
    assert row.ttft_s == pytest.approx(TTFT_S, abs=_TOLERANCE_S)
    assert row.e2e_s == pytest.approx(TTFT_S + GAP_S * (len(CHUNKS) - 1), abs=_TOLERANCE_S)
    assert [count for _, count in row.arrivals] == list(CHUNKS)
    assert row.output_tokens == sum(CHUNKS)
    assert row.prompt_tokens == 11
    assert row.text == "x" * len(CHUNKS)
    gaps = list(row.inter_token_gaps_s())
    assert len(gaps) == sum(CHUNKS) - 1
    assert sum(gaps) == pytest.approx(GAP_S * (len(CHUNKS) - 1), abs=_TOLERANCE_S)


def test_chunks_count_as_tokens_if_the_server_counts_none(fake_url: str) -> None:
    (row,) = ask(fake_url, "no-usage", _CHAT)
    assert (row.error, row.output_tokens) == (None, len(CHUNKS))


@pytest.mark.parametrize(
    ("endpoint", "score"), [("auto", 0.25), ("score", 0.25), ("generative_scoring", 0.25), ("completions", 0.731)]
)
def test_scores_are_the_first_labels_share(fake_url: str, endpoint: str, score: float) -> None:
    rows = ask(fake_url, "good", _CANDIDATES, endpoint, count=3)
    assert [row.error for row in rows] == [None] * 3
    assert rows[0].scores == pytest.approx((score, score), abs=1e-3), "1 / (1 + exp(-1)) from the log-probabilities"
    assert rows[0].num_items == 2
    if endpoint != "completions":
        assert min(row.e2e_s for row in rows) == pytest.approx(SCORE_S, abs=_TOLERANCE_S)


@pytest.mark.parametrize(
    ("model", "endpoint", "error"),
    [
        ("http-500", "auto", "http 500"),
        ("few-scores", "score", "wrong number of scores"),
        ("few-scores", "completions", "label not among the log-probabilities"),
        ("good", "rerank", "no scores"),
    ],
)
def test_each_scoring_fault_has_its_own_error(fake_url: str, model: str, endpoint: str, error: str) -> None:
    (row,) = ask(fake_url, model, _CANDIDATES, endpoint)
    assert (row.error, row.scores) == (error, ())


@pytest.mark.parametrize("model", ANSWERS)
def test_each_answer_of_a_foreign_server_is_a_row_with_what_the_server_says(faulty_url: str, model: str) -> None:
    error = ANSWERS[model][1]
    client = ModelClient(faulty_url, model, {}, 0.5, "auto")
    row = client.send(client.make_request(0, "chat", _CHAT, False), 0.0, time.perf_counter())
    assert row.error == error
    if error is None:
        assert row.output_tokens == 2
        assert row.text or model == "tool-calls"
        assert bool(row.arrivals) == (model != "not-streamed")
    if model in SENTENCES:
        assert client.sentences == {(error, SENTENCES[model]): 1}
    client.close()


_SCORE_ANSWERS: list[object] = [
    *(None, [], {}, "x", 3, {"scores": None}, {"scores": 3}, {"scores": [None, None]}, {"scores": [[], []]}),
    *({"scores": [["x"], ["y"]]}, {"scores": {"a": 1}}, {"scores": [[{}], [0.5]]}, {"error": {"message": "no"}}),
]


@pytest.mark.parametrize("usage", [None, [], 3, {"prompt_tokens": None}, {"prompt_tokens_details": 3}])
@pytest.mark.parametrize("answer", _SCORE_ANSWERS, ids=json.dumps)
def test_scores_of_any_form_are_an_error_and_no_exception(answer: object, usage: object) -> None:
    client = ModelClient("http://127.0.0.1:1", "m", {}, 1.0, "score")
    request = client.make_request(0, "recommendation", _CANDIDATES, False)
    document = {**answer, "usage": usage} if isinstance(answer, dict) else answer
    exchange = Exchange(0.0, 200, {}, [(0.0, json.dumps(document).encode())])
    client._http.post = lambda path, body: exchange  # type: ignore[method-assign]
    row = client.send(request, 0.0, 0.0)
    assert row.error == "no scores"
    assert row.scores == ()


@pytest.mark.parametrize(
    ("refused", "options"),
    [
        ((), {"include_usage": True, "continuous_usage_stats": True}),
        ((b"continuous_usage_stats",), {"include_usage": True}),
        ((b"stream_options",), None),
        ((b"model",), {"include_usage": True, "continuous_usage_stats": True}),
    ],
)
def test_options_of_a_stream_that_a_server_refuses_are_left_out(
    refused: tuple[bytes, ...], options: dict[str, bool] | None
) -> None:
    client = ModelClient("http://127.0.0.1:1", "m", {}, 1.0, "auto")

    def post(path: str, body: bytes) -> Exchange:
        return Exchange(0.0, 422 if any(word in body for word in refused) else 200)

    client._probe_http.post = post  # type: ignore[method-assign]
    client.prepare([_CHAT])
    body = json.loads(client.make_request(0, "chat", _CHAT, False).body)
    assert body.get("stream_options") == options


def test_a_server_that_does_not_answer_is_probed_once() -> None:
    client = ModelClient("http://127.0.0.1:1", "m", {}, 1.0, "auto")
    paths: list[str] = []

    def post(path: str, body: bytes) -> Exchange:
        paths.append(path)
        return Exchange(0.0, error="timeout")

    client._probe_http.post = post  # type: ignore[method-assign]
    client.prepare([_CHAT, _CANDIDATES])
    assert len(paths) == 1


def test_an_unknown_endpoint_is_rejected(fake_url: str) -> None:
    with pytest.raises(UserError, match="--endpoint: 'guess' is unknown; choose from auto, score"):
        ask(fake_url, "good", _CANDIDATES, "guess")


def test_a_timer_wakes_in_time_and_never_early() -> None:
    timer = Timer()
    late_s = []
    for delay_s in (0.0005, 0.003, 0.0101, 0.0, -1.0):
        at_s = time.perf_counter() + delay_s
        timer.wait_until(at_s)
        late_s.append(time.perf_counter() - max(at_s, at_s - delay_s))
    timer.close()
    assert min(late_s) >= 0
    assert sorted(late_s)[2] < 0.001, "gevent's own timers have a resolution of 1 ms"


def test_a_chat_request_has_its_token_limit_and_usage_options(fake_url: str) -> None:
    client = ModelClient(fake_url, "good", {}, 20.0, "auto")
    request = client.make_request(0, "chat", cast("Prompt", _CHAT), exact_tokens=True)
    assert b'"ignore_eos":true' in request.body
    assert b'"max_tokens":20' in request.body
    assert b'"continuous_usage_stats":true' in request.body


def test_a_row_has_the_number_of_tokens_that_its_request_fixes(fake_url: str) -> None:
    client = ModelClient(fake_url, "http-500", {}, 20.0, "auto")
    for exact_tokens, fixed_tokens in ((True, 20), (False, 0)):
        request = client.make_request(0, "chat", cast("Prompt", _CHAT), exact_tokens)
        row = client.send(request, 0.0, time.perf_counter())
        assert (row.error, row.fixed_tokens) == ("http 500", fixed_tokens)
