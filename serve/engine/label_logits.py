"""Logits of label tokens in full precision, and steps that compute no other logits.

An engine in bfloat16 rounds every logit to 8 bits: between 16 and 32 to a multiple of 0.125. The difference of two
labels then has a handful of values, and many documents of a rerank request tie. This module keeps what went into the
output layer in each step, and computes the labels' logits again from it with products in float64. That costs one row
of the output layer per label, where the step itself computes all of them.

The rows come from the layer in memory. vLLM packs INT8 output layers, and those that a quantization config leaves
out, and drops the originals; their rows come from the checkpoint. For an INT8 layer, the rows are the INT8 codes times
their scales, and the inputs are not rounded to INT8. Where no rows are available (tensor parallelism, other packed
formats), the logits of the engine remain, and the log says so once.

Requests that compare labels with each other need no other logits (`LABELS_ALONE`). A step in which all requests do so
leaves the product out, and the sampler takes the labels' logits alone (logprobs.py). The output layer and the sampler
otherwise take time in proportion to the vocabulary, which has every item of a catalogue. A processor leaves products
out only after a step has shown that the model hands its logits to the sampler unchanged.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimserve.core.errors import UserError
from slimserve.core.model_files import read_tensors

_MAX_CACHED_ROWS = 4096
_log = logging.getLogger("slimserve.labels")
EXACT_VARIABLE = "SLIMSERVE_EXACT_SCORES"
"""Environment variable that leaves the engine's rounded logits as they are if it is 0, to measure what this costs."""
LABELS_ALONE = "slimserve_labels_alone"
"""Key of a request's `extra_args`: true if its labels are only compared with each other, or if it has no labels and its
token is not used."""


@dataclass(frozen=True)
class HeadProduct:
    """One product of an output layer: what went in, and the logits that came out."""

    processor: Any
    """vLLM's LogitsProcessor, or its wrapper if LoRA adapters may change the output layer."""
    head: Any
    """vLLM's ParallelLMHead, or the embedding that is tied to it."""
    hidden_BD: Tensor
    bias_V: Tensor | None
    logits_BV: Tensor
    """With V = 0 if the product was left out."""

    @property
    def is_left_out(self) -> bool:
        return bool(self.logits_BV.shape[1] == 0)

    def computed(self) -> HeadProduct:
        """Return the product with its logits."""
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        vllm_forward = LogitsProcessor.vllm_methods["forward"]
        return replace(self, logits_BV=vllm_forward(self.processor, self.head, self.hidden_BD, self.bias_V))


_last: list[HeadProduct] = []
"""The latest product; empty once the sampler has used it."""
_runner: list[Any] = []
"""The model runner of this process, which knows the requests of a step."""


