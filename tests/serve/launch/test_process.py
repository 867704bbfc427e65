"""Tests of starting and stopping an engine, with a fake server in place of vLLM."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from slimserve.core.errors import UserError
from slimserve.serve.launch import process as module
from slimserve.serve.launch.plan import LaunchPlan
from slimserve.serve.launch.process import STOCK_COMMAND, Engine, EngineSpec, answers, check_port_is_free, free_port
from tests.conftest import FAKE_SERVER


def fake_spec(directory: Path, port: int | None = None) -> EngineSpec:
    command = (sys.executable, str(FAKE_SERVER))
    return EngineSpec(directory, "good", LaunchPlan(), directory / "engine.log", port or free_port(), command=command)


def test_an_engine_is_ready_when_it_answers_and_ends_with_its_context(tmp_path: Path) -> None:
    with Engine(fake_spec(tmp_path)) as engine:
        assert answers(f"{engine.spec.url}/health")
        assert 0 < engine.ready_s < 30
        own = psutil.Process(engine.pid).memory_info().rss
        assert 0.8 * own <= engine.peak_rss_bytes() <= 3 * own
    assert not psutil.pid_exists(engine.pid)
    assert engine.peak_rss_bytes() > 0, "the peak is still known after the engine has ended"


def test_a_child_process_that_the_server_leaves_behind_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CHILD", "1")
    with Engine(fake_spec(tmp_path)) as engine:
        child = int(engine.spec.log.read_text().split()[1])
        assert psutil.pid_exists(child)
        monkeypatch.setattr(module, "_STOP_TIMEOUT_S", 1.0)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_server_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STUBBORN", "1")
    monkeypatch.setattr(module, "_STOP_TIMEOUT_S", 1.0)
    with Engine(fake_spec(tmp_path)) as engine:
        start = time.monotonic()
    assert time.monotonic() - start < 5
    assert not psutil.pid_exists(engine.pid)


def test_a_server_that_dies_at_start_is_reported_with_its_cause_and_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DIES", "1")
    with pytest.raises(UserError, match=r"exit status 3: ValueError: the head size is odd\); read .*engine.log"):
        Engine(fake_spec(tmp_path)).__enter__()


def test_an_interrupt_while_starting_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(url: str) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "answers", interrupt)
    engine = Engine(fake_spec(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        engine.__enter__()
    assert not psutil.pid_exists(engine.pid)


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as owner:
        owner.bind(("127.0.0.1", 0))
        owner.listen()
        port = owner.getsockname()[1]
        with pytest.raises(UserError, match=f"port: '127.0.0.1:{port}' cannot be listened on .*another --port"):
            Engine(fake_spec(tmp_path, port)).__enter__()
    check_port_is_free("127.0.0.1", port)


def test_the_engine_process_ends_when_its_parent_is_killed() -> None:
    child = "import slimserve.core.parent_death, time; slimserve.core.parent_death.die_with_parent(); time.sleep(600)"
    starter = (
        f"import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        "print(child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(2)
    assert psutil.pid_exists(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_environment_of_the_plan_reaches_the_engine(tmp_path: Path) -> None:
    assert "FAKE_DIES" not in os.environ
    from slimserve.serve.launch.plan import Choice

    plan = LaunchPlan(environment=(Choice("FAKE_DIES", "1", "for the test"),))
    spec = fake_spec(tmp_path)
    with pytest.raises(UserError, match="exit status 3"):
        Engine(EngineSpec(tmp_path, "good", plan, spec.log, spec.port, command=spec.command)).__enter__()


def test_our_server_gets_the_path_of_its_log_and_stock_vllm_does_not(tmp_path: Path) -> None:
    ours = EngineSpec(tmp_path, "good", LaunchPlan(), tmp_path / "engine.log", free_port())
    assert ours.environment()["SLIMSERVE_ENGINE_LOG"] == str(tmp_path / "engine.log")
    stock = EngineSpec(tmp_path, "good", LaunchPlan(), tmp_path / "engine.log", free_port(), command=STOCK_COMMAND)
    assert "SLIMSERVE_ENGINE_LOG" not in stock.environment()
