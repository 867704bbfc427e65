"""Keeps one engine process per variant running: starts them side by side, watches, restarts, gives up on a crash loop.

All start at once, so their imports overlap. An engine that ends, or whose /health stays silent, is ended with all its
processes and started again after 1 s, 2 s, 4 s … 30 s; a minute of health starts the count anew. One that ended five
times within five minutes without becoming ready in between stays stopped, and says why.
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
from slimserve.serve.launch.process import EngineProcess, EngineSpec, free_port, last_error
from slimserve.serve.launch.roofline import describe_start
from slimserve.serve.policy.metrics import GatewayMetrics


@dataclass(frozen=True)
class SupervisorTimeouts:
    """How long the supervisor waits for what, in seconds."""

    poll_s: float = 0.1
    """Between two looks at a process."""
    ask_ready_s: float = 0.25
    """Between two questions to an engine that is starting."""
    ready_s: float = 1800.0
    """Longest start."""
    ask_health_s: float = 10.0
    """Between two questions to an engine that is ready; also the time for its answer."""
    num_silent: int = 3
    """Questions without a good answer, one after the other, before the engine counts as dead."""
    first_delay_s: float = 1.0
    longest_delay_s: float = 30.0
    healthy_s: float = 60.0
    """Of being ready, after which the next death is a first one again."""
    num_deaths: int = 5
    """Without becoming ready, within `crash_window_s`, that stop the variant for good."""
    crash_window_s: float = 300.0
    stop_s: float = 20.0
    """From SIGTERM to SIGKILL."""
    orphan_s: float = 1.0
    """The same, for what a dead server left behind."""


class State(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    """It has ended and is waiting for its next start, or starting."""
    STOPPED = "stopped"


class SupervisedEngine:
    """The engine of one variant over all its restarts."""

    def __init__(
        self,
        spec: EngineSpec,
        metrics: GatewayMetrics,
        print_status: Callable[[str], object],
        patience: SupervisorTimeouts | None = None,
    ) -> None:
        self.spec = spec
        self.state = State.STARTING
        self.backend = Backend(spec.host, spec.port)
        self.ready_s: float | None = None
        """Seconds that the last start took."""
        self.problem = ""
        """Why it ended last."""
        self.num_restarts = 0
        self._metrics = metrics
        self._say = print_status
        self._patience = patience or SupervisorTimeouts()
        self._process: EngineProcess | None = None
        self._start_s = 0.0
        self._num_short_lives = 0
        self._deaths_s: deque[float] = deque(maxlen=self._patience.num_deaths)
        """When it last ended before it was ready."""
        self._next_start_s = 0.0
        self._metrics.up.labels(spec.name).set(0)
        self._metrics.restarts.labels(spec.name)

    async def run(self) -> None:
        """Keep it running; returns only when it is given up, and ends its processes when cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while self.state is not State.STOPPED:
                self._start(loop.time())
                self.problem = await self._live()
                self.state = State.RESTARTING
                await self._end()
                await self._prepare_restart(loop.time())
        finally:
            await asyncio.shield(self._end())

    def retry_after_s(self) -> int:
        """Whole seconds after which a client may try again."""
        if self.state is State.STOPPED:
            return 60
        usual_s = self.ready_s or 10.0
        now = asyncio.get_running_loop().time()
        return max(1, min(60, math.ceil(max(self._next_start_s, self._start_s) + usual_s - now)))

    def describe(self) -> dict[str, object]:
        """For /ready and /health."""
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

    async def _live(self) -> str:
        """Wait until the engine is ready and then until it ends; returns why it did."""
        assert self._process is not None
        loop, patience = asyncio.get_running_loop(), self._patience
        while not await self._is_healthy(patience.ask_health_s):
            if (status := self._process.poll()) is not None:
                self._deaths_s.append(loop.time())
                return f"ended before it was ready (exit status {status}: {last_error(self.spec.log)})"
            if loop.time() - self._start_s > patience.ready_s:
                self._deaths_s.append(loop.time())
                return f"was not ready after {patience.ready_s:.0f} s"
            await asyncio.sleep(patience.ask_ready_s)
        self.ready_s = loop.time() - self._start_s
        self.state = State.READY
        self._deaths_s.clear()
        self._metrics.up.labels(self.spec.name).set(1)
        self._metrics.ready_s.labels(self.spec.name).set(self.ready_s)
        self._say(f"{self.spec.name}: ready in {self.ready_s:.1f} s")
        for line in await asyncio.to_thread(describe_start, self.spec.directory, self.spec.log):
            self._say(f"{self.spec.name}: {line}")
        watch = asyncio.create_task(self._watch_health())
        ready_at = loop.time()
        try:
            while (status := self._process.poll()) is None and not watch.done():
                await asyncio.sleep(patience.poll_s)
        finally:
            watch.cancel()
            self._metrics.up.labels(self.spec.name).set(0)
        if loop.time() - ready_at > patience.healthy_s:
            self._num_short_lives = 0
        if status is None:
            return f"gave no sign of health for {patience.num_silent * patience.ask_health_s:.0f} s"
        return f"ended by itself (exit status {status}: {last_error(self.spec.log)})"

    async def _watch_health(self) -> None:
        """Return when the engine has been silent for too long."""
        num_silent = 0
        while num_silent < self._patience.num_silent:
            await asyncio.sleep(self._patience.ask_health_s)
            num_silent = 0 if await self._is_healthy(self._patience.ask_health_s) else num_silent + 1

    async def _is_healthy(self, timeout_s: float) -> bool:
        try:
            status, _ = await fetch(self.backend, "/health", timeout_s=timeout_s)
        except OSError:
            return False
        return status == 200

    async def _prepare_restart(self, now: float) -> None:
        """Wait for as long as the deaths so far demand, or set the state to stopped."""
        name, patience = self.spec.name, self._patience
        is_loop = len(self._deaths_s) == patience.num_deaths and now - self._deaths_s[0] < patience.crash_window_s
        if is_loop:
            self.state = State.STOPPED
            self._say(f"{name}: {self.problem}; stopped after {patience.num_deaths} such ends, read {self.spec.log}")
            return
        delay_s = min(patience.longest_delay_s, patience.first_delay_s * 2**self._num_short_lives)
        self._num_short_lives += 1
        self._next_start_s = now + delay_s
        self._say(f"{name}: {self.problem}; starting again in {delay_s:g} s")
        await asyncio.sleep(delay_s)
        self.num_restarts += 1
        self._metrics.restarts.labels(name).inc()

    async def _end(self) -> None:
        """End every process of the engine: SIGTERM, then SIGKILL; at once where the server itself is gone already."""
        process = self._process
        if process is None:
            return
        self.backend.close()
        loop, patience = asyncio.get_running_loop(), self._patience
        try:
            deadline = loop.time() + (patience.stop_s if process.poll() is None else patience.orphan_s)
            process.terminate()
            while loop.time() < deadline and not process.is_gone():
                await asyncio.sleep(patience.poll_s)
        finally:
            process.kill()
            self._process = None


async def supervise(engines: Sequence[SupervisedEngine]) -> None:
    """Run all engines; raises UserError when every one of them is stopped, ends all when cancelled."""
    async with asyncio.TaskGroup() as group:
        for engine in engines:
            group.create_task(engine.run())
    reasons = "; ".join(f"{engine.spec.name} {engine.problem}" for engine in engines)
    logs = ", ".join(str(engine.spec.log) for engine in engines)
    names = ", ".join(engine.spec.name for engine in engines)
    raise UserError("variants", names, f"all stopped ({reasons})", f"read {logs}")
