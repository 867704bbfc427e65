"""Launch plan: vLLM arguments and environment variables for one model on this machine, each with its reason.

vLLM's defaults leave much of a small CPU machine idle. The choices for CPUs were measured on 2 cores (docs/log.md).
A GPU keeps vLLM's defaults, except for what vLLM's documentation advises.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slimserve.core.allocator import find_fast_allocator
from slimserve.core.hardware import Hardware, openmp_library
from slimserve.core.model_config import kv_values_of, read_config, size_of
from slimserve.core.model_files import stored_dtype
from slimserve.core.storage import cache_dir
from slimserve.serve.launch.choice import Choice as Choice
from slimserve.serve.launch.parsers import choose_parsers
from slimserve.serve.launch.rerankers import plan_classifier
from slimserve.serve.policy.engine_environment import PACKED_GEMM_VARIABLE

TrafficProfile = Literal["prefill", "decode", "balanced"]
"""Traffic that a launch is tuned for: prompts to score, long answers, or both."""
_KV_MEMORY_FRAC = 0.1
_GPU_MEMORY_FRAC = 0.9
_BLOCK_SIZE = 32
PREFIX_CONNECTOR = {
    "kv_connector": "PartialPrefixConnector",
    "kv_connector_module_path": "slimserve.serve.engine.partial_prefix",
    "kv_role": "kv_both",
}
"""vLLM's `--kv-transfer-config` for serve/engine/partial_prefix.py."""


@dataclass(frozen=True)
class LaunchPlan:
    """Command-line flags and environment variables for vLLM."""

    arguments: tuple[Choice, ...] = ()
    environment: tuple[Choice, ...] = ()
    warnings: tuple[str, ...] = ()
    """Sentences about what the model needs and no choice provides."""

    def command_line(self, extra: Sequence[str] = ()) -> list[str]:
        """Return the flags followed by `extra`, the user's own flags, which replace flags of the same name."""
        set_by_user = {_flag_name(argument) for argument in extra if argument.startswith("--")}
        ours = [choice for choice in self.arguments if choice.name not in set_by_user]
        return [part for choice in ours for part in choice.argument()] + list(extra)

    def explain(self, extra: Sequence[str] = ()) -> str:
        """Return two lines per choice that `extra` does not replace, the setting and its reason, then the warnings."""
        set_by_user = {_flag_name(argument) for argument in extra if argument.startswith("--")}
        shown = [choice for choice in (*self.environment, *self.arguments) if choice.name not in set_by_user]
        lines = [f"{'='.join(choice.argument())}\n    {choice.reason}" for choice in shown]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def _flag_name(argument: str) -> str:
    """Return the name of a flag as the plan writes it: with dashes, without a value and without `--no-`."""
    name = argument.split("=", 1)[0].replace("_", "-")
    return f"--{name[5:]}" if name.startswith("--no-") else name


def plan_launch(
    directory: Path,
    hardware: Hardware,
    profile: TrafficProfile = "balanced",
    num_variants: int = 1,
    extra: Sequence[str] = (),
) -> LaunchPlan:
    """Choose the launch of the model in `directory`, which has a config.json, beside `num_variants` - 1 others.

    `extra` are the user's own arguments for vLLM; the parsers fit a chat template that is given there.
    """
    config = read_config(directory)
    classifier = plan_classifier(directory, config)
    model_choices, warnings = (classifier, ()) if classifier else choose_parsers(directory, config, extra)
    everywhere = (
        Choice("VLLM_NO_USAGE_STATS", "1", "vLLM sends no usage statistics"),
        Choice("HF_HUB_OFFLINE", "1", "the model is a local directory, so the hub is not needed"),
        Choice("VLLM_PLUGINS", "slimserve,bitsandbytes", "adds /v1/score, /v1/rerank and the bitsandbytes formats"),
    )
    if hardware.gpus:
        return LaunchPlan((*_on_gpu(profile, num_variants), *model_choices), everywhere, warnings)
    environment = [
        *everywhere,
        *(_one_process(hardware.cores) if hardware.numa_nodes == 1 else _worker_process(hardware.cores)),
        Choice(
            "VLLM_USE_AOT_COMPILE",
            "0",
            "vLLM 0.32 cannot load its ahead-of-time artefact on a CPU and compiles again; without it a later start "
            "finds the compiled graph in the cache",
        ),
        Choice(
            "VLLM_USE_BYTECODE_HOOK",
            "0",
            "vLLM calls the compiled graph directly; its bytecode hook swaps the function's code at every step, "
            "which costs a fifth of the decode speed",
        ),
        Choice("TORCHINDUCTOR_CACHE_DIR", str(cache_dir("compiled")), "the cache of compiled graphs survives a reboot"),
    ]
    if "amx_tile" in hardware.isa:
        environment.append(
            Choice(
                PACKED_GEMM_VARIABLE,
                "1024",
                "narrower layers get vLLM's packed AMX kernel: oneDNN runs them at half speed in steps of 500 to 1,300 "
                "tokens",
            )
        )
    preload = [library for library in (find_fast_allocator(), openmp_library()) if library]
    if preload:
        environment.append(
            Choice(
                "LD_PRELOAD", ":".join(preload), "a faster allocator and Intel's OpenMP, as vLLM's CPU guide advises"
            )
        )
    kv_bytes = int(hardware.memory_gib * 2**30 * _KV_MEMORY_FRAC / num_variants)
    arguments = [
        Choice(
            "--block-size",
            str(_BLOCK_SIZE),
            "the prefix cache shares whole blocks; 32 is the smallest that vLLM's CPU attention takes, its default 128",
        ),
        Choice(
            "--kv-cache-memory-bytes",
            str(kv_bytes),
            f"{_KV_MEMORY_FRAC:.0%} of the machine's {hardware.memory_gib} GiB"
            + (f", shared by {num_variants} variants" if num_variants > 1 else ""),
        ),
    ]
    if classifier:
        arguments = []  # an encoder has no KV cache, and vLLM sizes that of a decoder that classifies
    elif profile != "decode":
        arguments.append(
            Choice(
                "--kv-transfer-config",
                json.dumps(PREFIX_CONNECTOR),
                "candidates also share the last, partly filled block of their prefix instead of computing it each",
            )
        )
    is_quantized = bool(config.get("quantization_config"))
    is_float32 = hardware.serves_in_float32(config)
    if is_float32:
        reason = "float32 products are six times as fast as bfloat16 on this CPU; weights take twice the memory"
        arguments.append(Choice("--dtype", "float32", reason))
    elif is_quantized and stored_dtype(directory) == "float16":
        reason = "vLLM's CPU kernels of quantized layers have no float16, the dtype of this model"
        arguments.append(Choice("--dtype", "bfloat16", reason))
    longest = None if classifier else _longest_sequence(config, kv_bytes, 4 if is_float32 else 2)
    if longest is not None and longest < (size_of(config, "max_position_embeddings") or longest):
        arguments.append(Choice("--max-model-len", str(longest), "the longest sequence that the KV space holds"))
    return LaunchPlan((*arguments, *model_choices), tuple(environment), warnings)


