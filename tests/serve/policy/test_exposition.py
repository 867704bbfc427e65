"""Tests of labelling and merging Prometheus text, compared with the library's own parser."""

from __future__ import annotations

import math
import random
import time
from collections import Counter as Bag

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from slimserve.serve.policy.exposition import label_series, merge_expositions
from tests.conftest import measures_time

_ODD = [
    "",
    "a",
    'say "hi"',
    "back\\slash",
    "new\nline",
    "{}",
    "},{",
    'variant="x"',
    ",variant=",
    "ä€🙂",
    "# HELP",
    " ",
    "\\n",
]


def page(seed: int) -> str:
    """Return a random page with every kind of metric, unusual label values and unusual numbers."""
    draw = random.Random(seed)
    registry = CollectorRegistry()
    counter = Counter("runs", 'Help with "quotes" and \\ and\nlines', ["a", "b"], registry=registry)
    histogram = Histogram("took_seconds", "Seconds", ["a"], buckets=(0.1, 1), registry=registry)
    summary = Summary("size_bytes", "Bytes", registry=registry)
    gauge = Gauge("vllm:cache_usage_perc", "Colon in the name", ["a"], registry=registry)
    Gauge("bare", "No labels", registry=registry).set(draw.choice([math.nan, math.inf, -math.inf, 1e-300, 3]))
    for _ in range(6):
        counter.labels(draw.choice(_ODD), draw.choice(_ODD)).inc(draw.random())
        histogram.labels(draw.choice(_ODD)).observe(draw.random() * 2)
        gauge.labels(draw.choice(_ODD)).set(draw.choice([math.nan, -math.inf, 7]))
        summary.observe(draw.random())
    return generate_latest(registry).decode()


def samples(text: str) -> list[tuple[str, str, tuple[tuple[str, str], ...], str]]:
    """Return family, name, labels and value of every sample as the parser reads them; NaN equals itself."""
    return [
        (family.name + ":" + family.type, sample.name, tuple(sorted(sample.labels.items())), repr(sample.value))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


@pytest.mark.parametrize("variant", _ODD)
@pytest.mark.parametrize("seed", range(4))
def test_a_label_is_added_to_every_sample_and_nothing_else_changes(seed: int, variant: str) -> None:
    text = page(seed)
    expected = [
        (family, name, tuple(sorted((*labels, ("variant", variant)))), value)
        for family, name, labels, value in samples(text)
    ]
    labelled = label_series(text, variant)
    assert samples(labelled) == expected
    assert [line for line in labelled.split("\n") if line[:1] == "#"] == [
        line for line in text.split("\n") if line[:1] == "#"
    ]


def test_a_series_that_names_its_variant_keeps_it() -> None:
    text = 'up{variant="a"} 1\nup{note=",variant=",b="c"} 1\nup{} 2\nup 3\nup{b="c",} 4\n'
    assert [labels for _, _, labels, _ in samples(label_series(text, "z"))] == [
        (("variant", "a"),),
        (("b", "c"), ("note", ",variant="), ("variant", "z")),
        (("variant", "z"),),
        (("variant", "z"),),
        (("b", "c"), ("variant", "z")),
    ]
    assert label_series(label_series(text, "z"), "y") == label_series(text, "z")


def test_a_quoted_metric_name_stays_in_front_of_the_label() -> None:
    assert label_series('{"http.requests",code="200"} 1\n', "z") == '{"http.requests",variant="z",code="200"} 1\n'


def test_merged_pages_hold_every_sample_once_with_one_header_and_families_together() -> None:
    pages = [label_series(page(seed), f"v{seed}") for seed in range(3)] + ["# TYPE own gauge\nown 1\nloose 2\n"]
    merged = merge_expositions(pages)
    assert Bag(samples(merged)) == Bag(sample for text in pages for sample in samples(text))
    headers = Bag(tuple(line.split(None, 3)[1:3]) for line in merged.split("\n") if line[:1] == "#")
    assert set(headers.values()) == {1}
    families = [family for family, *_ in samples(merged)]
    assert len(set(families)) == sum(
        before != after for before, after in zip([None, *families], families, strict=False)
    )


def test_merging_keeps_a_family_that_is_named_like_a_part_of_another() -> None:
    text = '# TYPE a histogram\na_bucket{le="1"} 1\na_sum 1\na_count 1\n# TYPE a_count gauge\na_count{x="y"} 5\n'
    assert samples(merge_expositions([text])) == samples(text)
    assert merge_expositions([]) == merge_expositions(["", "\n"]) == ""


@measures_time
def test_two_thousand_lines_are_labelled_and_merged_in_milliseconds() -> None:
    text = "".join(
        f"# HELP m{family} help\n# TYPE m{family} gauge\n" + f'm{family}{{a="b",c="d"}} 1.5\n' * 50
        for family in range(40)
    )
    best = math.inf
    for _ in range(5):
        begin = time.perf_counter()
        merge_expositions([label_series(text, "v")])
        best = min(best, time.perf_counter() - begin)
    assert best < 0.1
