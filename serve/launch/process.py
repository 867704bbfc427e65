"""One vLLM engine as a child process: command line, start, wait until ready with progress, end without a trace."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from slimserve.core.errors import UserError
from slimserve.core.progress import progress
from slimserve.serve.launch.plan import LaunchPlan
from slimserve.serve.policy.engine_environment import ENGINE_LOG_VARIABLE, MODEL_DIR_VARIABLE, VARIANT_VARIABLE
from slimserve.serve.policy.keys import KEYS_FILE_VARIABLE
from slimserve.serve.policy.limits import LIMITS_VARIABLE, Limits

_READY_TIMEOUT_S = 1800
_STOP_TIMEOUT_S = 20.0
_KILL_TIMEOUT_S = 2.0
_POLL_S = 0.2
STOCK_COMMAND = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
"""vLLM's server with none of our code on the path, for benchmarks and proofs."""
_OUR_COMMAND = (sys.executable, "-m", "slimserve.serve.engine.entry")
_OUR_ARGUMENTS = ("--middleware", "slimserve.serve.engine.middleware.RequestMiddleware")
_PHASES = (
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("Starting to load model", "loading weights"),
    ("Warming up model", "compiling, or reading the compile cache"),
    ("Warming up done", "reserving the KV cache"),
    ("Starting vLLM server", "opening the port"),
)
"""A text in vLLM's log, and what the engine does from that line on."""


@dataclass(frozen=True)
class EngineSpec:
    """What to start and where."""

    directory: Path
    name: str
    """Model name on the API."""
    plan: LaunchPlan
    log: Path
    port: int
    host: str = "127.0.0.1"
    extra: tuple[str, ...] = ()
    """vLLM arguments of the user, which win over the plan's."""
    command: tuple[str, ...] = _OUR_COMMAND
    aliases: tuple[str, ...] = ()
    """Further model names that it answers to."""
    limits: Limits | None = None
    """None: the guard's own defaults, or what this process was given."""
    api_key_file: Path | None = None

    def command_line(self) -> list[str]:
        """The whole command. Only our own entry point gets our middleware: stock vLLM stays stock."""
        return [
            *self.command,
            *("--model", str(self.directory), "--served-model-name", self.name, *self.aliases),
            *("--host", self.host, "--port", str(self.port)),
            *(_OUR_ARGUMENTS if self.command == _OUR_COMMAND else ()),
            *self.plan.command_line(self.extra),
        ]

    def environment(self) -> dict[str, str]:
        """This process's environment and what the engine needs: not on the command line, which all can read."""
        environment = os.environ | {choice.name: choice.value for choice in self.plan.environment}
        if self.command != _OUR_COMMAND:
            return environment
        environment |= {VARIANT_VARIABLE: self.name, MODEL_DIR_VARIABLE: str(self.directory)}
        environment[ENGINE_LOG_VARIABLE] = str(self.log.absolute())
        if self.limits is not None:
            environment[LIMITS_VARIABLE] = self.limits.model_dump_json()
        if self.api_key_file is not None:
            environment[KEYS_FILE_VARIABLE] = str(self.api_key_file.absolute())
        return environment

    @property
    def url(self) -> str:
        """Base URL to reach the engine from this machine."""
        return base_url(self.host, self.port)


class EngineProcess:
    """The processes of one engine, in a session of their own: Ctrl-C does not reach them, and all end at once."""

    def __init__(self, spec: EngineSpec) -> None:
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        with spec.log.open("wb") as log:
            self._process = subprocess.Popen(
                spec.command_line(),
                env=spec.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """Exit status of the server, None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Block until the server ends by itself and return its exit status."""
        return self._process.wait()

    def terminate(self) -> None:
        """Ask the server to drain and end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def is_gone(self) -> bool:
        """Whether no process of the engine is left."""
        self._process.poll()
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def kill(self) -> None:
        """End whatever is left of the engine, now."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Engine:
    """A running vLLM server; use it as a context manager, which stops it on the way out.

    Raises UserError from `__enter__` where the port is taken or the engine ends before
    it is ready, with the last error of its log.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.ready_s = 0.0
        """Seconds from the start of the process until /health answered."""
        self._peak_rss: dict[int, int] = {}

    def __enter__(self) -> Engine:
        check_port_is_free(self.spec.host, self.spec.port)
        start = time.monotonic()
        self._process = EngineProcess(self.spec)
        try:
            self._wait_until_ready(start)
        except BaseException:
            self.stop()
            raise
        self.ready_s = time.monotonic() - start
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self) -> int:
        """Block until the engine ends by itself and return its exit status."""
        return self._process.wait()

    def peak_rss_bytes(self) -> int:
        """Sum over the engine's processes of each one's largest resident set so far (VmHWM)."""
        for pid in self._pids():
            with contextlib.suppress(OSError, StopIteration):
                status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
                line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
                self._peak_rss[pid] = max(self._peak_rss.get(pid, 0), int(line.split()[1]) * 1024)
        return sum(self._peak_rss.values())

    def stop(self) -> None:
        """End every process of the engine: SIGTERM, then SIGKILL 20 s after its drain or on a second Ctrl-C."""
        self.peak_rss_bytes()
        drain_s = self.spec.limits.drain_s if self.spec.limits else 0.0
        self._process.terminate()
        try:
            self._wait_for_group(drain_s + _STOP_TIMEOUT_S)
        finally:
            self._process.kill()
            self._wait_for_group(_KILL_TIMEOUT_S)

    def _pids(self) -> list[int]:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            return [root.pid, *(child.pid for child in root.children(recursive=True))]
        return []

    def _wait_for_group(self, timeout_s: float) -> None:
        """Wait until no process of the engine's group is left, for at most so long."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and not self._process.is_gone():
            time.sleep(_POLL_S / 4)

    def _wait_until_ready(self, start: float) -> None:
        with progress(f"starting {self.spec.name} on vLLM", None, "s") as tick:
            while not answers(f"{self.spec.url}/health"):
                elapsed = time.monotonic() - start
                status = self._process.poll()
                if status is not None:
                    raise UserError(
                        "engine",
                        self.spec.name,
                        f"ended before it was ready (exit status {status}: {last_error(self.spec.log)})",
                        f"read {self.spec.log}",
                    )
                if elapsed > _READY_TIMEOUT_S:
                    raise UserError(
                        "engine", self.spec.name, f"was not ready after {elapsed:.0f} s", f"read {self.spec.log}"
                    )
                tick(elapsed, note=_phase(self.spec.log))
                time.sleep(_POLL_S)


def base_url(host: str, port: int) -> str:
    """How to reach from this machine what listens on host:port."""
    host = "127.0.0.1" if host in {"0.0.0.0", "::"} else host  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check_port_is_free(host: str, port: int) -> None:
    """Raise UserError where nothing can listen on host:port."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                "port", f"{host}:{port}", f"cannot be listened on ({error})", "give another --port, or stop its owner"
            ) from error


def free_port() -> int:
    """A port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(url: str) -> bool:
    """Whether a GET of `url` is answered with success within two seconds."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _phase(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    reached = [phase for marker, phase in _PHASES if marker in text]
    return reached[-1] if reached else "importing"


def last_error(log: Path) -> str:
    """The line of the log that names the first exception, or the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if any(word in line for word in ("Error:", "error:", "Exception:"))]
    return (named or lines or ["no output"])[-1 if not named else 0][-300:]
