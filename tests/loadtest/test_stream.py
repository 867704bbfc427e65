import time

import pytest

from loadtest.rows import Row
from loadtest.stream import TimedClient
from serve.engine import free_port
from tests.fake_server import CHUNKS, GAP_S, SCORE_S, TTFT_S

_TOLERANCE_S = 0.015
"""Scheduling noise of a test machine, of the best of five tries; full buffers would be off by 180 ms."""


def stream(url: str, model: str) -> Row:
    return TimedClient(url, {}, time.perf_counter()).stream_chat({"model": model, "messages": []})


def test_times_are_those_of_the_bytes_not_of_full_buffers(fake_url: str) -> None:
    row = min((stream(fake_url, "good") for _ in range(5)), key=lambda row: row.e2e_s)
    assert row.error is None
    assert row.ttft_s == pytest.approx(TTFT_S, abs=_TOLERANCE_S)
    assert row.e2e_s == pytest.approx(TTFT_S + GAP_S * (len(CHUNKS) - 1), abs=_TOLERANCE_S)
    assert [count for _, count in row.arrivals] == list(CHUNKS)
    assert row.output_tokens == sum(CHUNKS)
    assert row.prompt_tokens == 11
    gaps = list(row.inter_token_gaps_s())
    assert len(gaps) == sum(CHUNKS) - 1
    assert sum(gaps) == pytest.approx(GAP_S * (len(CHUNKS) - 1), abs=_TOLERANCE_S)


def test_a_server_that_counts_no_tokens_is_counted_by_chunks(fake_url: str) -> None:
    row = stream(fake_url, "no-usage")
    assert row.error is None
    assert row.output_tokens == len(CHUNKS)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("http-500", "http 500"),
        ("broken-json", "broken json"),
        ("cut", "broken http"),
        ("empty", "empty answer"),
        ("error-event", "error in stream"),
    ],
)
def test_each_fault_has_its_own_name(fake_url: str, model: str, error: str) -> None:
    row = stream(fake_url, model)
    assert row.error == error
    assert row.end_s >= row.sent_s


def test_a_client_goes_on_after_a_fault(fake_url: str) -> None:
    client = TimedClient(fake_url, {}, time.perf_counter())
    for model in ("cut", "broken-json", "good"):
        row = client.stream_chat({"model": model, "messages": []})
    assert row.error is None


def test_nobody_there_is_a_failed_connection() -> None:
    assert stream(f"http://127.0.0.1:{free_port()}", "good").error == "connection closed"


def test_scoring_is_timed_without_the_label_lookup(fake_url: str) -> None:
    client = TimedClient(fake_url, {}, time.perf_counter())
    rows = [client.score("good", "history", ["a", "b"], [" yes", " no"]) for _ in range(5)]
    assert {(row.error, row.num_items, row.prompt_tokens, row.ttft_s) for row in rows} == {(None, 2, 100, None)}
    assert min(row.e2e_s for row in rows) == pytest.approx(SCORE_S, abs=_TOLERANCE_S)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("http-500", "http 500"),
        ("few-scores", "wrong number of scores"),
        ("split-label", "label ' yes' is not one token"),
    ],
)
def test_scoring_faults_have_names(fake_url: str, model: str, error: str) -> None:
    client = TimedClient(fake_url, {}, time.perf_counter())
    assert client.score(model, "history", ["a", "b"], [" yes", " no"]).error == error