def _on_gpu(profile: TrafficProfile, num_variants: int) -> tuple[Choice, ...]:
    """Return what vLLM's guide to optimization and tuning advises; these choices are not measured, and say so."""
    choices = []
    if num_variants > 1:
        share = f"{_GPU_MEMORY_FRAC / num_variants:.3f}"
        reason = f"each of {num_variants} engines on the GPU would otherwise take {_GPU_MEMORY_FRAC:.0%} of its memory"
        choices.append(Choice("--gpu-memory-utilization", share, f"{reason} (unmeasured)"))
    if profile == "prefill":
        reason = "vLLM's documentation: over 8,192 tokens a step for the throughput of small models on large GPUs"
        choices.append(Choice("--max-num-batched-tokens", "16384", f"{reason} (unmeasured)"))
    elif profile == "decode":
        reason = "vLLM's documentation: steps of 2,048 tokens, as fewer prefills slow down the tokens of others"
        choices.append(Choice("--max-num-batched-tokens", "2048", f"{reason} (unmeasured)"))
    return tuple(choices)


def _one_process(cores: Sequence[int]) -> tuple[Choice, ...]:
    """Run scheduler and worker in one process, forked from one that has imported everything.

    vLLM sets the OpenMP and Inductor variables below when it starts a worker process. That is too late here, because
    the fork server has read its environment by then.
    """
    return (
        Choice(
            "VLLM_ENABLE_V1_MULTIPROCESSING",
            "0",
            "the worker runs in the engine's process; no messages per step",
        ),
        Choice("SLIMSERVE_FORK_ENGINE", "1", "the engine's imports run beside the API server's: ready 12 s sooner"),
        Choice(
            "OMP_NUM_THREADS",
            str(len(cores)),
            f"all {len(cores)} cores compute; vLLM would keep one of them for its own processes",
        ),
        Choice("KMP_BLOCKTIME", "5", "as vLLM sets it for its worker: threads wait 5 ms for work before they sleep"),
        Choice("KMP_TPAUSE", "0", "as vLLM sets it for its worker"),
        Choice("TORCHINDUCTOR_COMPILE_THREADS", "1", "as vLLM's CPU platform sets it"),
        Choice("TORCHINDUCTOR_CPP_DYNAMIC_THREADS", "1", "as vLLM's CPU platform sets it"),
        Choice("VLLM_DISABLE_SHARED_EXPERTS_STREAM", "1", "as vLLM's CPU platform sets it"),
        Choice("NUMEXPR_MAX_THREADS", str(len(cores)), "as vLLM's CPU platform sets it"),
    )


def _worker_process(cores: Sequence[int]) -> tuple[Choice, ...]:
    """Run vLLM's own worker process, whose threads and memory vLLM binds to NUMA nodes."""
    return (
        Choice(
            "VLLM_CPU_OMP_THREADS_BIND",
            _ranges(cores),
            f"all {len(cores)} cores compute; vLLM would keep some of them for its own processes",
        ),
    )


def _longest_sequence(config: Mapping[str, Any], kv_bytes: int, bytes_per_value: int) -> int | None:
    """Return the number of tokens of one sequence that fit into `kv_bytes`, in full blocks.

    None if the config states no sizes of attention.
    """
    try:
        bytes_per_token = kv_values_of(config) * bytes_per_value
    except KeyError:
        return None
    if bytes_per_token == 0:
        return None
    return int(kv_bytes // bytes_per_token // _BLOCK_SIZE * _BLOCK_SIZE)


def _ranges(cores: Sequence[int]) -> str:
    """Return core numbers as ranges: `0-3,8` for (0, 1, 2, 3, 8)."""
    spans: list[list[int]] = []
    for core in cores:
        if spans and core == spans[-1][1] + 1:
            spans[-1][1] = core
        else:
            spans.append([core, core])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)
