"""A comparison on a real engine, from build to report, and the state that an interruption leaves behind."""

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

from slimserve.compare.backend import Backend
from slimserve.compare.results import Preset
from slimserve.compare.run import compare
from slimserve.compare.settings import CompareSettings
from slimserve.core.errors import UserError
from slimserve.report.comparison import reported
from tests.conftest import SMOLLM2

TINY = Preset(
    {"recommendation": 4, "reasoning": 6},
    {"recommendation": 1, "reasoning": 2},
    duration_s=20.0,  # two streams of a CPU with AVX2 alone take 15 s for an answer
    warmup_s=1.0,
    cooldown_s=0.0,
    num_rounds=1,
    num_texts=1,
    text_tokens=64,
    rates={"recommendation": (0.3,)},  # a CPU with AVX2 alone has a capacity of 0.35 requests/s
    rate_fracs=(),
)


def rounded_recipe(folder: Path, quantization_format: str) -> str:
    """A recipe of the format's name that rounds to nearest: without calibration a build takes seconds on any CPU."""
    file = folder / f"{quantization_format}.toml"
    file.write_text(
        f'summary = "rounded"\n[[steps]]\nstep = "quantize"\nformat = "{quantization_format}"\nmethod = "rtn"\n'
    )
    return str(file)


@pytest.mark.engine
def test_a_variant_is_built_served_evaluated_loaded_and_reported(tmp_path: Path) -> None:
    with reported(tmp_path):
        compare(SMOLLM2, CompareSettings(recipes=(rounded_recipe(tmp_path, "w8a8"),)), tmp_path, preset=TINY)
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
    for metric in ("ttft_s", "itl_s", "e2e_s"):
        assert 0 < reasoning[metric]["p50"] <= reasoning[metric]["p90"] <= reasoning[metric]["p99"]
    assert 0 < recommendation["server"]["prefix_cache_hit_frac"] < 1
    assert variant["bottlenecks"]["recommendation"]["limited_by"] == "prefill"
    assert variant["costs"]["reasoning"]["per_million_output_tokens"]["median"] > 0
    loaded = [run["rate_rps"] for run in one["at_rate"].get("recommendation", [])]
    assert loaded + one["overloaded"].get("recommendation", []) == [0.3], "loaded, or far above a slow CPU's capacity"
    assert document["verdict"]["decisions"][0]["ruling"] == "keeps"
    assert set(document["verdict"]["uninformative"]) <= {"recommendation", "reasoning"}, "so few prompts may not tell"
    assert "<svg" in (tmp_path / "report.html").read_text()


@pytest.mark.engine
def test_an_interrupt_leaves_no_process_and_no_half_variant(tmp_path: Path) -> None:
    environment = os.environ | {"SLIMSERVE_CACHE": str(tmp_path / "cache"), "COLUMNS": "200"}
    command = [
        sys.executable,
        "-m",
        "slimserve",
        "compare",
        "--model",
        SMOLLM2,
        "--recipes",
        rounded_recipe(tmp_path, "fp8"),
        "--quick",
    ]
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
    first = Backend(str(smollm2), ["reasoning"]).build(str(recipe), smollm2, before)
    second = Backend(str(smollm2), ["reasoning"]).build(str(recipe), smollm2, before + timedelta(hours=1))
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
        ([], ["reasoning"], "are empty"),
        (["dense", "w8a8", "dense"], ["reasoning"], "variants: 'dense' is named twice"),
    ],
)
def test_unknown_names_are_refused_before_any_work(
    tmp_path: Path, recipes: list[str], workloads: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        settings = CompareSettings(recipes=tuple(recipes), workloads=tuple(workloads))
        compare("no-model-is-looked-for", settings, tmp_path / "out", preset=TINY)
    assert not (tmp_path / "out").exists()
