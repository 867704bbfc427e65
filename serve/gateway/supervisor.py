"""Supervision of one engine process per variant: start, health checks, restarts, and an end to crash loops.

All engines start at once, so that their imports overlap. An engine that exits, or does not answer /health, is ended
with all its processes and started again after 1 s, 2 s, 4 s … 30 s. A minute of health resets this delay. An engine
that exits five times within five minutes without becoming ready stays stopped and reports the reason.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slimserve.core.errors import UserError
from slimserve.serve.gateway.upstream import Backend, fetch
from slimserve.serve.launch.process import EngineProcess, EngineSpec, exit_reason, free_port
from slimserve.serve.launch.roofline import describe_start
from slimserve.serve.policy.metrics import GatewayMetrics


@dataclass(frozen=True)
class SupervisorTimeouts:
    """Intervals and time limits of the supervisor, in seconds."""

    poll_s: float = 0.1
    """Interval between two checks of whether the process still runs."""
    ready_interval_s: float = 0.25
    """Interval between two health checks of an engine that is starting."""
    ready_s: float = 1800.0
    """Longest time from the start of the process until the engine is ready."""
    health_interval_s: float = 10.0
    """Interval between two health checks of a ready engine, and the time limit of each."""
    max_failed_checks: int = 3
    """Number of failed health checks in a row after which the engine is restarted."""
    first_delay_s: float = 1.0
    longest_delay_s: float = 30.0
    healthy_s: float = 60.0
    """Time of being ready after which the restart delay is reset."""
    max_failed_starts: int = 5
    """Number of failed starts within `crash_window_s` after which the variant stays stopped."""
    crash_window_s: float = 300.0
    stop_s: float = 20.0
    """Time between SIGTERM and SIGKILL."""
    orphan_s: float = 1.0
    """Time between SIGTERM and SIGKILL for the child processes of a server that has exited."""


class State(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    """The engine has exited and waits for its next start, or is starting again."""
    STOPPED = "stopped"


class SupervisedEngine:
    """The engine of one variant, across all its restarts."""

    def __init__(
        self,
        spec: EngineSpec,
        metrics: GatewayMetrics,
        print_status: Callable[[str], object],
        timeouts: SupervisorTimeouts | None = None,
    ) -> None:
        self.spec = spec
        self.state = State.STARTING
        self.backend = Backend(spec.host, spec.port)
        self.ready_s: float | None = None
        """Seconds from start to ready, of the last start."""
        self.problem = ""
        """Reason of the last exit."""
        self.num_restarts = 0
        self._metrics = metrics
        self._print_status = print_status
        self._timeouts = timeouts or SupervisorTimeouts()
        self._process: EngineProcess | None = None
        self._start_s = 0.0
        self._num_restarts_in_a_row = 0
        self._failed_starts_s: deque[float] = deque(maxlen=self._timeouts.max_failed_starts)
        """Times of the last failed starts, on the event loop's clock."""
        self._next_start_s = 0.0
        self._metrics.up.labels(spec.name).set(0)
        self._metrics.restarts.labels(spec.name)

    async def run(self) -> None:
        """Keep the engine running; return once it stays stopped. Cancelling this ends its processes."""
        loop = asyncio.get_running_loop()
        try:
            while self.state is not State.STOPPED:
                self._start(loop.time())
                self.problem = await self._wait_until_exit()
                self.state = State.RESTARTING
                await self._end()
                await self._prepare_restart(loop.time())
        finally:
            await asyncio.shield(self._end())

    def retry_after_s(self) -> int:
        """Return the seconds after which a client may try again, from 1 to 60."""
        if self.state is State.STOPPED:
            return 60
        usual_s = self.ready_s or 10.0
        now = asyncio.get_running_loop().time()
        return max(1, min(60, math.ceil(max(self._next_start_s, self._start_s) + usual_s - now)))

    def describe(self) -> dict[str, object]:
        """Return the state of the engine for /ready and /health."""
        facts: dict[str, object] = {"state": self.state.value, "restarts": self.num_restarts}
        if self.ready_s is not None:
            facts["ready_s"] = round(self.ready_s, 1)
        if self.problem and self.state is not State.READY:
            facts["problem"] = self.problem
        return facts

    def _start(self, now: float) -> None:
        spec = dataclasses.replace(self.spec, port=free_port())
        if spec.log.exists():
            spec.log.replace(spec.log.with_suffix(".previous.log"))
        self.backend = Backend(spec.host, spec.port)
        self._process = EngineProcess(spec)
        self._start_s = now

    async def _wait_until_exit(self) -> str:
        """Wait until the engine is ready and then until it exits or fails; return the reason."""
        assert self._process is not None
        loop, timeouts = asyncio.get_running_loop(), self._timeouts
        while not await self._is_healthy(timeouts.health_interval_s):
            if (status := self._process.poll()) is not None:
                self._failed_starts_s.append(loop.time())
                return f"exited before it was ready ({exit_reason(self.spec.log, status)})"
            if loop.time() - self._start_s > timeouts.ready_s:
                self._failed_starts_s.append(loop.time())
                return f"was not ready after {timeouts.ready_s:.0f} s"
            await asyncio.sleep(timeouts.ready_interval_s)
        self.ready_s = loop.time() - self._start_s
        self.state = State.READY
        self._failed_starts_s.clear()
        self._metrics.up.labels(self.spec.name).set(1)
        self._metrics.ready_s.labels(self.spec.name).set(self.ready_s)
        ready_at = loop.time()
        watch = asyncio.create_task(self._watch_health())
        try:
            self._print_status(f"{self.spec.name}: ready in {self.ready_s:.1f} s")
            for line in await asyncio.to_thread(describe_start, self.spec.directory, self.spec.log):
                self._print_status(f"{self.spec.name}: {line}")
            while (status := self._process.poll()) is None and not watch.done():
                await asyncio.sleep(timeouts.poll_s)
        finally:
            watch.cancel()
            self._metrics.up.labels(self.spec.name).set(0)
        if loop.time() - ready_at > timeouts.healthy_s:
            self._num_restarts_in_a_row = 0
        if status is None:
            return f"did not answer /health for {timeouts.max_failed_checks * timeouts.health_interval_s:.0f} s"
        return f"exited by itself ({exit_reason(self.spec.log, status)})"

    async def _watch_health(self) -> None:
        """Return once the engine has failed too many health checks in a row."""
        num_failed = 0
        while num_failed < self._timeouts.max_failed_checks:
            await asyncio.sleep(self._timeouts.health_interval_s)
            num_failed = 0 if await self._is_healthy(self._timeouts.health_interval_s) else num_failed + 1

    async def _is_healthy(self, timeout_s: float) -> bool:
        try:
            status, _ = await fetch(self.backend, "/health", timeout_s=timeout_s)
        except OSError:
            return False
        return status == 200

    async def _prepare_restart(self, now: float) -> None:
        """Wait for the restart delay, or set the state to stopped after too many failed starts."""
        name, timeouts = self.spec.name, self._timeouts
        is_crash_loop = (
            len(self._failed_starts_s) == timeouts.max_failed_starts
            and now - self._failed_starts_s[0] < timeouts.crash_window_s
        )
        if is_crash_loop:
            self.state = State.STOPPED
            self._print_status(
                f"{name}: {self.problem}; stopped after {timeouts.max_failed_starts} failed starts, "
                f"read {self.spec.log}"
            )
            return
        delay_s = min(timeouts.longest_delay_s, timeouts.first_delay_s * 2**self._num_restarts_in_a_row)
        self._num_restarts_in_a_row += 1
        self._next_start_s = now + delay_s
        self._print_status(f"{name}: {self.problem}; starting again in {delay_s:g} s")
        await asyncio.sleep(delay_s)
        self.num_restarts += 1
        self._metrics.restarts.labels(name).inc()

    async def _end(self) -> None:
        """End every process of the engine by SIGTERM, then SIGKILL."""
        process = self._process
        if process is None:
            return
        self.backend.close()
        loop, timeouts = asyncio.get_running_loop(), self._timeouts
        try:
            deadline = loop.time() + (timeouts.stop_s if process.poll() is None else timeouts.orphan_s)
            process.terminate()
            while loop.time() < deadline and not process.is_gone():
                await asyncio.sleep(timeouts.poll_s)
        finally:
            process.kill()
            self._process = None


async def supervise(engines: Sequence[SupervisedEngine]) -> None:
    """Run all engines until each of them stays stopped, then raise UserError. Cancelling this ends them."""
    async with asyncio.TaskGroup() as group:
        for engine in engines:
            group.create_task(engine.run())
    reasons = "; ".join(f"{engine.spec.name} {engine.problem}" for engine in engines)
    logs = ", ".join(str(engine.spec.log) for engine in engines)
    names = ", ".join(engine.spec.name for engine in engines)
    raise UserError("variants", names, f"all stopped ({reasons})", f"read {logs}")
