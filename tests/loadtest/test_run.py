import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from contracts.errors import UserError
from loadtest.run import LoadSettings, run_suite
from loadtest.target import Target
from tests.fake_server import CHUNKS, GAP_S, SCORE_S, TTFT_S

_E2E_S = TTFT_S + GAP_S * (len(CHUNKS) - 1)


def test_locust_reports_the_latency_that_the_server_has(fake_url: str, tmp_path: Path) -> None:
    settings = LoadSettings(users=3, duration_s=4, warmup_s=1)
    summary, rows = run_suite("reasoning", Target(fake_url, "good"), settings, tmp_path)
    assert summary.errors == {}
    assert summary.e2e_s.p50 == pytest.approx(_E2E_S, abs=0.025)
    assert summary.ttft_s.p50 == pytest.approx(TTFT_S, abs=0.020)
    assert summary.itl_s.p50 == pytest.approx(GAP_S, abs=0.005)
    assert summary.output_tokens_per_s == pytest.approx(3 * sum(CHUNKS) / _E2E_S, rel=0.2)
    assert len(rows) > summary.num_requests, "the warm-up's rows are kept but not counted"
    document = json.loads((tmp_path / "reasoning.json").read_text())
    assert document["summary"]["e2e_s"]["n"] == summary.e2e_s.n
    assert document["settings"]["users"] == 3
    assert document["versions"]["locust"]


def test_locust_counts_items(fake_url: str, tmp_path: Path) -> None:
    settings = LoadSettings(users=2, duration_s=3, warmup_s=1)
    summary, _ = run_suite("recommendation", Target(fake_url, "good"), settings, tmp_path)
    assert summary.e2e_s.p50 == pytest.approx(SCORE_S, abs=0.015)
    assert summary.items_per_s == pytest.approx(2 * 16 / SCORE_S, rel=0.3)
    assert summary.ttft_s.n == 0


def test_failures_are_counted_and_do_not_spin(fake_url: str, tmp_path: Path) -> None:
    settings = LoadSettings(users=1, duration_s=3, warmup_s=0)
    summary, _ = run_suite("reasoning", Target(fake_url, "http-500"), settings, tmp_path)
    assert set(summary.errors) == {"http 500"}
    assert 3 <= summary.errors["http 500"] <= 8
    assert summary.e2e_s.p50 is None


@pytest.mark.parametrize("settings", [LoadSettings(users=0), LoadSettings(duration_s=0), LoadSettings(warmup_s=-1)])
def test_settings_that_make_no_load_are_refused(settings: LoadSettings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make no load"):
        run_suite("reasoning", Target("http://127.0.0.1:1", "m"), settings, tmp_path)


@pytest.mark.parametrize(("suite", "shown"), [("reasoning", ("TTFT", "ITL", "POST")), ("recommendation", ("POST",))])
def test_a_suite_is_a_plain_locustfile_with_token_statistics(fake_url: str, suite: str, shown: tuple[str, ...]) -> None:
    locustfile = Path(__file__).parents[2] / "loadtest" / "suites" / f"{suite}.py"
    options = [
        "--host",
        fake_url,
        "--model",
        "good",
        "--users",
        "2",
        "--run-time",
        "3s",
        "--headless",
        "--only-summary",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "locust", "-f", str(locustfile), *options], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for kind in shown:
        assert re.search(rf"^{kind} +/", done.stderr, flags=re.MULTILINE), done.stderr


def test_the_command_prints_a_table(
    fake_url: str, tmp_path: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    options = ["--url", fake_url, "--model", "good", "--users", "1", "--duration", "2", "--warmup", "0"]
    done = run_cli("loadtest", "reasoning", *options, "-o", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "between tokens, ms" in done.stdout
    assert (tmp_path / "reasoning.rows.jsonl").exists()
