import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from slimserve.core.errors import UserError
from slimserve.core.openai_client import Target
from slimserve.loadtest.run import Cluster, run_suite
from slimserve.loadtest.settings import LoadSettings, SuiteOptions
from slimserve.serve.launch.process import free_port
from tests.fake_server import CHUNKS, GAP_S, SCORE_S, TTFT_S

_E2E_S = TTFT_S + GAP_S * (len(CHUNKS) - 1)
_SUITES = Path(__file__).parents[2] / "loadtest" / "suites"


def test_an_open_loop_reports_the_latency_of_the_server(fake_url: str, tmp_path: Path) -> None:
    settings = LoadSettings(
        rate="12", duration_s=4, warmup_s=1, cooldown_s=0.5, slos=("ttft_p50=500ms", "e2e_p99=1ms"), price_per_hour=3.6
    )
    documents = []
    summary, rows = run_suite(
        "reasoning",
        Target(fake_url, "good"),
        settings,
        tmp_path,
        on_result=lambda document, rows, folder: documents.append(document),
    )
    assert summary.errors == {}
    assert summary.e2e_s.p50 == pytest.approx(_E2E_S, abs=0.025)
    assert summary.ttft_s.p50 == pytest.approx(TTFT_S, abs=0.020)
    assert summary.itl_s.p50 == pytest.approx(GAP_S, abs=0.005)
    assert [row.scheduled_s for row in rows] != [row.sent_s for row in rows]
    assert sorted(row.scheduled_s for row in rows) == pytest.approx(settings.scheduled_s()), "every arrival was sent"
    assert len({row.prompt for row in rows}) == len(rows)
    assert [outcome.is_met for outcome in summary.objectives] == [True, False]
    assert summary.goodput_per_s == 0
    assert summary.num_correct == 0
    assert summary.costs["per_million_output_tokens"] == pytest.approx(1e3 / summary.output_tokens_per_s)
    document = json.loads((tmp_path / "reasoning.json").read_text())
    assert document["summary"]["e2e_s"]["n"] == summary.e2e_s.n
    assert document["settings"]["rate"] == "12"
    assert document["versions"]["locust"]
    assert documents == [document]


def test_a_closed_loop_waits_for_its_answers(fake_url: str, tmp_path: Path) -> None:
    settings = LoadSettings(users=2, duration_s=3, warmup_s=1, cooldown_s=0)
    summary, rows = run_suite("recommendation", Target(fake_url, "good"), settings, tmp_path)
    assert summary.e2e_s.p50 == pytest.approx(SCORE_S, abs=0.015)
    assert summary.items_per_s == pytest.approx(2 * 16 / SCORE_S, rel=0.3)
    assert summary.ttft_s.n == 0
    assert summary.quality["auc"].value == 0.5, "every score is the same"
    assert set(rows[0].scores) == {0.25}
    assert len(rows) > summary.num_requests, "the warm-up's rows are kept but not counted"


def test_a_mixed_run_has_a_summary_of_each_kind(fake_url: str, tmp_path: Path) -> None:
    settings = LoadSettings(rate="20", duration_s=3, warmup_s=0, suite=SuiteOptions(share=0.4))
    summary, _ = run_suite("mixed", Target(fake_url, "good"), settings, tmp_path)
    scoring, chats = summary.by_kind["recommendation"], summary.by_kind["reasoning"]
    assert scoring.num_requests + chats.num_requests == summary.num_requests
    assert scoring.e2e_s.p50 == pytest.approx(SCORE_S, abs=0.025)
    assert chats.ttft_s.n == chats.num_requests
    assert scoring.quality
    assert chats.num_correct == 0


def test_an_objective_that_failures_miss_is_in_the_table_of_its_kind(fake_url: str, tmp_path: Path) -> None:
    slos = ("ttft_p99=1s", "itl_p50=1s", "e2e_p99=1s", "errors=1%")
    settings = LoadSettings(rate="20", duration_s=2, warmup_s=0, cooldown_s=0, slos=slos)
    summary, _ = run_suite("mixed", Target(fake_url, "http-500"), settings, tmp_path)
    tables = {kind: [(one.text, one.is_met) for one in part.objectives] for kind, part in summary.by_kind.items()}
    assert tables["reasoning"] == [(text, False) for text in slos]
    assert tables["recommendation"] == [(text, False) for text in slos[2:]], "scoring requests have no tokens to time"


def test_failures_are_counted_and_cause_no_busy_loop(fake_url: str, tmp_path: Path) -> None:
    settings = LoadSettings(users=1, duration_s=3, warmup_s=0, cooldown_s=0, slos=("errors=1%",))
    summary, _ = run_suite("reasoning", Target(fake_url, "http-500"), settings, tmp_path)
    assert set(summary.errors) == {"http 500"}
    assert 3 <= summary.errors["http 500"] <= 8
    assert summary.e2e_s.p50 is None
    assert not summary.objectives[0].is_met


