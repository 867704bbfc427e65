"""Compute log-probabilities of prompts with stock vLLM, for several checkpoints one after the other.

`python -m slimserve.serve.engine.offline` reads one JSON request from standard input,
{"models": [DIR, …], "prompts": [[token id, …], …], "greedy_tokens": N}, and writes one JSON line per model: the
log-probability of every prompt token given those before it and the greedy continuations, or an error. It uses only
vLLM's public `LLM` class in eager mode, without our launch plan.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slimserve.core.model_config import read_config
from slimserve.core.model_files import stored_dtype
from slimserve.serve.policy.engine_log import failure_reason

_KV_BYTES = 64 * 2**20


@dataclass(frozen=True)
class VllmAnswer:
    """The result of vLLM for one checkpoint."""

    model: str
    logprobs: list[list[float]] = field(default_factory=list)
    """Log-probability of each token except the first, one list per prompt."""
    greedy: list[list[int]] = field(default_factory=list)
    """Greedy continuation as token ids, one list per prompt."""
    error: str = ""
    """Cause if the checkpoint did not load or run, else empty."""


def ask_vllm(
    models: Sequence[Path], prompts: Sequence[Sequence[int]], greedy_tokens: int = 8, log: Path | None = None
) -> Iterator[VllmAnswer]:
    """Yield one answer per checkpoint from a separate process; vLLM's output goes to the file `log`."""
    request = {
        "models": [str(model) for model in models],
        "prompts": [list(prompt) for prompt in prompts],
        "greedy_tokens": greedy_tokens,
    }
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    with (log or Path(os.devnull)).open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "slimserve.serve.engine.offline"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            num_answers = 0
            for line in process.stdout:
                if line.startswith("{"):
                    num_answers += 1
                    yield VllmAnswer(**json.loads(line))
            if process.wait() != 0 and num_answers < len(models):
                output = log.read_text(encoding="utf-8", errors="replace") if log else ""
                reason = failure_reason(output, process.returncode)
                error = f"vLLM ended with exit status {process.returncode}: {reason}"
                yield VllmAnswer(str(models[num_answers]), error=error)
        finally:
            process.kill()
            process.wait()


def _answer(model: str, prompts: list[list[int]], greedy_tokens: int) -> VllmAnswer:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    llm = None
    try:
        longest = max(len(prompt) for prompt in prompts)
        # vLLM's CPU kernels of quantized layers abort the process for float16.
        is_half = "quantization_config" in read_config(Path(model)) and stored_dtype(Path(model)) == "float16"
        llm = LLM(
            model,
            dtype="bfloat16" if is_half and current_platform.is_cpu() else "auto",
            enforce_eager=True,
            max_model_len=longest + greedy_tokens,
            max_num_seqs=4,
            kv_cache_memory_bytes=_KV_BYTES,
            seed=0,
        )
        sampling = SamplingParams(temperature=0, max_tokens=greedy_tokens, prompt_logprobs=0)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        logprobs = [
            [position[token].logprob for token, position in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        return VllmAnswer(model, logprobs, [list(output.outputs[0].token_ids) for output in outputs])
    except Exception as error:  # any exception while loading is the answer
        return VllmAnswer(model, error=failure_reason("".join(traceback.format_exception(error)), 1))
    finally:
        del llm
        cleanup_dist_env_and_memory()


def main() -> None:
    """Read the request on standard input and write the answers to standard output."""
    request = json.load(sys.stdin)
    # vLLM also prints to standard output, so its output is redirected to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for model in request["models"]:
        answer = _answer(model, request["prompts"], request["greedy_tokens"])
        answers.write(json.dumps(answer.__dict__) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
