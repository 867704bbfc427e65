"""Complete runs against faulty servers, and runs that a user interrupts: the results so far are reported."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from slimserve.core.openai_client import Target
from slimserve.loadtest.rows import read_rows
from slimserve.loadtest.run import run_suite
from slimserve.loadtest.settings import LoadSettings
from slimserve.loadtest.summary import load_summary
from slimserve.report.load import write_html
from slimserve.serve.launch.process import free_port
from tests.loadtest.faulty_server import ANSWERS, SENTENCES
from tests.loadtest.test_http_client import faulty_server

_SETTINGS = LoadSettings(
    rate="40",
    arrival="constant",
    duration_s=(2 * len(ANSWERS) - 0.5) / 40,
    warmup_s=0,
    cooldown_s=0,
    timeout_s=1.0,
    slos=("errors=1%",),
)


def test_each_fault_is_counted_under_its_own_name_and_none_ends_the_run(tmp_path: Path) -> None:
    with faulty_server() as port:
        target = Target(f"http://127.0.0.1:{port}", "in-turn")
        summary, rows = run_suite("reasoning", target, _SETTINGS, tmp_path, on_result=write_html)
    assert len(rows) == 2 * len(ANSWERS) == summary.num_requests
    assert summary.errors == Counter(2 * [error for _, error in ANSWERS.values() if error])
    assert {row.sent_s >= row.scheduled_s for row in rows} == {True}
    assert any("answers were not streamed" in warning for warning in summary.warnings)
    for model, sentence in SENTENCES.items():
        if model not in {"error-event", "web-page"}:  # another model has the same kind of failure
            assert summary.error_sentences[str(ANSWERS[model][1])] in {sentence, "out of memory", "welcome", "Sign in"}
    assert all(
        row.output_tokens == 2 for row in rows if row.error in {None, "closed in mid-stream", "connection reset"}
    )
    assert not summary.objectives[0].is_met
    document = json.loads((tmp_path / "reasoning.json").read_text())
    assert document["summary"]["errors"] == summary.errors
    page = (tmp_path / "reasoning.html").read_text()
    for error in summary.errors:
        assert error in page


def test_a_run_in_which_nothing_succeeded_fails_and_quotes_the_server(tmp_path: Path) -> None:
    with faulty_server() as port:
        command = [sys.executable, "-m", "slimserve", "loadtest", "reasoning", "--url", f"http://127.0.0.1:{port}"]
        command += ["--model", "http-400", "--rate", "20", "--duration", "1s", "--warmup", "0", "--cooldown", "0"]
        done = subprocess.run([*command, "-o", str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    output = " ".join(done.stdout.split())
    assert re.search(r"INVALID: no request succeeded: \d+ × http 400: max_tokens is too large: 4096", output)
    assert "reason of http 400 max_tokens is too large: 4096" in output
    assert "max_tokens is too large: 4096" in (tmp_path / "reasoning.html").read_text()


def test_a_self_signed_certificate_is_counted_as_an_error(tmp_path: Path) -> None:
    with faulty_server("--self-signed", str(tmp_path / "own.pem")) as port:
        target = Target(f"https://127.0.0.1:{port}", "good")
        summary, _ = run_suite("reasoning", target, _SETTINGS, tmp_path / "run")
    assert summary.errors == {"tls failed": summary.num_requests}


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_writes_a_report_of_the_results_so_far(tmp_path: Path, processes: int) -> None:
    with faulty_server() as port:
        command = [sys.executable, "-m", "slimserve", "loadtest", "reasoning", "--url", f"http://127.0.0.1:{port}"]
        command += [
            "--model",
            "good",
            "--rate",
            "20",
            "--duration",
            "10m",
            "--warmup",
            "0",
            "--processes",
            str(processes),
        ]
        run = subprocess.Popen([*command, "-o", str(tmp_path)], stderr=subprocess.PIPE, start_new_session=True)
        rows_file = tmp_path / "reasoning.rows.jsonl"
        try:
            deadline = time.monotonic() + 60
            while not (rows_file.exists() and len(read_rows(rows_file)) >= 20):
                assert run.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            offspring = psutil.Process(run.pid).children(recursive=True)
            assert offspring
            os.killpg(run.pid, signal.SIGINT)  # like Ctrl-C in a terminal
            _, stderr = run.communicate(timeout=30)
        finally:
            run.kill()
            run.wait()
    assert run.returncode == 130, stderr.decode()
    assert "Traceback" not in stderr.decode()
    assert not [process for process in offspring if process.is_running()]
    rows = read_rows(rows_file)
    document = json.loads((tmp_path / "reasoning.json").read_text())
    summary = load_summary(document["summary"])
    assert 15 <= summary.num_requests <= len(rows)
    assert summary.errors == {}
    assert summary.window_s < 60, "rates refer to the measured time"
    assert summary.requests_per_s == pytest.approx(20, rel=0.5)
    assert any(reason.startswith("interrupted") for reason in summary.invalid)
    assert "interrupted" in (tmp_path / "reasoning.html").read_text()


def test_a_wrong_url_and_a_wrong_model_are_reported_before_the_load(tmp_path: Path) -> None:
    with faulty_server() as port:
        url = f"http://127.0.0.1:{port}"
        for options, message in (
            (["--url", f"http://127.0.0.1:{free_port()}"], "does not answer"),
            (["--url", url.replace("http", "https"), "--model", "good"], "does not answer"),
            (["--url", url, "--model", "unknown"], "is not served"),
        ):
            command = [sys.executable, "-m", "slimserve", "loadtest", "reasoning", "--rate", "5", *options]
            done = subprocess.run([*command, "-o", str(tmp_path)], capture_output=True, text=True, timeout=60)
            assert done.returncode == 2
            assert message in done.stderr
            assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