@pytest.mark.parametrize("count", ["processes", "workers"])
def test_workers_share_one_schedule_and_all_their_rows_are_collected(fake_url: str, tmp_path: Path, count: str) -> None:
    settings = LoadSettings(rate="20", duration_s=3, warmup_s=1, cooldown_s=0)
    workers = []
    cluster = None
    if count == "processes":
        settings = settings.model_copy(update={"processes": 2})
    else:
        cluster = Cluster(2, bind_port=free_port())
        command = [sys.executable, "-m", "locust", "-f", str(_SUITES / "reasoning.py"), "--worker"]
        command += ["--master-port", str(cluster.bind_port)]
        workers = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
    try:
        summary, rows = run_suite("reasoning", Target(fake_url, "good"), settings, tmp_path, cluster=cluster)
        for worker in workers:
            assert worker.wait(timeout=20) == 0
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert sorted(row.scheduled_s for row in rows) == pytest.approx(settings.scheduled_s())
    assert len({row.prompt for row in rows}) == len(rows)
    assert summary.errors == {}
    assert summary.client.num_processes == 2
    assert summary.ttft_s.p50 == pytest.approx(TTFT_S, abs=0.020)


def test_the_death_of_a_worker_makes_the_run_invalid_and_the_run_still_ends(fake_url: str, tmp_path: Path) -> None:
    settings = LoadSettings(rate="20", duration_s=8, warmup_s=0, cooldown_s=0)
    cluster = Cluster(2, bind_port=free_port())
    command = [sys.executable, "-m", "locust", "-f", str(_SUITES / "reasoning.py"), "--worker"]
    command += ["--master-port", str(cluster.bind_port)]
    workers = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
    rows_file, is_over = tmp_path / "reasoning.rows.jsonl", threading.Event()

    def kill_one_under_load() -> None:
        while not is_over.wait(0.1):
            if rows_file.exists() and rows_file.stat().st_size:
                workers[0].kill()
                return

    killer = threading.Thread(target=kill_one_under_load)
    killer.start()
    try:
        summary, rows = run_suite("reasoning", Target(fake_url, "good"), settings, tmp_path, cluster=cluster)
    finally:
        is_over.set()
        killer.join()
        for worker in workers:
            worker.kill()
            worker.wait()
    assert any("a worker was lost" in reason for reason in summary.invalid)
    assert len(settings.scheduled_s()) / 2 - 2 <= len(rows) < len(settings.scheduled_s())


def test_a_locustfile_reports_a_missing_option_in_one_line(fake_url: str) -> None:
    command = [sys.executable, "-m", "locust", "-f", str(_SUITES / "reasoning.py"), "--headless", "--rate", "4"]
    done = subprocess.run([*command, "--host", fake_url, "--model", "good"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--load-seconds: '' is missing; give the length of the open loop" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("field", "value"), [("users", 0), ("duration_s", 0), ("warmup_s", -1), ("processes", 0)])
def test_numbers_out_of_range_are_rejected(field: str, value: int) -> None:
    with pytest.raises(ValidationError, match=field):
        LoadSettings.model_validate({field: value})


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (LoadSettings(rate="0"), "--rate"),
        (LoadSettings(rate="5", trace="t"), "--trace"),
        (LoadSettings(slos=("ttft=5",)), "--slo"),
        (LoadSettings(suite=SuiteOptions(candidates="9..3")), "--candidates"),
    ],
)
def test_settings_that_describe_no_load_are_rejected(settings: LoadSettings, field: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{field}"):
        run_suite("reasoning", Target("http://127.0.0.1:1", "m"), settings, tmp_path)


@pytest.mark.parametrize(
    ("suite", "options", "request_types"),
    [
        ("reasoning", ["--rate", "4", "--load-seconds", "3"], ("TTFT", "ITL", "POST")),
        ("recommendation", ["--users", "2", "--run-time", "8s"], ("POST",)),
    ],
)
def test_a_suite_is_a_plain_locustfile_with_token_statistics(
    fake_url: str, suite: str, options: list[str], request_types: tuple[str, ...]
) -> None:
    command = [sys.executable, "-m", "locust", "-f", str(_SUITES / f"{suite}.py"), "--headless", "--only-summary"]
    done = subprocess.run(
        [*command, "--host", fake_url, "--model", "good", *options], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for kind in request_types:
        assert re.search(rf"^{kind} +/", done.stderr, flags=re.MULTILINE), done.stderr


def test_the_exit_code_says_whether_the_objectives_were_met(
    fake_url: str, tmp_path: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    options = ["--url", fake_url, "--model", "good", "--rate", "5", "--duration", "2s", "--warmup", "0"]
    done = run_cli("loadtest", "reasoning", *options, "--slo", "ttft_p99=1ms", "-o", str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "ttft_p99=1ms" in done.stdout
    assert (tmp_path / "reasoning.rows.jsonl").exists()


def test_every_request_to_a_closed_port_is_an_error(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        settings = LoadSettings(rate="10", duration_s=1, warmup_s=0, cooldown_s=0)
        summary, _ = run_suite("reasoning", Target(url, "m"), settings, tmp_path)
    assert set(summary.errors) == {"connection refused"}
