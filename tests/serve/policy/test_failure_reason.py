"""Logs of engines that fail, as vLLM 0.32 and earlier versions write them, and the cause that is read from each."""

# ruff: noqa: E501  # lines of logs

from __future__ import annotations

import pytest

from slimserve.serve.policy.engine_log import failure_reason

ULIMIT = (
    "(MainProcess pid=7) WARNING 11-27 10:41:37 [system_utils.py:255] Found ulimit of 20000 and failed to automatically "
    "increase with error current limit exceeds maximum limit. This can cause fd limit errors like `OSError: [Errno 24] "
    "Too many open files`. Consider increasing with ulimit -n\n"
)
HEAD = (
    "slimserve.start: imported after 32.1 s\n"
    "W1127 10:41:36.697000 12211 torch/_library/triton.py:53] Triton not available, find_triton_kernels = []\n"
    + ULIMIT
    + "(APIServer pid=7) INFO 11-27 10:41:37 [model.py:733] Resolved architecture: LlamaForCausalLM\n"
    "(EngineCore pid=8) INFO 11-27 10:41:41 [cpu_model_runner.py:68] Starting to load model v1...\n"
    "(EngineCore pid=8) WARNING 11-27 10:41:42 [utils.py:597] Failed to create oneDNN linear, fallback to torch linear. "
    "Exception: could not create a primitive descriptor for the matmul primitive.\n"
)
TAIL = (
    "/usr/lib/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 "
    "leaked semaphore objects to clean up at shutdown\n  warnings.warn('resource_tracker: There appear to be %d '\n"
)
DIRECT = "\nThe above exception was the direct cause of the following exception:\n\n"
CONTEXT = "\nDuring handling of the above exception, another exception occurred:\n\n"


def traceback(error: str, num_frames: int = 8) -> str:
    frame = '  File "/opt/vllm/v1/engine/core.py", line {0}, in step_{0}\n    return self.step(error="Error: {0}")\n    ^^^^\n'
    return f"Traceback (most recent call last):\n{''.join(map(frame.format, range(num_frames)))}{error}\n"


def record(process: str, file: str, text: str, level: str = "ERROR") -> str:
    """Return a message as vLLM's logger prints it: every line of it has the header of the record."""
    return "".join(f"({process}) {level} 11-27 10:41:44 [{file}] {line}\n" for line in text.rstrip("\n").split("\n"))


def server_end(processes: str = "{'EngineCore': 1}") -> str:
    return traceback(
        f"RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {processes}"
    )


def of_engine(trace: str) -> str:
    """Return the log of an engine process that fails at its start: logged, printed by multiprocessing, and reported."""
    logged = record("EngineCore pid=8", "core.py:1510", "EngineCore failed to start.\n" + trace)
    return HEAD + logged + "Process EngineCore:\n" + trace + server_end() + TAIL


def of_worker(trace: str) -> str:
    """Return the log of a worker that fails at its start, with the other worker's lost connection."""
    logged = record("Worker_TP0 pid=9", "multiproc_executor.py:953", "WorkerProc failed to start.\n" + trace)
    lost = traceback("RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41233")
    other = record("Worker_TP1 pid=10", "multiproc_executor.py:953", "WorkerProc failed to start.\n" + lost)
    wrapper = traceback(
        "Exception: WorkerProc initialization failed due to an exception in a background process. "
        "See stack trace for root cause."
    )
    return HEAD + logged + other + of_engine(wrapper).removeprefix(HEAD)


def of_server(trace: str) -> str:
    return HEAD + "(APIServer pid=7) INFO 11-27 10:41:37 [entry.py:140] x\n" + trace


