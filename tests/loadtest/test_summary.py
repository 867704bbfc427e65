import random
from pathlib import Path

import numpy as np
import pytest

from loadtest.rows import Row, read_rows, write_row
from loadtest.summary import percentiles, summarize


@pytest.mark.parametrize("n", [1, 2, 3, 10, 99, 100, 101, 1237])
def test_percentiles_are_the_nearest_ranks(n: int) -> None:
    samples = [random.Random(n).expovariate(1) for _ in range(n)]
    figure = percentiles(samples)
    expected = np.quantile(samples, [0.5, 0.9, 0.99], method="inverted_cdf")
    assert [figure.p50, figure.p90, figure.p99] == expected.tolist()
    assert figure.n == n


def test_no_sample_gives_no_percentile() -> None:
    assert percentiles([]).p50 is None


def test_a_chunk_of_k_tokens_is_k_gaps() -> None:
    row = Row(due_s=1.0, sent_s=1.25, end_s=3.0, arrivals=((1.5, 1), (1.75, 1), (2.75, 4)))
    assert row.ttft_s == 0.5
    assert row.e2e_s == 2.0
    assert list(row.inter_token_gaps_s()) == [0.25] * 5


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        Row(0.5, 0.5, 2.0, ((1.0, 2), (1.5, 1)), prompt_tokens=7, output_tokens=3),
        Row(0.7, 0.8, 0.9, num_items=16, error="http 500"),
    ]
    with (tmp_path / "rows.jsonl").open("w") as file:
        for row in rows:
            write_row(file, row)
    assert read_rows(tmp_path / "rows.jsonl") == rows


def test_the_window_decides_what_counts() -> None:
    rows = [
        Row(4.0, 4.0, 6.0, ((5.5, 1), (5.75, 1))),  # due in the warm-up: no latency, but its tokens arrive in time
        Row(5.0, 5.0, 7.0, ((6.0, 1), (6.5, 2)), prompt_tokens=10, num_items=3),
        Row(14.0, 14.0, 16.0, ((14.5, 1), (15.5, 1)), prompt_tokens=20, num_items=5),  # ends after the window
        Row(9.0, 9.0, 9.1, error="http 429"),
        Row(15.0, 15.0, 15.2, ((15.1, 1),)),  # due after the window
    ]
    summary = summarize(rows, warmup_s=5.0, end_s=15.0, prefix_cache_hit_frac=0.5)
    assert summary.num_requests == 3
    assert summary.errors == {"http 429": 1}
    assert (summary.e2e_s.p50, summary.e2e_s.p99, summary.e2e_s.n) == (2.0, 2.0, 2)
    assert (summary.ttft_s.p50, summary.ttft_s.p99) == (0.5, 1.0)
    assert summary.itl_s.n == 3
    assert summary.requests_per_s == 0.2
    assert summary.output_tokens_per_s == 0.6
    assert summary.items_per_s == 0.3
    assert summary.prompt_tokens_mean == 15
    assert summary.prefix_cache_hit_frac == 0.5
