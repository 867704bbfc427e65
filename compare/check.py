"""Checks that a variant loads: tensor shapes, stock transformers and stock vLLM, and equal logits from all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimserve.compress.decoder import decoder_of
from slimserve.compress.formats import find_format
from slimserve.compress.reference import reference_logits, reference_shapes
from slimserve.core.catalogue import Catalogue, read_catalogue
from slimserve.core.device import choose_device
from slimserve.core.errors import UserError
from slimserve.core.hardware import probe_hardware
from slimserve.core.model_config import read_decoder_config
from slimserve.core.storage import cache_dir
from slimserve.core.tokenizer import load_tokenizer
from slimserve.distill.item_checkpoint import check_catalogue
from slimserve.serve.engine.offline import VllmAnswer, ask_vllm

_NUM_PROMPTS, _NUM_TOKENS, _GREEDY_TOKENS = 2, 48, 12


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    passed: bool
    detail: str


def check_variant(directory: Path, device: str = "cpu") -> Iterator[Finding]:
    """Run the checks one after another, cheap ones first; a wrong shape ends them, because nothing would load.

    Plain torch and transformers compute on `device`; vLLM chooses its own.
    """
    chosen = choose_device(device)
    config = read_decoder_config(directory)
    decoder_of(config)  # raises for a model that is no decoder
    shapes = _compare_shapes(directory)
    yield shapes
    if not shapes.passed:
        return
    catalogue = read_catalogue(directory)
    if catalogue is not None:
        yield _compare_catalogue(directory, catalogue)
    prompts = model_prompts(config["vocab_size"])
    reference = reference_logprobs(directory, prompts, chosen)
    finite = bool(torch.isfinite(reference.exact).all())
    yield Finding("plain torch", finite, "logits are finite" if finite else "logits are NaN or infinite")
    yield _compare("transformers", reference, _ask_transformers(directory, prompts, chosen))
    refusal = _gpu_reason(config)
    if refusal is not None:
        yield Finding("vLLM", True, f"not asked on this machine: {refusal}")
        return
    log = cache_dir("logs") / f"check-{directory.name}.log"
    answer = next(ask_vllm([directory], [prompt.tolist() for prompt in prompts], _GREEDY_TOKENS, log))
    yield _compare("vLLM", reference, answer, f"read {log}")
    if not answer.error:
        yield Finding("greedy text", True, repr(load_tokenizer(directory).decode(answer.greedy[0])))


def _compare_catalogue(directory: Path, catalogue: Catalogue) -> Finding:
    """Check that tokenizer, embedding and output layer fit the catalogue, so that items are read and never written."""
    try:
        check_catalogue(directory, catalogue)
    except UserError as error:
        return Finding("catalogue", False, str(error))
    length = f"{catalogue.tokens_per_item} token{'s' if catalogue.tokens_per_item > 1 else ''}"
    used = f"{len(catalogue.tokens)} of {catalogue.num_slots} slots are items of {length}"
    return Finding("catalogue", True, f"{used}, which the model reads and never writes")


def _gpu_reason(config: Mapping[str, Any]) -> str | None:
    """Return the reason why vLLM has no kernel for the model on this machine; None if it may have one."""
    quantization = config.get("quantization_config")
    quant_format = find_format(quantization) if quantization else None
    if quant_format is None or not quant_format.needs_gpu or probe_hardware().gpus:
        return None
    return quant_format.gpu_reason


def _compare_shapes(directory: Path) -> Finding:
    """Compare the shapes that transformers makes from the config with those in the files, unpacked if quantized."""
    config = read_decoder_config(directory)
    decoder = decoder_of(config)
    expected, actual = dict(decoder.shapes), reference_shapes(directory)
    if decoder.is_tied:
        actual.pop(decoder.head, None)
    wrong = [
        f"{name}: {actual.get(name, 'missing')} in the file, {expected.get(name, 'nothing')} according to the config"
        for name in sorted(expected.keys() | actual.keys())
        if expected.get(name) != actual.get(name)
    ]
    return Finding("shapes", not wrong, "; ".join(wrong[:3]) if wrong else f"{len(actual)} tensors match config.json")


def model_prompts(vocabulary: int) -> list[Tensor]:
    """Return prompts of random tokens, which are the same for all models with a vocabulary of this size."""
    draw = torch.Generator().manual_seed(0)
    return list(torch.randint(0, vocabulary, (_NUM_PROMPTS, _NUM_TOKENS), generator=draw))


def _logprobs(logits_TV: Tensor, tokens_T: Tensor) -> Tensor:
    """Return the log-probability of each token except the first."""
    return logits_TV.log_softmax(-1)[:-1].gather(1, tokens_T[1:, None])[:, 0]


@torch.inference_mode()
def _ask_transformers(directory: Path, prompts: list[Tensor], device: torch.device) -> VllmAnswer:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(device)
        logits = [model(prompt[None].to(device)).logits[0].float().cpu() for prompt in prompts]
        logprobs = [_logprobs(*pair).tolist() for pair in zip(logits, prompts, strict=True)]
    except Exception as error:  # loading may raise anything, and this is the result of the check
        return VllmAnswer(str(directory), error=f"{type(error).__name__}: {error}"[:500])
    return VllmAnswer(str(directory), logprobs)


@dataclass(frozen=True)
class Reference:
    """Log-probabilities in plain torch of all tokens except each prompt's first, concatenated."""

    exact: Tensor
    """Computed in float32."""
    rounded: Tensor
    """Computed in bf16, as engines do."""


def reference_logprobs(directory: Path, prompts: Sequence[Tensor], device: torch.device | str = "cpu") -> Reference:
    """Compute the exact log-probabilities of a checkpoint for `prompts`, and the same with bf16 rounding."""

    def logprobs(dtype: torch.dtype) -> Tensor:
        logits = reference_logits(directory, prompts, dtype, device)
        return torch.cat([_logprobs(*pair) for pair in zip(logits, prompts, strict=True)])

    return Reference(logprobs(torch.float32), logprobs(torch.bfloat16))


def deviations(reference: Reference, answer: VllmAnswer) -> tuple[float, float]:
    """Return the mean absolute difference in nats of an answer from plain torch, and that of plain torch in bf16.

    The second value is the effect of rounding alone. It is small for a dense model and larger with 8-bit activations,
    because an activation near the middle of two steps may be rounded to either side.
    """
    given = torch.tensor([value for row in answer.logprobs for value in row])
    off, noise = (reference.exact - given).abs().mean(), (reference.exact - reference.rounded).abs().mean()
    return float(off), float(noise)


def tolerance(noise: float) -> float:
    """Return the largest accepted difference in nats if bf16 alone causes `noise`; a wrong weight causes far more."""
    return 0.03 + 2 * noise


def _compare(name: str, reference: Reference, answer: VllmAnswer, hint: str = "") -> Finding:
    if answer.error:
        return Finding(name, False, f"does not load: {answer.error}" + (f"; {hint}" if hint else ""))
    off, noise = deviations(reference, answer)
    detail = f"log-probabilities differ by {off:.3f} nats on average; bf16 rounding alone causes {noise:.3f}"
    return Finding(name, off < tolerance(noise), detail)
