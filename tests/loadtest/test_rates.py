import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slimserve.core.errors import UserError
from slimserve.core.openai_client import Target
from slimserve.loadtest import rates
from slimserve.loadtest.rates import find_rate, sweep_rates
from slimserve.loadtest.rows import Row
from slimserve.loadtest.settings import LoadSettings
from slimserve.loadtest.slo import parse_objective
from slimserve.loadtest.summary import LoadSummary, summarize

_TARGET = Target("http://127.0.0.1:1", "m")
_LIMIT = 6.0


@pytest.fixture
def runs_made(monkeypatch: pytest.MonkeyPatch) -> list[LoadSettings]:
    """Return the settings of all runs against a simulated server that is slow from _LIMIT requests/s on."""
    settings_seen: list[LoadSettings] = []

    def answer(
        suite: str, target: Target, settings: LoadSettings, output: Path, on_result: object = None
    ) -> tuple[LoadSummary, list[Row]]:
        settings_seen.append(settings)
        latency_s = 0.1 if float(settings.rate) < _LIMIT else 0.9
        rows = [Row(at, at, at + latency_s) for at in range(30)]
        objectives = [parse_objective(text).evaluate(rows) for text in settings.slos]
        return replace(summarize(rows, 0.0, 30.0), objectives=objectives), rows

    monkeypatch.setattr(rates, "run_suite", answer)
    return settings_seen


def test_the_highest_rate_is_found_and_written_with_its_curve(runs_made: list[LoadSettings], tmp_path: Path) -> None:
    curves: list[Any] = []
    settings = LoadSettings(slos=("e2e_p90=500ms",), seed=5)
    result = find_rate("reasoning", _TARGET, settings, tmp_path, on_curve=lambda *given: curves.append(given))
    assert result.rate == pytest.approx(_LIMIT, rel=0.03)
    assert len({settings.seed for settings in runs_made}) == len(runs_made)
    ends = [settings.suite.first_prompt + len(settings.scheduled_s()) for settings in runs_made]
    assert [settings.suite.first_prompt for settings in runs_made[1:]] == ends[:-1], (
        "no run repeats the prompts of another"
    )
    document = json.loads((tmp_path / "reasoning.curve.json").read_text())
    assert document["max_rate"]["rate"] == result.rate
    assert len(document["runs"]) == len(runs_made)
    ((reported, points, folder, rate),) = curves
    assert (reported, len(points), folder, rate) == (document, len(runs_made), tmp_path, result.rate)


def test_a_sweep_measures_each_rate_once(runs_made: list[LoadSettings], tmp_path: Path) -> None:
    points = sweep_rates("reasoning", _TARGET, LoadSettings(slos=("e2e_p90=500ms",)), "8,2,4", tmp_path)
    assert [(point.rate, point.met) for point in points] == [(2.0, True), (4.0, True), (8.0, False)]
    assert json.loads((tmp_path / "reasoning.curve.json").read_text())["max_rate"] is None


@pytest.mark.parametrize("text", ["", "a", "1,,2", "0", "-1"])
def test_an_invalid_list_of_rates_is_rejected(runs_made: list[LoadSettings], tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="--sweep: .* is not a list of rates"):
        sweep_rates("reasoning", _TARGET, LoadSettings(), text, tmp_path)


def test_a_search_needs_an_objective_and_one_rate(runs_made: list[LoadSettings], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--slo"):
        find_rate("reasoning", _TARGET, LoadSettings(), tmp_path)
    with pytest.raises(UserError, match=r"--rate: '1\.\.5' is not a rate"):
        find_rate("reasoning", _TARGET, LoadSettings(rate="1..5", slos=("e2e_p90=1s",)), tmp_path)
    assert not runs_made
