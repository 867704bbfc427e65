"""One vLLM engine as child processes: command line, start, wait until ready, and a complete stop."""

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
from slimserve.serve.policy.engine_log import failure_reason
from slimserve.serve.policy.keys import KEYS_FILE_VARIABLE
from slimserve.serve.policy.limits import LIMITS_VARIABLE, Limits

_READY_TIMEOUT_S = 1800
_STOP_TIMEOUT_S = 20.0
_KILL_TIMEOUT_S = 2.0
_POLL_S = 0.2
STOCK_COMMAND = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
"""vLLM's own server without any code of slimserve, for benchmarks and tests."""
_OUR_COMMAND = (sys.executable, "-m", "slimserve.serve.engine.entry")
_OUR_ARGUMENTS = ("--middleware", "slimserve.serve.engine.middleware.RequestMiddleware")
_PHASES = (
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("Starting to load model", "loading weights"),
    ("Warming up model", "compiling, or reading the compile cache"),
    ("Warming up done", "reserving the KV cache"),
    ("Starting vLLM server", "opening the port"),
)
"""Pairs of a text in vLLM's log and the phase that begins there."""


@dataclass(frozen=True)
class EngineSpec:
    """The model, launch plan and address of one engine."""

    directory: Path
    name: str
    """Model name in the API."""
    plan: LaunchPlan
    log: Path
    port: int
    host: str = "127.0.0.1"
    extra: tuple[str, ...] = ()
    """The user's arguments for vLLM, which replace those of the plan."""
    command: tuple[str, ...] = _OUR_COMMAND
    aliases: tuple[str, ...] = ()
    """Further model names that the engine accepts."""
    limits: Limits | None = None
    """Limits of the engine; None keeps the environment of this process, or else the defaults."""
    api_key_file: Path | None = None

    def command_line(self) -> list[str]:
        """Return the complete command; only slimserve's entry point gets slimserve's middleware."""
        return [
            *self.command,
            *("--model", str(self.directory), "--served-model-name", self.name, *self.aliases),
            *("--host", self.host, "--port", str(self.port)),
            *(_OUR_ARGUMENTS if self.command == _OUR_COMMAND else ()),
            *self.plan.command_line(self.extra),
        ]

    def environment(self) -> dict[str, str]:
        """Return the environment of the engine; secrets are not on the command line, which every user can read."""
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
        """Base URL of the engine, as seen from this machine."""
        return base_url(self.host, self.port)


class EngineProcess:
    """The processes of one engine in a session of their own, which Ctrl-C does not reach."""

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
        """Return the exit status of the server, or None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Block until the server exits and return its exit status."""
        return self._process.wait()

    def terminate(self) -> None:
        """Send SIGTERM, which makes the server drain and exit."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def is_gone(self) -> bool:
        """Return whether all processes of the engine have exited."""
        self._process.poll()
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def kill(self) -> None:
        """Send SIGKILL to all processes of the engine that are left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Engine:
    """A running vLLM server, as a context manager that stops it at the end.

    Entering raises UserError if the port is taken, or if the engine exits before it is ready; the message then has
    the cause from its log.
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
        """Block until the engine exits and return its exit status."""
        return self._process.wait()

    def peak_rss_bytes(self) -> int:
        """Return the sum of the largest resident set so far (VmHWM) of each engine process, in bytes."""
        for pid in self._pids():
            with contextlib.suppress(OSError, StopIteration):
                status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
                line = next(line for line in status.split("\n") if line.startswith("VmHWM:"))
                self._peak_rss[pid] = max(self._peak_rss.get(pid, 0), int(line.split()[1]) * 1024)
        return sum(self._peak_rss.values())

    def stop(self) -> None:
        """End every process of the engine by SIGTERM, then by SIGKILL 20 s after its drain or on a second Ctrl-C."""
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
        """Wait for at most `timeout_s` until all processes of the engine have exited."""
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
                        f"exited before it was ready ({exit_reason(self.spec.log, status)})",
                        f"read {self.spec.log}",
                    )
                if elapsed > _READY_TIMEOUT_S:
                    raise UserError(
                        "engine", self.spec.name, f"was not ready after {elapsed:.0f} s", f"read {self.spec.log}"
                    )
                tick(elapsed, note=_phase(self.spec.log))
                time.sleep(_POLL_S)


def base_url(host: str, port: int) -> str:
    """Return the URL that reaches host:port from this machine."""
    host = "127.0.0.1" if host in {"0.0.0.0", "::"} else host  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check_port_is_free(host: str, port: int) -> None:
    """Raise UserError if the address host:port cannot be listened on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                "port",
                f"{host}:{port}",
                f"cannot be listened on ({error})",
                "use another --port, or stop the process that uses it",
            ) from error


def free_port() -> int:
    """Return a port of the loopback interface that is free now; another process may still take it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(url: str) -> bool:
    """Return whether a GET of `url` succeeds within two seconds."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _phase(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    reached = [phase for marker, phase in _PHASES if marker in text]
    return reached[-1] if reached else "importing"


def exit_reason(log: Path, status: int) -> str:
    """Return the exit status of a server with the cause of its end, as its log tells it."""
    return f"exit status {status}: {failure_reason(log.read_text(encoding='utf-8', errors='replace'), status)}"
