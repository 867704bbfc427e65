from dataclasses import replace
from pathlib import Path

import pytest

from slimserve.compare.bottleneck import EnergyMeter, Rooflines, find_bottleneck, read_rooflines
from slimserve.core.openai_client import Target
from slimserve.loadtest.summary import ServerCounts, summarize

SUMMARY = replace(
    summarize([], 0.0, 10.0), requests_per_s=2.0, prompt_tokens_mean=1000.0, cached_frac=0.75, output_tokens_per_s=100.0
)


def test_the_phase_with_the_larger_fraction_of_its_roofline_is_the_bottleneck() -> None:
    # Half a second for 2 requests of 250 computed tokens at 1,000/s, a quarter for 100 tokens at 8 streams × 50/s.
    bottleneck = find_bottleneck(SUMMARY, 8, Rooflines(prefill=1000.0, decode=50.0))
    assert bottleneck.limited_by == "prefill"
    assert bottleneck.prefill_tokens_per_s == 500
    assert bottleneck.decode_roofline_tokens_per_s == 400
    assert bottleneck.roofline_frac == pytest.approx(0.75)
    assert find_bottleneck(SUMMARY, 8, Rooflines(prefill=10_000.0, decode=50.0)).limited_by == "decode"


def test_the_servers_count_of_cached_tokens_stands_in_for_the_answers() -> None:
    summary = replace(SUMMARY, cached_frac=None, server=ServerCounts(prefix_cache_hit_frac=0.5))
    assert find_bottleneck(summary, 8, Rooflines()).prefill_tokens_per_s == 1000


def test_without_rooflines_there_is_no_bottleneck(fake_url: str) -> None:
    assert read_rooflines(Target(fake_url, "good")) == Rooflines()
    bottleneck = find_bottleneck(SUMMARY, 8, Rooflines(prefill=1000.0))
    assert (bottleneck.limited_by, bottleneck.roofline_frac) == (None, None)


def test_energy_is_the_sum_over_processors_and_survives_a_wrap(tmp_path: Path) -> None:
    counters = {"intel-rapl:0": 1_000_000, "intel-rapl:1": 9_000_000}
    for name, value in counters.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("10000000\n")
    meter = EnergyMeter(tmp_path)
    with meter.running():
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text("3000000\n")
        (tmp_path / "intel-rapl:1" / "energy_uj").write_text("500000\n")
    assert meter.joules == pytest.approx(2.0 + 1.5)


def test_without_a_meter_energy_is_unknown(tmp_path: Path) -> None:
    meter = EnergyMeter(tmp_path)
    with meter.running():
        pass
    assert meter.joules is None
