import http.client
import itertools
import json
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from slimserve.loadtest.mock_server import MODEL, PROMPT_TOKENS, SCORE, MockSchedule, ResponseTimes, running_mock_server
from tests.conftest import measures_time

pytestmark = measures_time

_TOLERANCE_S = 0.015
"""Tolerance for the scheduling noise of a test machine, for the best of five tries."""
SCHEDULE = MockSchedule(ttft_s=0.05, gap_s=0.02, num_tokens=10)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_mock_server(SCHEDULE) as server:
        yield server.url


def post(url: str, path: str, body: object) -> tuple[float, dict[str, object]]:
    start = time.perf_counter()
    answer = httpx.post(url + path, json=body, timeout=30).raise_for_status().json()
    return time.perf_counter() - start, answer


def stream(url: str, body: dict[str, object], path: str = "/v1/chat/completions") -> tuple[list[float], list[str]]:
    """Return the seconds from the request to each event, and the events."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
    times, events = [], []
    start = time.perf_counter()
    connection.request("POST", path, json.dumps({"model": MODEL, "stream": True, **body}))
    response = connection.getresponse()
    while line := response.readline():
        if line.strip():
            times.append(time.perf_counter() - start)
            events.append(line.decode().removeprefix("data: ").strip())
    connection.close()
    return times, events


def test_tokens_arrive_on_schedule(url: str) -> None:
    def largest_error_s() -> float:
        times, events = stream(url, {"messages": []})
        assert len(events) == SCHEDULE.num_tokens + 1
        return max(abs(at - SCHEDULE.ttft_s - number * SCHEDULE.gap_s) for number, at in enumerate(times[:-1]))

    assert min(largest_error_s() for _ in range(5)) < _TOLERANCE_S


def test_simultaneous_streams_keep_their_own_schedules(url: str) -> None:
    with ThreadPoolExecutor(16) as pool:
        ends = [times[-1] for times, _ in pool.map(lambda _: stream(url, {"messages": []}), range(16))]
    assert statistics.median(ends) == pytest.approx(SCHEDULE.ttft_s + 9 * SCHEDULE.gap_s, abs=0.05)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_has_the_form_of_openais_api(url: str, path: str) -> None:
    _, events = stream(url, {"max_tokens": 3, "stream_options": {"include_usage": True}}, path)
    assert events.pop() == "[DONE]"
    *tokens, last = map(json.loads, events)
    texts = [event["choices"][0].get("text") or event["choices"][0]["delta"]["content"] for event in tokens]
    assert texts == [" a"] * 3
    assert [event["choices"][0]["finish_reason"] for event in tokens] == [None, None, "length"]
    assert all("usage" not in event for event in tokens)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 3, "total_tokens": PROMPT_TOKENS + 3}


def test_usage_comes_with_each_chunk_on_request(url: str) -> None:
    _, events = stream(url, {"max_tokens": 3, "stream_options": {"continuous_usage_stats": True}})
    assert [json.loads(event)["usage"]["completion_tokens"] for event in events[:-1]] == [1, 2, 3]


def test_an_answer_without_streaming_arrives_at_the_time_of_its_last_token(url: str) -> None:
    seconds, answer = min(post(url, "/v1/chat/completions", {"messages": [], "max_tokens": 5}) for _ in range(3))
    assert seconds >= SCHEDULE.ttft_s + 4 * SCHEDULE.gap_s
    assert answer["choices"][0]["message"]["content"] == " a" * 5  # type: ignore[index]


def test_scores_have_the_form_of_each_endpoint(url: str) -> None:
    seconds, answer = post(url, "/v1/score", {"query": "q", "items": ["a", "b"], "labels": [" yes", " no"]})
    assert answer["scores"] == [[SCORE, SCORE]] * 2
    assert seconds >= SCHEDULE.ttft_s
    _, answer = post(url, "/v1/rerank", {"query": "q", "documents": ["a", "b"]})
    assert [entry["relevance_score"] for entry in answer["results"]] == [SCORE] * 2  # type: ignore[attr-defined]
    _, answer = post(url, "/generative_scoring", {"query": "q", "items": ["a", "b"], "label_token_ids": [1, 2]})
    assert [entry["score"] for entry in answer["data"]] == [SCORE] * 2  # type: ignore[attr-defined]
    _, answer = post(url, "/tokenize", {"prompt": " yes"})
    assert len(answer["tokens"]) == 1  # type: ignore[arg-type]


def test_the_server_lists_its_model_and_is_healthy(url: str) -> None:
    assert [entry["id"] for entry in httpx.get(f"{url}/v1/models").json()["data"]] == [MODEL]
    assert httpx.get(f"{url}/health").status_code == 200


def test_the_server_reports_its_own_delays_and_clears_them_on_request() -> None:
    with running_mock_server(SCHEDULE) as server:
        stream(server.url, {"max_tokens": 7})
        lateness = server.lateness()
        assert lateness["num_writes"] == 7
        assert 0 <= lateness["lag_p50_ms"] <= lateness["lag_p99_ms"] <= lateness["lag_max_ms"]
        assert server.lateness()["num_writes"] == 0


def test_metrics_have_the_names_and_counts_of_vllm() -> None:
    with running_mock_server(SCHEDULE) as server:
        for _ in range(3):
            stream(server.url, {"max_tokens": 4})
        text = httpx.get(f"{server.url}/metrics").text
    samples = {
        (sample.name, sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["vllm:request_success_total", None] == 3
    assert samples["vllm:prompt_tokens_total", None] == 3 * PROMPT_TOKENS
    assert samples["vllm:generation_tokens_total", None] == 12
    assert samples["vllm:time_to_first_token_seconds_count", None] == 3
    assert samples["vllm:time_to_first_token_seconds_bucket", "0.04"] == 0
    assert samples["vllm:inter_token_latency_seconds_count", None] == 9
    assert samples["vllm:e2e_request_latency_seconds_sum", None] >= 3 * (SCHEDULE.ttft_s + 3 * SCHEDULE.gap_s)


def test_a_client_that_disconnects_or_sends_garbage_does_not_affect_others(url: str) -> None:
    parts = urlsplit(url)
    for text in (b"GARBAGE\r\n\r\n", b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 3\r\n\r\n{}}"):
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
        connection.connect()
        connection.sock.sendall(text)
        connection.close()
    abandoned = http.client.HTTPConnection(parts.hostname or "", parts.port)
    abandoned.request("POST", "/v1/chat/completions", json.dumps({"stream": True}))
    abandoned.close()
    _, events = stream(url, {"max_tokens": 3})
    assert events[-1] == "[DONE]"


def test_a_queue_serves_requests_one_at_a_time_in_order_of_arrival() -> None:
    ends: dict[int, float] = {}

    def ask(number: int) -> None:
        stream(url, {"max_tokens": 1})
        ends[number] = time.perf_counter() - start

    with running_mock_server(MockSchedule(service_s=0.1)) as server:
        url = server.url
        start = time.perf_counter()
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
            time.sleep(0.02)
        for thread in threads:
            thread.join()
    assert sorted(ends, key=lambda number: ends[number]) == list(range(5))
    assert ends[4] >= 0.5


def test_an_idle_queue_serves_the_next_request_at_once() -> None:
    response_times = ResponseTimes(MockSchedule(service_s=1.0))
    assert [response_times.begin_of(arrived_s) for arrived_s in (0.0, 0.5, 10.0)] == [1.0, 2.0, 11.0]


def test_an_answer_scheduled_during_a_freeze_comes_at_its_end() -> None:
    response_times = ResponseTimes(MockSchedule(ttft_s=0.1, stall_at_s=5.0, stall_s=2.0))
    assert response_times.after_stall(response_times.begin_of(100.0)) == 100.1
    assert response_times.after_stall(response_times.begin_of(104.95)) == 107.0
    assert response_times.after_stall(response_times.begin_of(106.8)) == 107.0
    assert response_times.after_stall(response_times.begin_of(106.95)) == pytest.approx(107.05)


def test_a_frozen_queue_serves_waiting_requests_after_the_freeze() -> None:
    response_times = ResponseTimes(MockSchedule(service_s=0.5, stall_at_s=1.0, stall_s=2.0))
    ends = [response_times.begin_of(arrived_s) for arrived_s in (0.0, 0.9, 1.5, 2.5)]
    assert ends == [0.5, 3.0, 3.5, 4.0]


def test_a_freeze_delays_a_stream_and_then_sends_the_overdue_tokens_at_once() -> None:
    with running_mock_server(
        MockSchedule(ttft_s=0.05, gap_s=0.02, num_tokens=20, stall_at_s=0.2, stall_s=0.5)
    ) as server:
        times, _ = stream(server.url, {})
    gaps = [later - before for before, later in itertools.pairwise(times)]
    frozen = max(range(len(gaps)), key=gaps.__getitem__)
    # The last token before the freeze is scheduled at 190 ms at the latest; the overdue ones arrive together at 700 ms.
    assert gaps[frozen] == pytest.approx(0.51, abs=0.05)
    assert times[frozen + 1] == pytest.approx(0.7, abs=0.05)
    assert times[-1] - times[frozen + 1] < 0.05
