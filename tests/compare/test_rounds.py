"""Comparisons without an engine: order, rates, resuming, endpoints and baselines.

A fake backend has an invented speed. Quality is really measured on the mock server.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from slimserve.compare.backend import Backend, ServedVariant
from slimserve.compare.quality import ask_quality, read_answers
from slimserve.compare.results import Comparison, Preset, VariantResult, load_comparison
from slimserve.compare.run import compare as run_comparison
from slimserve.compare.settings import CompareSettings, Endpoint, ExistingModel
from slimserve.core.errors import UserError
from slimserve.core.openai_client import CONCURRENCY, ENGINE_CONCURRENCY, Target
from slimserve.loadtest.rows import Row, encode_row
from slimserve.loadtest.settings import LoadSettings
from slimserve.loadtest.summary import LoadSummary, summarize
from slimserve.report.comparison import print_table, write_report
from slimserve.workloads import intervals

PRESET = Preset(
    {"recommendation": 4},
    {"recommendation": 2},
    duration_s=10.0,
    warmup_s=0.0,
    cooldown_s=0.0,
    num_rounds=2,
    num_texts=1,
    rate_fracs=(0.5, 0.8),
)
RECIPES = ["w8a8", "dense", "nf4"]


Compare = Callable[..., Comparison]


class Killed(BaseException):
    """Stands for SIGKILL."""


@dataclass
class FakeMachine:
    """Speeds in candidate lists per second by variant, and a log of events."""

    url: str
    speeds: dict[str, float] = field(default_factory=lambda: {"dense": 4.0, "w8a8": 8.0, "nf4": 1.0, "other": 4.0})
    versions: dict[str, str] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    loads_until_killed: int = 10**6
    wrong: str = ""
    """The variant that scores the wrong items best."""
    running: str = ""
    """The engine that is started; empty under a load: that of an endpoint."""

    def loads(self) -> list[list[str]]:
        return [event.split()[1:] for event in self.events if event.startswith("load")]


class FakeBackend(Backend):
    """Serves invented models with an invented speed; quality is really measured on the mock server."""

    def __init__(self, machine: FakeMachine, folder: Path) -> None:
        self._machine = machine
        self._folder = folder

    def resolve(self, argument: str) -> Path:
        return Path(argument)

    def build(self, recipe_name: str, base: Path, started: datetime) -> VariantResult:
        directory = self._folder / "models" / f"{recipe_name}{self._machine.versions.get(recipe_name, '')}"
        directory.mkdir(parents=True, exist_ok=True)
        return self.describe(recipe_name, recipe_name, "invented", directory, started)

    def describe(self, name: str, recipe: str, summary: str, directory: Path, started: datetime) -> VariantResult:
        return VariantResult(name, recipe, summary, directory=str(directory), disk_bytes=1, num_parameters=1)

    def identity(self, directory: Path) -> str:
        return directory.name

    def measure_roofline(self) -> None:
        pass

    @contextmanager
    def serve(self, directory: Path, log: Path) -> Iterator[ServedVariant]:
        name = next(name for name in self._machine.speeds if directory.name.startswith(name))
        self._machine.events.append(f"start {name}")
        self._machine.running = name
        model = "wrong" if name == self._machine.wrong else name
        yield ServedVariant(Target(self._machine.url, model), 30.0, lambda: 2**30)
        self._machine.running = ""

    def run_load(self, workload: str, target: Target, settings: LoadSettings, folder: Path) -> LoadSummary:
        machine = self._machine
        if machine.loads_until_killed == 0:
            raise Killed
        machine.loads_until_killed -= 1
        name = machine.running or "other"
        speed = machine.speeds[name]
        rate = min(float(settings.rate or speed), speed)
        machine.events.append(f"load {name} {settings.rate or 'capacity'} {settings.seed}")
        rows = [
            Row(at / rate, at / rate, (at + 0.5) / rate, num_items=16, prompt=at, scores=(0.1, 0.9, at / 100))
            for at in range(int(10 * rate))
        ]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{workload}.rows.jsonl").write_bytes(b"".join(map(encode_row, rows)))
        return summarize(rows, 0.0, 10.0)


@pytest.fixture
def machine(fake_url: str, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    for name in ("_NUM_RESAMPLES", "_NUM_PAIRED_RESAMPLES"):  # intervals have tests of their own and take time
        monkeypatch.setattr(intervals, name, 20)
    return FakeMachine(fake_url)


@pytest.fixture
def compare(machine: FakeMachine, tmp_path: Path) -> Callable[..., Comparison]:
    def run(output: Path, recipes: Sequence[str] = RECIPES, preset: Preset = PRESET, **settings: Any) -> Comparison:
        options = {"recipes": tuple(recipes), "workloads": ("recommendation",), **settings}
        validated = CompareSettings.model_validate(options)
        return run_comparison("a-model", validated, output, preset=preset, backend=FakeBackend(machine, tmp_path))

    return run


def test_rounds_alternate_their_order_and_rates_are_the_references(
    machine: FakeMachine, compare: Compare, tmp_path: Path
) -> None:
    comparison = compare(tmp_path / "out", slos=["recommendation:e2e_p90=1s"])
    loads = machine.loads()
    order = list(dict.fromkeys((name, int(seed) // 100) for name, _, seed in loads))
    assert order == [("dense", 1), ("w8a8", 1), ("nf4", 1), ("nf4", 2), ("w8a8", 2), ("dense", 2)]
    # 50% and 80% of dense's capacity, which far exceeds nf4's.
    assert [rate for name, rate, _ in loads if name == "w8a8"] == ["capacity", "2", "3.2", "capacity", "2"]
    assert [rate for name, rate, _ in loads if name == "nf4"] == ["capacity"] * 2
    nf4 = comparison.variant("nf4")
    assert nf4.rounds[0].overloaded == {"recommendation": [2.0, 3.2]}
    seeds = {name: [seed for its, _, seed in loads if its == name] for name in ("dense", "w8a8")}
    assert seeds["dense"] == seeds["w8a8"]
    assert len(set(seeds["dense"])) == 5
    assert comparison.slo_rates == {"recommendation": 2.0}
    assert comparison.verdict is not None
    assert comparison.verdict.uninformative == ["recommendation"], "the mock server gives all items one score"
    w8a8 = comparison.variant("w8a8")
    assert w8a8.costs["recommendation"]["per_million_items"].median == pytest.approx(1e6 / (8 * 16))
    agreement = w8a8.rank_agreement["recommendation"]
    assert agreement["kendall_tau"].value == agreement["top10_overlap"].value == 1
    assert w8a8.differences["recommendation"]["auc"].value == 0
    goodputs = [one.goodput_per_s for one in w8a8.at_rate("recommendation", 2.0)]
    assert goodputs == [2.0, 2.0]


@pytest.mark.parametrize("num_loads", [1, 4, 9, 11])
def test_a_killed_run_resumes(machine: FakeMachine, compare: Compare, tmp_path: Path, num_loads: int) -> None:
    machine.loads_until_killed = num_loads
    with pytest.raises(Killed):
        compare(tmp_path / "out")
    machine.running = ""
    machine.loads_until_killed = 10**6
    resumed = compare(tmp_path / "out")
    assert len(machine.loads()) == 12
    assert [one.number for one in resumed.variant("nf4").rounds] == [1, 2]
    complete = compare(tmp_path / "complete")
    assert [variant.rounds for variant in resumed.variants] == [variant.rounds for variant in complete.variants]


def test_a_finished_comparison_is_only_reported_again(
    machine: FakeMachine, compare: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = compare(tmp_path / "out")
    machine.events.clear()
    stricter = compare(tmp_path / "out", slos=["recommendation:e2e_p50=1ms"])
    assert machine.events == []
    assert capsys.readouterr().err.count("measured earlier, reused") == 6
    assert first.verdict is not None
    assert stricter.verdict is not None
    assert [one.meets_slo for one in first.verdict.decisions] == [True] * 3
    assert [one.meets_slo for one in stricter.verdict.decisions] == [False] * 3


def test_only_a_changed_variant_is_measured_again(machine: FakeMachine, compare: Compare, tmp_path: Path) -> None:
    compare(tmp_path / "out")
    machine.events.clear()
    machine.versions["w8a8"] = "-new"
    compare(tmp_path / "out")
    assert {name for name, *_ in machine.loads()} == {"w8a8"}
    machine.events.clear()
    machine.versions["dense"] = "-new"
    compare(tmp_path / "out")
    assert {name for name, *_ in machine.loads()} == {"dense", "w8a8", "nf4"}


@pytest.mark.parametrize(
    ("options", "what"),
    [({"preset": replace(PRESET, duration_s=11.0)}, "preset"), ({"recipes": ["dense", "w8a8"]}, "variants")],
)
def test_other_settings_in_the_same_folder_are_rejected(
    machine: FakeMachine, compare: Compare, tmp_path: Path, options: dict[str, Any], what: str
) -> None:
    compare(tmp_path / "out")
    machine.events.clear()
    with pytest.raises(UserError, match=rf"holds a comparison of other settings \({what}: .*name another folder"):
        compare(tmp_path / "out", **options)
    assert machine.events == []


def test_an_external_endpoint_is_a_row_that_is_never_started(
    machine: FakeMachine, compare: Compare, tmp_path: Path
) -> None:
    endpoint = Endpoint("other", machine.url, "good")
    comparison = compare(
        tmp_path / "out", recipes=["dense"], endpoints=[endpoint], preset=replace(PRESET, num_rounds=1)
    )
    other = comparison.variant("other")
    assert (other.directory, other.disk_bytes, other.ready_s, other.peak_rss_bytes) == (None, None, None, None)
    assert other.url == machine.url
    assert other.quality["recommendation"]["auc"].value == 0.5
    assert len(other.at_rate("recommendation", 2.0)) == 1
    assert "start other" not in machine.events


def test_engines_that_a_comparison_starts_get_more_prompts_at_a_time_than_endpoints(
    machine: FakeMachine, compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, int] = {}

    def record(target: Target, workload: str, *arguments: Any) -> Any:
        asked[machine.running or "other"] = arguments[-1]
        return ask_quality(target, workload, *arguments)

    monkeypatch.setattr("slimserve.compare.rounds.ask_quality", record)
    endpoint = Endpoint("other", machine.url, "good")
    compare(tmp_path / "out", recipes=["dense"], endpoints=[endpoint], preset=replace(PRESET, num_rounds=1))
    assert asked == {"dense": ENGINE_CONCURRENCY, "other": CONCURRENCY}
    assert ENGINE_CONCURRENCY > CONCURRENCY


def test_a_loss_against_a_baseline_fails_and_the_old_variant_runs_in_the_same_rounds(
    machine: FakeMachine, compare: Compare, tmp_path: Path
) -> None:
    compare(tmp_path / "before")
    machine.events.clear()
    machine.versions["w8a8"] = "-slow"
    machine.speeds = {"dense": 4.0, "w8a8-slow": 6.0, "w8a8": 8.0, "nf4": 1.0}
    after = compare(tmp_path / "after", baseline={"path": tmp_path / "before"})
    order = list(dict.fromkeys((name, int(seed) // 100) for name, _, seed in machine.loads()))
    assert order[1:3] == [("w8a8-slow", 1), ("w8a8", 1)]
    assert order[4:7] == [("nf4", 2), ("w8a8", 2), ("w8a8-slow", 2)]
    assert after.baseline is not None
    assert not after.baseline.passed
    failed = [(loss.variant, loss.metric) for loss in after.baseline.losses if loss.fails]
    assert failed == [("w8a8", "items_per_s")]
    loss = next(loss for loss in after.baseline.losses if loss.fails)
    assert (loss.loss_frac, loss.low, loss.high) == pytest.approx((0.25, 0.25, 0.25))
    assert any(note.startswith("dense: ") and "may have changed its speed" in note for note in after.baseline.notes)
    assert load_comparison(tmp_path / "after").baseline == after.baseline


def test_a_baseline_within_its_limits_passes(machine: FakeMachine, compare: Compare, tmp_path: Path) -> None:
    compare(tmp_path / "before")
    machine.speeds["w8a8"] = 7.8
    after = compare(tmp_path / "after", baseline={"path": tmp_path / "before"})
    assert after.baseline is not None
    assert after.baseline.passed
    assert {loss.kind for loss in after.baseline.losses} == {"goodput"}
    assert any("at its floor" in note for note in after.baseline.notes)


def test_a_baseline_of_other_prompts_is_rejected(machine: FakeMachine, compare: Compare, tmp_path: Path) -> None:
    compare(tmp_path / "before")
    preset = replace(PRESET, quality_prompts={"recommendation": 5})
    with pytest.raises(UserError, match="quality prompts of recommendation' were 4 and are 5"):
        compare(tmp_path / "after", baseline={"path": tmp_path / "before"}, preset=preset)


def test_a_baseline_is_not_overwritten(machine: FakeMachine, compare: Compare, tmp_path: Path) -> None:
    compare(tmp_path / "before")
    with pytest.raises(UserError, match="is the output folder"):
        compare(tmp_path / "before", baseline={"path": tmp_path / "before"})


def test_a_finished_model_is_a_row_and_the_first_one_the_reference_without_dense(
    machine: FakeMachine, compare: Compare, tmp_path: Path
) -> None:
    for name in ("w8a8", "nf4"):
        (tmp_path / name).mkdir()
    existing = [ExistingModel("nf4", str(tmp_path / "nf4")), ExistingModel("small", str(tmp_path / "w8a8"))]
    comparison = compare(tmp_path / "out", recipes=[], variants=existing, preset=replace(PRESET, num_rounds=1))
    assert comparison.reference == "nf4"
    assert [variant.name for variant in comparison.variants] == ["nf4", "small"]
    assert {name for name, *_ in machine.loads()} == {"nf4", "w8a8"}


@pytest.fixture
def own_workload(tmp_path: Path) -> str:
    """Return a workload file of 120 lists with a relevant item that the mock server scores best."""
    rows = [
        {"query": f"q{number}\n", "items": ["bad", "good", "poor"], "grades": [0, 1, 0], "part": "test"}
        for number in range(120)
    ]
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "lists.toml"
    file.write_text('kind = "rank"\ndata = "lists.jsonl"\nsplit = "part"\nprompts = { quick = 40, full = 120 }\n')
    return str(file)


def own_preset(**changes: Any) -> Preset:
    return replace(PRESET, quality_prompts={"lists": 100}, users={"lists": 2}, num_texts=0, num_rounds=1, **changes)


def test_a_users_own_workload_names_a_winner(compare: Compare, own_workload: str, tmp_path: Path) -> None:
    comparison = compare(tmp_path / "out", workloads=(own_workload,), preset=own_preset())
    verdict = comparison.verdict
    assert verdict is not None
    assert comparison.signals["lists"].is_informative
    assert comparison.signals["lists"].floor == 0.5
    assert (verdict.winner, verdict.uninformative) == ("w8a8", [])
    outcome = verdict.decisions[1].quality["lists"]
    assert (outcome.kept_frac, outcome.num_prompts) == (1.0, 100)


def test_a_quick_comparison_does_not_load_a_variant_that_loses_too_much_quality(
    machine: FakeMachine, compare: Compare, own_workload: str, tmp_path: Path
) -> None:
    machine.wrong = "nf4"
    preset = own_preset(loads_losers=False)
    comparison = compare(tmp_path / "out", workloads=(own_workload,), preset=preset)
    assert {name for name, *_ in machine.loads()} == {"dense", "w8a8"}
    assert comparison.verdict is not None
    assert comparison.verdict.winner == "w8a8"
    lost = comparison.verdict.decisions[2]
    assert (lost.name, lost.ruling, lost.slo, "load-tested" in lost.reason) == ("nf4", "loses", {}, False)
    assert lost.dominated_by == [], "its cost is unknown"
    print_table(comparison)
    assert "loses too much quality" in write_report(comparison, tmp_path / "out").read_text()
    machine.events.clear()
    compare(tmp_path / "out", workloads=(own_workload,), preset=preset)
    assert machine.events == [], "a finished comparison starts no engine"
    alone = compare(tmp_path / "alone", ["dense", "nf4"], workloads=(own_workload,), preset=preset).verdict
    assert alone is not None
    assert alone.winner == "dense"
    assert "no other is cheaper" not in " ".join(alone.sentences), "nobody knows what the unloaded variant costs"
    machine.events.clear()
    compare(tmp_path / "all", workloads=(own_workload,), preset=own_preset())
    assert {name for name, *_ in machine.loads()} == set(RECIPES)


def test_asking_stops_as_soon_as_a_variant_is_decided(compare: Compare, own_workload: str, tmp_path: Path) -> None:
    preset = own_preset(looks=(0.1, 0.5, 1.0))
    comparison = compare(tmp_path / "out", workloads=(own_workload,), preset=preset)
    asked = {name: len(read_answers(tmp_path / "out" / name / "quality" / "lists.jsonl").answers) for name in RECIPES}
    assert asked == {"dense": 100, "w8a8": 10, "nf4": 10}
    assert comparison.verdict is not None
    assert comparison.verdict.winner == "w8a8"
    again = compare(tmp_path / "out", workloads=(own_workload,), preset=preset)
    assert again.verdict == comparison.verdict


def test_a_killed_sequential_run_asks_only_the_missing_prompts(
    machine: FakeMachine, compare: Compare, own_workload: str, tmp_path: Path
) -> None:
    preset = own_preset(looks=(0.1, 1.0))
    compare(tmp_path / "out", workloads=(own_workload,), preset=preset)
    file = tmp_path / "out" / "dense" / "quality" / "lists.jsonl"
    complete = file.read_text()
    file.write_text("\n".join(complete.splitlines()[:31]) + "\n")
    compare(tmp_path / "out", workloads=(own_workload,), preset=preset)
    assert file.read_text() == complete
