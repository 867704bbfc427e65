"""The main job on a real engine: build, serve, judge, load, report; and what is left when it is interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from slimserve.compare.results import Effort
from slimserve.compare.run import build, compare
from slimserve.core.errors import UserError
from tests.conftest import SMOLLM2

TINY = Effort(
    {"recommendation": 4, "reasoning": 6},
    {"recommendation": 1, "reasoning": 2},
    duration_s=4.0,
    warmup_s=1.0,
    cooldown_s=0.0,
    rounds=1,
    text_sequences=1,
    text_tokens=64,
    rates={"recommendation": (1.0,)},
    rate_fracs=(),
)


@pytest.mark.engine
def test_a_variant_is_built_served_judged_loaded_and_reported(tmp_path: Path) -> None:
    compare(SMOLLM2, ["w8a8"], ["recommendation", "reasoning"], TINY, tmp_path)
    document = json.loads((tmp_path / "results.json").read_text())
    (variant,) = document["variants"]
    assert variant["recipe"] == "w8a8"
    assert 150 * 2**20 < variant["disk_bytes"] < 170 * 2**20
    assert variant["num_parameters"] == 134_515_008
    assert variant["quality"]["recommendation"]["auc"]["n"] == 64
    assert variant["quality"]["reasoning"]["accuracy"]["n"] == 6
    assert 0.2 < variant["quality"]["recommendation"]["auc"]["value"] <= 1.0
    assert 1 < variant["quality"]["text"]["perplexity"]["value"] < 100
    (one,) = variant["rounds"]
    assert one["ready_s"] > 5
    assert one["peak_rss_bytes"] > 2**30
    recommendation, reasoning = (one["capacity"][name]["summary"] for name in ("recommendation", "reasoning"))
    assert recommendation["errors"] == reasoning["errors"] == {}
    assert recommendation["items_per_s"] > 1
    assert reasoning["output_tokens_per_s"] > 1
    for figure in ("ttft_s", "itl_s", "e2e_s"):
        assert 0 < reasoning[figure]["p50"] <= reasoning[figure]["p90"] <= reasoning[figure]["p99"]
    assert 0 < recommendation["server"]["prefix_cache_hit_frac"] < 1
    assert variant["regime"]["recommendation"]["bound"] == "prefill"
    assert variant["costs"]["reasoning"]["per_million_output_tokens"]["median"] > 0
    assert [run["rate_rps"] for run in one["at_rate"]["recommendation"]] == [1.0]
    assert document["verdict"]["winner"] == "w8a8"
    assert "<svg" in (tmp_path / "report.html").read_text()


@pytest.mark.engine
def test_an_interrupt_leaves_no_process_and_no_half_variant(tmp_path: Path) -> None:
    environment = os.environ | {"SLIMSERVE_CACHE": str(tmp_path / "cache"), "COLUMNS": "200"}
    command = [sys.executable, "-m", "slimserve", "compare", "--model", SMOLLM2, "--recipes", "fp8", "--quick"]
    command += ["-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "on vLLM: after" in line:
            break
    time.sleep(8)
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.send_signal(signal.SIGINT)
    process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    left = [path.name for path in (tmp_path / "cache" / "variants").iterdir()]
    assert not [name for name in left if name.startswith(".")]


def test_a_variant_says_whether_this_run_built_it(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMSERVE_CACHE", str(tmp_path))
    before = datetime.now(UTC).replace(microsecond=0)
    recipe = tmp_path / "quarter.toml"
    recipe.write_text(
        'summary = "no data, so soon done"\n[[steps]]\nstep = "prune"\nmlp_remove_frac = 0.25\nmethod = "magnitude"\n'
    )
    first = build(str(smollm2), smollm2, str(recipe), before)
    second = build(str(smollm2), smollm2, str(recipe), before + timedelta(hours=1))
    assert (first.build_reused, second.build_reused) == (False, True)
    assert first.directory == second.directory
    assert first.build_s == second.build_s
    assert first.build_s is not None
    assert first.build_s > 0
    assert first.num_parameters == 134_515_008 - 30 * 3 * 576 * 384


@pytest.mark.parametrize(
    ("recipes", "workloads", "message"),
    [
        (["w9"], ["reasoning"], "recipe: 'w9' is unknown"),
        (["dense"], ["chess"], "workload: 'chess' is unknown"),
        ([], ["reasoning"], "name nothing"),
        (["dense", "w8a8", "dense"], ["reasoning"], "recipes: 'dense' stands twice"),
    ],
)
def test_unknown_names_are_refused_before_any_work(
    tmp_path: Path, recipes: list[str], workloads: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compare("no-model-is-looked-for", recipes, workloads, TINY, tmp_path / "out")
    assert not (tmp_path / "out").exists()