KV_CACHE = (
    "ValueError: To serve at least one request with the model's max seq len (131072), (14.0 GiB KV cache is needed, which "
    "is larger than the available KV cache memory (2.35 GiB). Based on the available memory, the estimated maximum model "
    "length is 21984. Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU backend) or "
    "decreasing `max_model_len` when initializing the engine. See https://docs.vllm.ai/ for more details."
)
PYDANTIC = (
    "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, {} "
    "[type=value_error, input_value=ArgsKwargs((), {{'model': 'v1', 'error': 'Error: x'}}), input_type=ArgsKwargs]\n"
    "    For further information visit https://errors.pydantic.dev/2.12/v/value_error"
)
LOGS: dict[str, tuple[str, int, str]] = {
    "memory for the KV cache": (of_engine(traceback(KV_CACHE)), 1, KV_CACHE[:300]),
    "no memory left for the KV cache": (
        of_engine(traceback("ValueError: No available memory for the cache blocks. Try increasing `x`.")),
        1,
        "ValueError: No available memory for the cache blocks. Try increasing `x`.",
    ),
    "length above the model's": (
        of_server(
            traceback(PYDANTIC.format("User-specified max_model_len (99999) is greater than the derived max_model_len"))
        ),
        1,
        "ValidationError: ModelConfig: User-specified max_model_len (99999) is greater than the derived max_model_len",
    ),
    "unsupported architecture": (
        of_server(traceback(PYDANTIC.format("Model architectures ['FooForCausalLM'] are not supported for now."))),
        1,
        "ValidationError: ModelConfig: Model architectures ['FooForCausalLM'] are not supported for now.",
    ),
    "architecture that cannot be inspected": (
        of_server(
            record(
                "APIServer pid=7",
                "registry.py:952",
                "Error in inspecting model architecture 'FooForCausalLM'\n"
                + traceback("subprocess.CalledProcessError: Command '['python']' returned non-zero exit status 1.")
                + DIRECT
                + traceback(
                    "RuntimeError: Error raised in subprocess:\n"
                    + traceback("ImportError: libfoo.so.1: cannot open shared object file: No such file or directory")
                ),
            )
            + traceback(
                PYDANTIC.format(
                    "Model architectures ['FooForCausalLM'] failed to be inspected. Please check the logs for more details."
                )
            )
        ),
        1,
        "ImportError: libfoo.so.1: cannot open shared object file: No such file or directory",
    ),
    "unknown quantization": (
        of_server(traceback(PYDANTIC.format("Unknown quantization method: int3. Must be one of ['awq', 'fp8']."))),
        1,
        "Unknown quantization method: int3. Must be one of ['awq', 'fp8'].",
    ),
    "no kernel for the layer": (
        of_engine(
            traceback(
                "ValueError: Failed to find a kernel that can implement the WNA16 linear layer. Reasons: \n"
                " MacheteLinearKernel requires capability 90, current compute  capability is None\n"
                " CPUWNA16LinearKernel cannot implement due to: group size 100"
            )
        ),
        1,
        "ValueError: Failed to find a kernel that can implement the WNA16 linear layer. Reasons: MacheteLinearKernel "
        "requires capability 90, current compute capability is None CPUWNA16LinearKernel cannot implement due to: "
        "group size 100",
    ),
    "kernel without a path for the dtype": (
        of_engine(
            traceback("RuntimeError: tinygemm_kernel_nn: scalar path not implemented!\nException raised from tinygemm")
        ),
        1,
        "RuntimeError: tinygemm_kernel_nn: scalar path not implemented!",
    ),
    "kernel that aborts": (
        HEAD
        + "terminate called after throwing an instance of 'c10::Error'\n  what():  scale_C: scalar path not implemented!\n"
        "Exception raised from scale_C at csrc/cpu/gemm.cpp:12 (most recent call first):\nframe #0: c10::Error::Error\n\n"
        + server_end("{'EngineCore': -6}"),
        1,
        "scale_C: scalar path not implemented!",
    ),
    "port in use": (
        HEAD + traceback("OSError: [Errno 98] Address already in use"),
        1,
        "OSError: [Errno 98] Address already in use",
    ),
    "port in use, found by uvicorn": (
        HEAD
        + "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 8000): address already in use\n",
        1,
        "[Errno 98] error while attempting to bind on address ('127.0.0.1', 8000): address already in use",
    ),
    "no tokenizer": (
        of_server(
            traceback("KeyError: 'tokenizer_class'")
            + CONTEXT
            + traceback(
                "OSError: Can't load tokenizer for '/m'. If you were trying to load it from 'https://hf.co/models'"
            )
        ),
        1,
        "OSError: Can't load tokenizer for '/m'. If you were trying to load it from 'https://hf.co/models'",
    ),
    "broken config.json": (
        of_server(
            traceback("json.decoder.JSONDecodeError: Expecting ',' delimiter: line 9 column 3 (char 101)")
            + CONTEXT
            + traceback("OSError: It looks like the config file at '/m/config.json' is not a valid JSON file.")
        ),
        1,
        "OSError: It looks like the config file at '/m/config.json' is not a valid JSON file.; caused by JSONDecodeError: "
        "Expecting ',' delimiter: line 9 column 3 (char 101)",
    ),
    "unknown model type": (
        of_server(
            traceback("KeyError: 'foo'")
            + CONTEXT
            + traceback(
                "ValueError: The checkpoint you are trying to load has model type `foo` but Transformers does not know it"
            )
        ),
        1,
        "ValueError: The checkpoint you are trying to load has model type `foo` but Transformers does not know it",
    ),
    "no chat template": (
        of_server(
            traceback(
                "vllm.exceptions.VLLMValidationError: The supplied chat template string (t.jinja) appears path-like, but "
                "doesn't exist! Tried: t.jinja and /opt/vllm/t.jinja"
            )
        ),
        1,
        "VLLMValidationError: The supplied chat template string (t.jinja) appears path-like, but doesn't exist! Tried: "
        "t.jinja and /opt/vllm/t.jinja",
    ),
    "no weights": (
        of_engine(traceback("RuntimeError: Cannot find any model weights with `/m`")),
        1,
        "RuntimeError: Cannot find any model weights with `/m`",
    ),
    "weights that end too early": (
        of_worker(traceback("safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata")),
        1,
        "SafetensorError: Error while deserializing header: incomplete metadata",
    ),
    "weights that are missing": (
        of_engine(traceback("ValueError: Following weights were not initialized from checkpoint: {'lm_head.weight'}")),
        1,
        "ValueError: Following weights were not initialized from checkpoint: {'lm_head.weight'}",
    ),
    "a worker out of GPU memory": (
        of_worker(
            traceback("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB.")
        ),
        1,
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB.",
    ),
    "no compiler": (
        of_engine(
            traceback("torch._inductor.exc.CppCompileError: C++ compile error")
            + DIRECT
            + traceback(
                "torch._dynamo.exc.BackendCompilerFailed: backend='inductor' raised:\nCppCompileError: C++ compile error\n\n"
                "Command:\ng++ /tmp/a.cpp\n\nOutput:\n/tmp/a.cpp:2:10: fatal error: Python.h: No such file or directory"
            )
        ),
        1,
        "BackendCompilerFailed: backend='inductor' raised: CppCompileError: C++ compile error (fatal error: Python.h: No such "
        "file or directory)",
    ),
    "the engine's memory ran out": (
        HEAD + server_end("{'EngineCore': -9}"),
        1,
        "the process EngineCore was ended by SIGKILL, as the system does when memory runs out",
    ),
    "the server's memory ran out": (
        HEAD + record("APIServer pid=7", "x.py:1", "handled\n" + traceback("ValueError: of a request")),
        -9,
        "the server was ended by SIGKILL, as the system does when memory runs out",
    ),
    "a crash in native code": (
        HEAD
        + "Fatal Python error: Segmentation fault\n\nThread 0x01 (most recent call first):\n"
        + server_end("{'EngineCore': -11}"),
        1,
        "Segmentation fault",
    ),
    "a CPU without an instruction": (
        HEAD + server_end("{'EngineCore': -4}"),
        1,
        "the process EngineCore was ended by SIGILL, because the CPU lacks an instruction that this build of vLLM uses",
    ),
    "unknown argument": (
        HEAD + "usage: entry.py [-h] [--model MODEL]\nentry.py: error: unrecognized arguments: --max-modellen 9\n",
        2,
        "unrecognized arguments: --max-modellen 9",
    ),
    "a request's error before the engine dies under load": (
        HEAD
        + record("APIServer pid=7", "api_router.py:75", "Error\n" + traceback("ValueError: Cannot apply chat template"))
        + record(
            "EngineCore pid=8",
            "core.py:1512",
            "EngineCore encountered a fatal error.\n" + traceback("RuntimeError: boom"),
        )
        + record(
            "APIServer pid=7",
            "async_llm.py:906",
            "AsyncLLM output_handler failed.\n"
            + traceback(
                "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for "
                "the root cause."
            ),
        )
        + "ERROR:    "
        + traceback("asyncio.exceptions.CancelledError")
        + "\nException ignored in: <function AsyncLLM.__del__ at 0x7f>\n"
        + traceback("AttributeError: 'AsyncLLM' object has no attribute 'engine_core'"),
        0,
        "RuntimeError: boom",
    ),
    "an older vLLM that puts its process before every line": (
        "\n".join(
            f"\x1b[1;36m(EngineCore_DP0 pid=8)\x1b[0;0m {line}"
            for line in ("Process EngineCore_DP0:\n" + traceback("ValueError: block size 13")).split("\n")
        )
        + "\n"
        + "\n".join(f"(APIServer pid=7) {line}" for line in server_end("{}").split("\n")),
        1,
        "ValueError: block size 13",
    ),
    "a plugin that failed to load, and went on": (
        record("APIServer pid=7", "__init__.py:72", "Failed to load plugin x\n" + traceback("ImportError: no x"))
        + of_engine(traceback("ValueError: head size 100 is not supported")),
        1,
        "ValueError: head size 100 is not supported",
    ),
    "an error without a traceback": (
        HEAD + record("APIServer pid=7", "x.py:1", "the license has expired") + "bye\n",
        1,
        "the license has expired",
    ),
    "nothing but warnings": (HEAD + "stopped\n", 1, "stopped"),
    "nothing": ("", 1, "no output"),
}


@pytest.mark.parametrize("name", LOGS)
def test_a_failed_start_names_its_true_cause_and_no_warning(name: str) -> None:
    log, status, cause = LOGS[name]
    reason = failure_reason(log, status)
    assert reason.startswith(cause) if len(cause) == 300 else reason.endswith(cause)
    assert "ulimit" not in reason
    assert len(reason.splitlines()) == 1
    assert len(reason) < 800


def test_lines_of_two_processes_may_be_mixed() -> None:
    engine = record("EngineCore pid=8", "core.py:1510", traceback("ValueError: first cause")).splitlines()
    server = record("APIServer pid=7", "x.py:1", "waiting\n" * 30, "INFO").splitlines()
    mixed = "\n".join(line for pair in zip(engine, server, strict=False) for line in pair)
    assert failure_reason(HEAD + mixed + "\n" + server_end(), 1) == "ValueError: first cause"


def test_a_long_message_is_cut_at_its_end() -> None:
    reason = failure_reason(HEAD + traceback("ValueError: unknown key; choose from " + "a, " * 500), 1)
    assert reason.startswith("ValueError: unknown key; choose from a, a")
    assert reason.endswith(" …")
    assert len(reason) <= 360
