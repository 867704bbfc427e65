import math
import random
from fractions import Fraction

import pytest

from slimserve.core.errors import UserError
from slimserve.loadtest.rows import Row
from slimserve.loadtest.slo import goodput, parse_objective


def row(
    e2e_s: float = 1.0,
    arrivals: tuple[tuple[float, int], ...] = (),
    error: str | None = None,
    answer_s: float | None = None,
    fixed_tokens: int = 0,
    num_items: int = 0,
) -> Row:
    """Return the row of a request that was scheduled at second 10 and sent late."""
    chunks = tuple((10.0 + at_s, count) for at_s, count in arrivals)
    first = None if answer_s is None else 10.0 + answer_s
    return Row(
        *(10.0, 10.25, 10.0 + e2e_s, chunks),
        error=error,
        first_answer_s=first,
        fixed_tokens=fixed_tokens,
        num_items=num_items,
    )


def streamed(num_tokens: int, gap_s: float = 0.02) -> Row:
    return row(9, tuple((0.1 + number * gap_s, 1) for number in range(num_tokens)))


@pytest.mark.parametrize(
    ("text", "metric", "frac", "limit"),
    [
        ("ttft_p99=500ms", "ttft", 0.99, 0.5),
        ("itl_p50<=50ms", "itl", 0.5, 0.05),
        (" e2e_p99.9 ≤ 2s ", "e2e", 0.999, 2.0),
        ("tpot_mean=1.5s", "tpot", None, 1.5),
        ("answer_p5=0.25s", "answer", 0.05, 0.25),
        ("errors=0.5%", "errors", None, 0.005),
    ],
)
def test_an_objective_is_written_as_metric_statistic_and_bound(
    text: str, metric: str, frac: float | None, limit: float
) -> None:
    objective = parse_objective(text)
    assert objective.metric == metric
    assert objective.limit == pytest.approx(limit)
    assert objective.frac == (None if frac is None else pytest.approx(frac))
    assert objective.text == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "ttft", "ttft=500ms", "ttft_p99", "ttft_p99=500", "ttft_p99=500us", "ttft_p100=1s", "ttft_p99=-1s"),
        *("speed_p99=1s", "errors=1", "errors_p99=1%", "ttft_p99>1s", "ttft_p99=1s,e2e_p99=2s", "TTFT_p99=1s"),
    ],
)
def test_an_invalid_objective_is_rejected_with_the_syntax(text: str) -> None:
    with pytest.raises(UserError, match="is not an objective; write ttft_p99=500ms"):
        parse_objective(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("e2e_p50=1s", 2.0),
        ("e2e_p99=1s", 4.0),
        ("e2e_mean=1s", 2.5),
        ("ttft_p99=1s", 0.5),
        ("itl_p99=1s", 0.5),  # gaps 0.5, and 1.0 shared by two tokens
        ("tpot_p50=1s", 0.5),
        ("answer_p50=1s", 1.5),
    ],
)
def test_latency_statistics_count_from_the_scheduled_time(text: str, value: float) -> None:
    rows = [row(1), row(2, ((0.5, 1), (1.0, 1), (2.0, 2)), answer_s=1.5), row(3), row(4)]
    outcome = parse_objective(text).evaluate(rows)
    assert outcome.value == pytest.approx(value)
    assert outcome.is_met == (value <= outcome.limit)


def test_a_value_at_the_bound_meets_the_objective_and_a_run_without_samples_misses_it() -> None:
    assert parse_objective("e2e_p50=1s").evaluate([row(1.0)]).is_met
    assert not parse_objective("e2e_p50=1s").evaluate([row(1.0 + 1e-6)]).is_met
    for rows in ([], [row(1.0)]):
        outcome = parse_objective("ttft_p50=1s").evaluate(rows)
        assert (outcome.value, outcome.is_met) == (None, False)
    assert not parse_objective("errors=1%").evaluate([]).is_met
    assert not parse_objective("e2e_p99=9s").evaluate([row(error="timeout")] * 3).is_met, "only failed requests"


