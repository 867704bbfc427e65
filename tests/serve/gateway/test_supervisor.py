"""Tests of the supervisor with a script in place of the engine; a file tells the script to crash or hang."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from prometheus_client import CollectorRegistry

from slimserve.core.errors import UserError
from slimserve.serve.gateway.supervisor import State, SupervisedEngine, SupervisorTimeouts, supervise
from slimserve.serve.gateway.upstream import fetch
from slimserve.serve.launch.plan import Choice, LaunchPlan
from slimserve.serve.launch.process import EngineSpec
from slimserve.serve.policy.metrics import GatewayMetrics
from tests.conftest import measures_time
from tests.serve.fake_engine import run, until

pytestmark = measures_time

ENGINE = """
import pathlib, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import os
order = lambda: pathlib.Path(os.environ["ENGINE_ORDER"]).read_text()
if order() == "die":
    sys.exit("ValueError: as ordered")
if order() == "never ready":
    time.sleep(600)
if order() == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        if order() == "silent":
            time.sleep(600)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
QUICK = SupervisorTimeouts(
    poll_s=0.02,
    ready_interval_s=0.02,
    health_interval_s=0.15,
    first_delay_s=0.1,
    longest_delay_s=0.3,
    max_failed_starts=3,
    stop_s=0.5,
    orphan_s=0.1,
)


@dataclass(frozen=True)
class Supervised:
    """One engine under supervision, the file that orders what it does, and the supervisor's messages."""

    engine: SupervisedEngine
    task: asyncio.Task[None]
    order_file: Path
    registry: CollectorRegistry
    messages: list[str]

    @property
    def process(self) -> psutil.Process:
        assert self.engine._process is not None
        return psutil.Process(self.engine._process.pid)

    def value(self, name: str) -> float | None:
        return self.registry.get_sample_value(name, {"variant": "a"})

    def delays(self) -> list[str]:
        return [line.rpartition(" in ")[2] for line in self.messages if "starting again" in line]

    async def until_ready(self) -> None:
        await until(lambda: self.engine.state is State.READY)


