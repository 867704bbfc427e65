import pytest

from slimserve.core.openai_client import Target
from slimserve.loadtest.rows import Row
from slimserve.loadtest.server_metrics import counts_between, disagreements, read_metrics
from slimserve.loadtest.summary import ServerCounts, percentiles

_BUCKETS = "vllm:time_to_first_token_seconds_bucket"


def test_a_server_without_metrics_has_no_counts(fake_url: str) -> None:
    assert read_metrics(Target(fake_url, "good")) == {}
    assert counts_between({}, {}) == ServerCounts()


def test_counts_are_the_growth_between_two_readings() -> None:
    before = {
        "vllm:prefix_cache_queries_total": {"": 100.0},
        "vllm:prefix_cache_hits_total": {"": 90.0},
        _BUCKETS: {"0.1": 50.0, "0.25": 50.0, "+Inf": 50.0},
    }
    after = {
        "vllm:prefix_cache_queries_total": {"": 300.0},
        "vllm:prefix_cache_hits_total": {"": 140.0},
        "vllm:external_prefix_cache_hits_total": {"": 30.0},
        "vllm:request_queue_time_seconds_sum": {"": 3.0},
        "vllm:request_queue_time_seconds_count": {"": 6.0},
        _BUCKETS: {"0.1": 50.0, "0.25": 58.0, "+Inf": 60.0},
    }
    counts = counts_between(before, after, [0.0, 7.0, 2.0])
    assert counts.prefix_cache_hit_frac == 0.4
    assert counts.queue_mean_s == 0.5
    assert counts.num_waiting_peak == 7
    assert counts.ttft_p50_bracket_s == (0.1, 0.25), "the median of the 10 new requests, not of the 50 earlier ones"
    assert counts.output_tokens is None


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (ServerCounts(requests=100, output_tokens=1000, ttft_p50_bracket_s=(0.1, 0.25)), []),
        (ServerCounts(requests=160, output_tokens=1000), ["100 requests, the server 160"]),
        (ServerCounts(output_tokens=1100), ["1000 output tokens, the server 1100"]),
        (ServerCounts(ttft_p50_bracket_s=(0.01, 0.02)), ["median first token is 200.0 ms"]),
    ],
)
def test_disagreements_between_client_and_server_are_reported(counts: ServerCounts, expected: list[str]) -> None:
    rows = [Row(0.0, 0.0, 1.0, ((0.2, 10),), output_tokens=10) for _ in range(100)]
    messages = disagreements(rows, counts, percentiles([0.2] * 100), percentiles([]))
    assert len(messages) == len(expected)
    assert all(part in line for part, line in zip(expected, messages, strict=True))