@pytest.mark.parametrize("metric", ["ttft", "itl", "tpot", "e2e", "answer"])
@pytest.mark.parametrize(
    ("statistic", "num_failed", "is_met"),
    [
        *(("p99", 100, False), ("p99", 50, False), ("p99", 2, False), ("p99", 1, True)),
        *(("p50", 50, True), ("p50", 51, False), ("mean", 1, False)),
    ],
)
def test_an_objective_is_missed_if_the_share_of_failed_requests_exceeds_its_tail(
    metric: str, statistic: str, num_failed: int, is_met: bool
) -> None:
    """Every answer has 101 tokens, so one sample for each failed request would be hardly any of the ITL's samples."""
    answer = row(9, tuple((0.1 + number * 0.02, 1) for number in range(101)), answer_s=0.1)
    rows = [answer] * (100 - num_failed) + [row(error="http 429")] * num_failed
    outcome = parse_objective(f"{metric}_{statistic}=10s").evaluate(rows)
    assert outcome.is_met == is_met
    assert (outcome.value is None) == (not is_met)


def test_a_failed_request_has_the_gaps_of_its_fixed_length_or_else_of_the_mean_answer() -> None:
    draw = random.Random(5)
    for _ in range(200):
        answers = [streamed(draw.randrange(1, 9), draw.choice((0.01, 0.02, 0.05))) for _ in range(draw.randrange(1, 6))]
        fixed = [draw.choice((0, 0, 1, 4, 12)) for _ in range(draw.randrange(4))]
        rows = [*answers, *(row(error="timeout", fixed_tokens=length) for length in fixed)]
        gaps = sorted(gap for one in answers for gap in one.inter_token_gaps_s())
        # By brute force, every gap is repeated so often that the mean number of gaps becomes an integer.
        repeats = len(answers)
        samples = [gap for gap in gaps for _ in range(repeats)]
        samples += [math.inf] * sum(repeats * (length - 1) if length else len(gaps) for length in fixed)
        for frac in (Fraction(1, 2), Fraction(9, 10), Fraction(99, 100)):
            rank = max(1, math.ceil(frac * len(samples)))
            expected = samples[rank - 1] if gaps else math.inf
            value = parse_objective(f"itl_p{int(frac * 100)}=1s").value_of(rows)
            assert value == (pytest.approx(expected) if expected < math.inf else None)


def test_percentiles_of_an_objective_are_exact_for_every_number_of_requests() -> None:
    for percent, frac in (("99.9", Fraction(999, 1000)), ("55", Fraction(55, 100)), ("7", Fraction(7, 100))):
        objective = parse_objective(f"e2e_p{percent}=9s")
        assert objective.frac == frac
        for n in (*range(1, 120), 999, 1000, 1001, 1999, 2000, 2001, 3000):
            rank = -(-frac.numerator * n // frac.denominator)
            assert objective.value_of([row(float(number)) for number in range(1, n + 1)]) == rank


def test_streamed_metrics_do_not_apply_to_scoring_requests() -> None:
    scoring, chat = row(num_items=16, error="http 500"), row(error="http 500")
    for metric in ("ttft", "itl", "tpot", "answer"):
        objective = parse_objective(f"{metric}_p99=1s")
        assert not objective.applies_to([scoring])
        assert objective.applies_to([chat])
        assert objective.applies_to([chat, scoring])
    assert parse_objective("e2e_p99=1s").applies_to([scoring])
    assert parse_objective("errors=1%").applies_to([scoring])


def test_errors_are_a_share_of_all_requests() -> None:
    rows = [row(error="timeout"), row(error="http 500"), *[row()] * 98]
    assert parse_objective("errors=2%").evaluate(rows).is_met
    outcome = parse_objective("errors=1.9%").evaluate(rows)
    assert (outcome.value, outcome.is_met) == (0.02, False)


def test_a_share_of_errors_at_the_bound_meets_it_for_every_bound() -> None:
    for per_mille in range(1, 1000):
        rows = [row(error="timeout")] * per_mille + [row()] * (1000 - per_mille)
        assert parse_objective(f"errors={per_mille / 10:g}%").evaluate(rows).is_met


def test_goodput_counts_only_successful_requests_that_meet_every_objective() -> None:
    objectives = [parse_objective("ttft_p99=500ms"), parse_objective("itl_p99=300ms")]
    quick = row(2, ((0.4, 1), (0.6, 1), (1.2, 2)))
    late = row(2, ((0.6, 1), (0.7, 1)))
    one_slow_token = row(2, ((0.4, 1), (0.6, 1), (1.0, 1)))
    failed = row(2, ((0.4, 1), (0.6, 1)), error="closed in mid-stream")
    assert goodput([quick, quick, late, one_slow_token, failed], objectives, window_s=4.0) == 0.5
    assert goodput([row(), failed], [parse_objective("errors=50%")], window_s=2.0) == 0.5
    assert goodput([], objectives, window_s=2.0) == 0