@asynccontextmanager
async def supervised(
    folder: Path, order: str = "serve", timeouts: SupervisorTimeouts = QUICK, name: str = "a"
) -> AsyncIterator[Supervised]:
    (folder / "engine.py").write_text(ENGINE)
    order_file = folder / f"{name}.order"
    order_file.write_text(order)
    plan = LaunchPlan(environment=(Choice("ENGINE_ORDER", str(order_file), "the test's order"),))
    command = (sys.executable, str(folder / "engine.py"))
    registry = CollectorRegistry()
    messages: list[str] = []
    spec = EngineSpec(folder, name, plan, folder / f"{name}.log", 0, command=command)
    engine = SupervisedEngine(spec, GatewayMetrics(registry), messages.append, timeouts)
    task = asyncio.create_task(engine.run())
    try:
        yield Supervised(engine, task, order_file, registry, messages)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def is_gone(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True


def test_an_engine_becomes_ready_and_is_counted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with supervised(tmp_path) as one:
            assert one.engine.state is State.STARTING
            assert one.value("slimserve_variant_up") == 0
            await one.until_ready()
            status, _ = await fetch(one.engine.backend, "/health")
            assert status == 200
            assert one.value("slimserve_variant_up") == 1
            assert 0 < (one.value("slimserve_ready_seconds") or 0) < 10
            assert one.value("slimserve_restarts_total") == 0
            process = one.process
        assert is_gone(process), "cancelling ends the process"
        assert one.value("slimserve_variant_up") == 0

    run(scenario())


def test_an_engine_cancelled_while_its_start_is_described_counts_as_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_described = threading.Event()

    def slow_description(*_: object) -> list[str]:
        is_described.wait(30)
        return []

    monkeypatch.setattr("slimserve.serve.gateway.supervisor.describe_start", slow_description)

    async def scenario() -> None:
        try:
            async with supervised(tmp_path) as one:
                await one.until_ready()
                process = one.process
            assert is_gone(process)
            assert one.value("slimserve_variant_up") == 0
        finally:
            is_described.set()

    run(scenario())


def test_a_killed_engine_is_restarted_on_another_port(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with supervised(tmp_path) as one:
            await one.until_ready()
            port = one.engine.backend.port
            one.process.kill()
            await until(lambda: one.engine.state is State.RESTARTING)
            assert one.value("slimserve_variant_up") == 0
            assert "exit status -9" in str(one.engine.describe()["problem"])
            assert 1 <= one.engine.retry_after_s() <= 60
            await one.until_ready()
            assert one.value("slimserve_restarts_total") == 1
            assert one.engine.backend.port != port
            assert "problem" not in one.engine.describe()
            assert (tmp_path / "a.previous.log").exists(), "the log of the killed engine is kept"
            assert any("starting again in 0.1 s" in line for line in one.messages)

    run(scenario())


def test_the_restart_delay_doubles_up_to_its_maximum_and_resets_after_healthy_time(tmp_path: Path) -> None:
    async def scenario(healthy_s: float, expected: list[str]) -> None:
        async with supervised(tmp_path, timeouts=replace(QUICK, healthy_s=healthy_s)) as one:
            for _ in expected:
                await one.until_ready()
                await asyncio.sleep(0.1)
                one.process.kill()
                await until(lambda: one.engine.state is State.RESTARTING)
            await until(lambda: len(one.delays()) == len(expected))
            assert one.delays() == expected

    run(scenario(60, ["0.1 s", "0.2 s", "0.3 s"]))
    run(scenario(0.05, ["0.1 s", "0.1 s", "0.1 s"]))


def test_an_engine_with_repeated_failed_starts_is_stopped_and_its_error_is_reported(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with supervised(tmp_path, "die") as one:
            await asyncio.wait_for(one.task, 10)
            assert one.engine.state is State.STOPPED
            assert one.value("slimserve_restarts_total") == 2
            assert "ValueError: as ordered" in one.messages[-1]
            assert "stopped after 3 failed starts, read" in one.messages[-1]
            assert one.engine.retry_after_s() == 60
            assert "ValueError: as ordered" in str(one.engine.describe()["problem"])

    run(scenario())


def test_a_successful_start_resets_the_count_of_failed_starts(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with supervised(tmp_path, "die") as one:
            for _ in range(2):
                one.order_file.write_text("die")
                await until(lambda: len(one.engine._failed_starts_s) == 2)
                one.order_file.write_text("serve")
                await one.until_ready()
                assert not one.engine._failed_starts_s
                one.order_file.write_text("die")
                one.process.kill()
            assert one.engine.state is not State.STOPPED

    run(scenario())


def test_an_engine_that_stops_answering_is_restarted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with supervised(tmp_path) as one:
            await one.until_ready()
            process = one.process
            one.order_file.write_text("silent")
            await until(lambda: one.engine.state is State.RESTARTING)
            assert "did not answer /health" in one.engine.problem
            one.order_file.write_text("serve")
            await one.until_ready()
            assert is_gone(process)

    run(scenario())


def test_an_engine_that_is_not_ready_in_time_is_ended(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with supervised(tmp_path, "never ready", replace(QUICK, ready_s=0.3)) as one:
            await until(lambda: bool(one.engine._failed_starts_s))
            assert "was not ready after" in one.engine.problem

    run(scenario())


def test_an_engine_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with supervised(tmp_path, "stubborn") as one:
            await one.until_ready()
            family = [one.process, *one.process.children(recursive=True)]
            assert len(family) == 2
            begin = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - begin < 3
        await until(lambda: all(map(is_gone, family)))

    run(scenario())


def test_children_of_a_killed_engine_do_not_outlive_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with supervised(tmp_path, "stubborn") as one:
            await one.until_ready()
            (child,) = one.process.children()
            os.kill(one.process.pid, signal.SIGKILL)
            await until(lambda: is_gone(child))
            await one.until_ready()

    run(scenario())


def test_a_crash_loop_does_not_affect_other_variants_and_the_server_ends_when_all_have_stopped(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with supervised(tmp_path, "die", name="bad") as bad, supervised(tmp_path, name="good") as good:
            bad.task.cancel()
            good.task.cancel()
            await asyncio.gather(bad.task, good.task, return_exceptions=True)
            both = asyncio.create_task(supervise([bad.engine, good.engine]))
            await until(lambda: bad.engine.state is State.STOPPED)
            await good.until_ready()
            assert not both.done()
            good.order_file.write_text("die")
            good.process.kill()
            with pytest.raises(
                UserError, match=r"'bad, good' all stopped \(bad exited .*; good exited .*read .*bad.log"
            ):
                await asyncio.wait_for(both, 10)

    run(scenario())
