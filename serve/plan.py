"""The launch plan: vLLM arguments and environment for one model on this machine, each with its reason.

vLLM's own defaults leave much of a small CPU machine idle; the choices below were
measured on 2 cores (docs/log.md). On a GPU vLLM's defaults stand.
"""

from __future__ import annotations

import ctypes.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.hardware import Hardware
from contracts.storage import cache_dir

_KV_MEMORY_FRAC = 0.1
_BLOCK_SIZE = 32


@dataclass(frozen=True)
class Choice:
    """One setting, its value and why it was chosen."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class LaunchPlan:
    """How to start vLLM: command-line flags and environment variables."""

    arguments: tuple[Choice, ...] = ()
    environment: tuple[Choice, ...] = ()

    def command_line(self, extra: Sequence[str] = ()) -> list[str]:
        """The flags, without those that `extra` (the user's own flags, which win) sets too."""
        set_by_user = {argument.split("=", 1)[0] for argument in extra if argument.startswith("--")}
        ours = [choice for choice in self.arguments if choice.name not in set_by_user]
        return [part for choice in ours for part in (choice.name, choice.value)] + list(extra)

    def explain(self) -> str:
        """One line per choice, for people."""
        return "\n".join(
            f"{choice.name}={choice.value}\n    {choice.reason}" for choice in (*self.environment, *self.arguments)
        )


def plan_launch(directory: Path, hardware: Hardware) -> LaunchPlan:
    """Choose the launch for the model in `directory`; its config.json must be readable."""
    private = (
        Choice("VLLM_NO_USAGE_STATS", "1", "nothing about your use is sent anywhere"),
        Choice("HF_HUB_OFFLINE", "1", "the model is a local directory, so no hub is asked"),
    )
    if hardware.gpus:
        return LaunchPlan(environment=private)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    cores = hardware.cores
    environment = [
        *private,
        Choice(
            "VLLM_CPU_OMP_THREADS_BIND",
            _ranges(cores),
            f"all {len(cores)} cores compute; vLLM would keep one of them for its own processes",
        ),
        Choice(
            "VLLM_USE_AOT_COMPILE",
            "0",
            "vLLM 0.32 cannot load its ahead-of-time artefact on a CPU and compiles again; without it a later start "
            "finds the compiled graph in the cache",
        ),
        Choice(
            "VLLM_USE_BYTECODE_HOOK",
            "0",
            "the compiled graph is called as it is; vLLM's hook swaps the function's code at every step, which costs "
            "a fifth of the decode speed",
        ),
        Choice("TORCHINDUCTOR_CACHE_DIR", str(cache_dir("compiled")), "the compiled graph outlives a reboot"),
    ]
    preload = [library for library in (_find_tcmalloc(), _find_iomp()) if library]
    if preload:
        environment.append(
            Choice(
                "LD_PRELOAD", ":".join(preload), "a faster allocator and Intel's OpenMP, as vLLM's CPU guide advises"
            )
        )
    kv_bytes = int(hardware.memory_gib * 2**30 * _KV_MEMORY_FRAC)
    arguments = [
        Choice(
            "--block-size",
            str(_BLOCK_SIZE),
            "a candidate recomputes at most 31 tokens of the shared prefix; the CPU default of 128 makes it up to 127",
        ),
        Choice(
            "--kv-cache-memory-bytes",
            str(kv_bytes),
            f"{_KV_MEMORY_FRAC:.0%} of the machine's {hardware.memory_gib} GiB",
        ),
    ]
    longest = _longest_sequence(config, kv_bytes)
    if longest < config.get("max_position_embeddings", longest):
        arguments.append(Choice("--max-model-len", str(longest), "the longest sequence that the KV space holds"))
    return LaunchPlan(tuple(arguments), tuple(environment))


def _longest_sequence(config: Mapping[str, Any], kv_bytes: int) -> int:
    """Tokens of one sequence that fit into `kv_bytes` at 16 bits, in whole blocks."""
    kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    bytes_per_token = 2 * config["num_hidden_layers"] * kv_heads * head_dim * 2
    return int(kv_bytes // bytes_per_token // _BLOCK_SIZE * _BLOCK_SIZE)


def _ranges(cores: Sequence[int]) -> str:
    """`0-3,8` for (0, 1, 2, 3, 8)."""
    spans: list[list[int]] = []
    for core in cores:
        if spans and core == spans[-1][1] + 1:
            spans[-1][1] = core
        else:
            spans.append([core, core])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)


def _find_tcmalloc() -> str | None:
    return ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc")


def _find_iomp() -> str | None:
    """The library of the `intel-openmp` package that vLLM's CPU build requires on x86."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    return str(library) if library.exists() else None