def register() -> None:
    """Make vLLM's LogitsProcessor keep its latest product, and remember the directory of its model."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    if hasattr(LogitsProcessor, "vllm_methods") or os.environ.get(EXACT_VARIABLE) == "0":
        return
    vllm_init, vllm_forward = LogitsProcessor.__init__, LogitsProcessor.forward

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        vllm_init(self, *args, **kwargs)
        model = get_current_vllm_config().model_config
        self.checkpoint = Path(model.model) if model is not None else None
        self.can_leave_out = False
        _remember_runner()

    def forward(
        self: Any, lm_head: Any, hidden_states: Tensor, embedding_bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor | None:
        _last.clear()
        if getattr(self, "can_leave_out", False) and _compares_labels(lm_head, len(hidden_states)):
            nothing = hidden_states.new_empty(len(hidden_states), 0)
            _last.append(HeadProduct(self, lm_head, hidden_states, embedding_bias, nothing))
            return nothing
        logits: Tensor | None = vllm_forward(self, lm_head, hidden_states, embedding_bias, *args, **kwargs)
        if logits is not None and logits.dtype != torch.float32 and not self.logits_as_input:
            _last.append(HeadProduct(self, lm_head, hidden_states, embedding_bias, logits))
        return logits

    LogitsProcessor.__init__ = init
    LogitsProcessor.forward = forward
    LogitsProcessor.vllm_methods = {"__init__": vllm_init, "forward": vllm_forward}


def _remember_runner() -> None:
    """Make vLLM's model runner known to this module from its next step on; not vLLM's second GPU runner."""
    module = sys.modules.get("vllm.v1.worker.gpu_model_runner")
    runner = getattr(module, "GPUModelRunner", None)
    if runner is None or hasattr(runner, "vllm_execute_model"):
        return
    vllm_execute_model = runner.execute_model

    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        _runner[:] = [self]
        return vllm_execute_model(self, *args, **kwargs)

    runner.execute_model = execute_model
    runner.vllm_execute_model = vllm_execute_model


def _compares_labels(head: Any, num_rows: int) -> bool:
    """Tell whether all requests of the present step, one for each row, compare labels only."""
    if not _runner or getattr(head, "base_layer", head).tp_size > 1:
        return False
    runner = _runner[0]
    names = runner.input_batch.req_ids
    if len(names) != num_rows or runner.speculative_config is not None:
        return False
    return all(_is_comparison(runner.requests[name].sampling_params) for name in names)


def _is_comparison(params: Any) -> bool:
    """Tell whether a request reads nothing but labels. Any client can set `extra_args`, so all else is checked too."""
    return (
        params is not None
        and bool((params.extra_args or {}).get(LABELS_ALONE))
        and params.max_tokens == 1
        and params.logprobs is None
        and params.prompt_logprobs is None
        and params.structured_outputs is None
    )


def take_product(logits_BV: Tensor) -> HeadProduct | None:
    """Return the product that gave `logits_BV`, and forget it.

    Return None if there is none: the logits are float32 already, or other code has changed them since.
    """
    product = _last.pop() if _last else None
    if product is None or product.logits_BV is not logits_BV:
        return None
    product.processor.can_leave_out = True
    return product


def refine(logprobs_L: Tensor, rounded_L: Tensor, exact_L: Tensor, first_L: Tensor) -> Tensor:
    """Return log-probabilities over the vocabulary in which the logits `rounded` are replaced by `exact`.

    All tensors have shape `[..., L]`. `first` is false for a label that repeats an earlier one of its request. The sum
    over the vocabulary changes with the labels' logits, so that the probabilities still sum to 1.
    """
    old = logprobs_L.double()
    change = torch.where(torch.isfinite(rounded_L), exact_L - rounded_L, 0.0)
    grown = (old.exp() * change.expm1() * first_L).sum(-1, keepdim=True)
    return (old + change - grown.log1p()).to(logprobs_L.dtype)


def exact_logits(product: HeadProduct, rows: Tensor, tokens: Tensor) -> Tensor | None:
    """Return the logits `[R, L]` of some rows and tokens (indices) in float64.

    Return None if the rows of the output layer are not available.
    """
    weight_LD = _head_rows(product, tokens)
    if weight_LD is None:
        return None
    processor = product.processor
    hidden_RD = product.hidden_BD[rows].double()
    logits_RL = hidden_RD @ weight_LD.T
    if product.bias_V is not None:
        logits_RL += product.bias_V[tokens].double()
    if hasattr(processor, "lora_a_stacked"):
        adapters_R = processor.punica_wrapper.sampler_indices[rows]
        down_RKD = processor.lora_a_stacked[adapters_R, 0].double()
        up_RLK = processor.lora_b_stacked[adapters_R[:, None], 0, tokens].double()
        logits_RL += torch.einsum("rd,rkd,rlk->rl", hidden_RD, down_RKD, up_RLK)
    if processor.soft_cap is not None:
        logits_RL = torch.tanh(logits_RL / processor.soft_cap) * processor.soft_cap
    return logits_RL * processor.scale


def _head_rows(product: HeadProduct, tokens: Tensor) -> Tensor | None:
    """Return the rows `[L, D]` of the output layer in float64, from memory or from the checkpoint."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    head = getattr(product.head, "base_layer", product.head)
    size = product.hidden_BD.shape[1]
    if head.tp_size > 1:
        return _unavailable("the output layer is split between processes")
    weight = getattr(head, "weight", None)
    is_plain = isinstance(head.quant_method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod)
    if is_plain and weight is not None and weight.ndim == 2 and weight.shape[1] == size:
        rows: Tensor = weight[tokens]
        return rows.double()
    checkpoint = getattr(product.processor, "base_layer", product.processor).checkpoint
    if checkpoint is None or not checkpoint.is_dir():
        return _unavailable("the output layer is packed, and there is no checkpoint on disk")
    read = [_checkpoint_row(checkpoint, token) for token in tokens.tolist()]
    complete = [row for row in read if row is not None and len(row) == size]
    if len(complete) < len(read):
        return _unavailable("the checkpoint has no output layer in a plain format or in INT8")
    return torch.stack(complete).to(product.hidden_BD.device)


@lru_cache(_MAX_CACHED_ROWS)
def _checkpoint_row(directory: Path, token: int) -> Tensor | None:
    """Return one row `[D]` of the output layer in float64; None if it is not stored in a plain format or in INT8."""
    from safetensors import safe_open

    weight_file, scale_file = (_head_files(directory).get(suffix) for suffix in ("weight", "weight_scale"))
    if weight_file is None:
        return None
    with safe_open(weight_file[0], framework="pt") as tensors:
        row: Tensor = tensors.get_slice(weight_file[1])[token]
    if row.dtype != torch.int8:
        is_plain = row.dtype in {torch.bfloat16, torch.float16, torch.float32} and scale_file is None
        return row.double() if is_plain else None
    if scale_file is None:
        return None
    with safe_open(scale_file[0], framework="pt") as tensors:
        scale = tensors.get_tensor(scale_file[1]).reshape(-1)
    return row.double() * scale[token].double() if token < len(scale) else None


@lru_cache(4)
def _head_files(directory: Path) -> dict[str, tuple[Path, str]]:
    """Return file and name of each tensor of the output layer by suffix; nothing if INT8 codes have zero points."""
    try:
        tensors = read_tensors(directory)
    except UserError:
        return {}
    parts = {
        name.rpartition(".")[2]: (header.file, name) for name, header in tensors.items() if ".lm_head." in f".{name}"
    }
    return {} if "weight_zero_point" in parts else parts


@lru_cache(8)
def _unavailable(reason: str) -> None:
    """Say once why the logits of the engine remain."""
    _log.warning("label scores keep the engine's rounded logits: %s", reason)
