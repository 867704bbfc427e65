import random
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from slimserve.core.errors import UserError
from slimserve.core.statistics import percentile_interval
from slimserve.loadtest.rows import Row, encode_row, read_rows
from slimserve.loadtest.summary import load_summary, percentiles, steady_state_warning, summarize


@pytest.mark.parametrize("n", [1, 2, 3, 10, 99, 100, 101, 1237])
def test_percentiles_are_the_nearest_ranks(n: int) -> None:
    samples = [random.Random(n).expovariate(1) for _ in range(n)]
    result = percentiles(samples)
    expected = np.quantile(samples, [0.5, 0.9, 0.95, 0.99], method="inverted_cdf")
    assert [result.p50, result.p90, result.p95, result.p99] == expected.tolist()
    assert result.n == n
    assert result.mean == pytest.approx(np.mean(samples))


def test_no_sample_gives_no_percentile() -> None:
    assert percentiles([]).p50 is None


@pytest.mark.parametrize(("n", "frac"), [(40, 0.5), (100, 0.9), (500, 0.99)])
def test_intervals_enclose_the_true_percentile_with_the_stated_probability(n: int, frac: float) -> None:
    draw = np.random.default_rng(7)
    true_percentile = norm.ppf(frac)
    intervals = [percentile_interval(np.sort(draw.normal(size=n)).tolist(), frac) for _ in range(1000)]
    enclosed = (
        sum(interval is not None and interval[0] <= true_percentile <= interval[1] for interval in intervals) / 1000
    )
    assert 0.935 < enclosed <= 0.99


@pytest.mark.parametrize(("n", "has_interval"), [(300, False), (400, True)])
def test_too_few_samples_have_no_interval(n: int, has_interval: bool) -> None:
    assert (percentile_interval(list(range(n)), 0.99) is not None) == has_interval


def test_a_chunk_of_k_tokens_counts_as_k_gaps() -> None:
    row = Row(scheduled_s=1.0, sent_s=1.25, end_s=3.0, arrivals=((1.5, 1), (1.75, 1), (2.75, 4)))
    assert row.ttft_s == 0.5
    assert row.e2e_s == 2.0
    assert row.send_lag_s == 0.25
    assert row.tpot_s == 0.25
    assert list(row.inter_token_gaps_s()) == [0.25] * 5


def test_rows_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        Row(0.5, 0.5, 2.0, ((1.0, 2), (1.5, 1)), prompt_tokens=7, output_tokens=3, text="é", first_answer_s=1.5),
        Row(0.7, 0.8, 0.9, num_items=16, error="http 500", kind="recommendation", scores=(0.5, 0.25)),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"".join(map(encode_row, rows)) + encode_row(rows[0])[:20])
    assert read_rows(file) == rows, "the last line was cut by the end of the run"
    file.write_bytes(b'{"scheduled_s":0.5,"sent_s":0.5,"end_s":2.0}\n')
    assert read_rows(file) == [Row(0.5, 0.5, 2.0)], "fields that an earlier version did not write have defaults"
    file.write_bytes(b"no json\n")
    with pytest.raises(UserError, match="not a file of raw rows"):
        read_rows(file)


def test_only_requests_and_tokens_in_the_window_count() -> None:
    rows = [
        Row(4.0, 4.0, 6.0, ((5.5, 1), (5.75, 1))),  # scheduled in the warm-up: no latency sample, but its tokens count
        Row(5.0, 5.0, 7.0, ((6.0, 1), (6.5, 2)), prompt_tokens=10, num_items=3, cached_tokens=4, finish_reason="stop"),
        Row(14.0, 14.0, 16.0, ((14.5, 1), (15.5, 1)), prompt_tokens=20, num_items=5),  # ends after the window
        Row(9.0, 9.0, 9.1, error="http 429"),
        Row(15.0, 15.0, 15.2, ((15.1, 1),)),  # scheduled after the window
    ]
    summary = summarize(rows, 5.0, 15.0)
    assert summary.num_requests == 3
    assert summary.errors == {"http 429": 1}
    assert (summary.e2e_s.p50, summary.e2e_s.p99, summary.e2e_s.n) == (2.0, 2.0, 2)
    assert (summary.ttft_s.p50, summary.ttft_s.p99) == (0.5, 1.0)
    assert summary.itl_s.n == 3
    assert summary.offered_per_s == 0.3
    assert summary.requests_per_s == 0.2
    assert summary.output_tokens_per_s == 0.6
    assert summary.items_per_s == 0.3
    assert summary.prompt_tokens_mean == 15
    assert summary.cached_frac == 0.4
    assert summary.finish_reasons == {"stop": 1}
    assert load_summary(summary.as_dict()) == summary


@pytest.mark.parametrize(("slope", "word"), [(0.0, None), (0.02, "rose"), (-0.002, "fell")])
def test_a_latency_that_rises_or_falls_gives_a_warning(slope: float, word: str | None) -> None:
    draw = random.Random(3)
    rows = [Row(at, at, at + 1 + slope * at + draw.gauss(0, 0.05)) for at in range(300)]
    warning = steady_state_warning(rows)
    assert (warning is None) if word is None else (warning is not None and word in warning)


def test_repeated_prompts_are_counted() -> None:
    rows = [Row(at, at, at + 1, prompt=at % 4, kind="reasoning") for at in range(10)]
    assert summarize(rows, 0.0, 10.0).num_repeats == 6
