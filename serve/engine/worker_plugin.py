"""vLLM's general plugin: vLLM calls `register` in each of its processes before it builds the model."""

from __future__ import annotations


def register() -> None:
    """Apply our changes to vLLM: the matrix products, and label log-probabilities."""
    from slimserve.serve.engine.gemm import register_gemm, register_int8_inputs
    from slimserve.serve.engine.logprobs import register as register_logprobs

    register_gemm()
    register_int8_inputs()
    register_logprobs()
