"""Proof that a variant loads: its shapes against its config, stock transformers, stock vLLM, and the logits of all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slimserve.compress.families import roles_of
from slimserve.compress.reference import reference_logits, reference_shapes
from slimserve.core.errors import UserError
from slimserve.core.storage import cache_dir
from slimserve.serve.engine.offline import VllmAnswer, ask_vllm

_NUM_PROMPTS, _NUM_TOKENS, _GREEDY_TOKENS = 2, 48, 12


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    passed: bool
    detail: str


def check_variant(directory: Path) -> Iterator[Finding]:
    """Look at one thing after another, the cheap ones first; a wrong shape ends it, since nothing would load."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    roles_of(config)
    shapes = _compare_shapes(directory)
    yield shapes
    if not shapes.passed:
        return
    prompts = _prompts(config["vocab_size"])
    reference = reference_logprobs(directory, prompts)
    finite = bool(torch.isfinite(reference.exact).all())
    yield Finding("plain torch", finite, "logits are finite" if finite else "logits are NaN or infinite")
    yield _compare("transformers", reference, _ask_transformers(directory, prompts))
    log = cache_dir("logs") / f"check-{directory.name}.log"
    answer = next(ask_vllm([directory], [prompt.tolist() for prompt in prompts], _GREEDY_TOKENS, log))
    yield _compare("vLLM", reference, answer, f"read {log}")
    if not answer.error:
        yield Finding("greedy text", True, _text(directory, answer.greedy[0]))


def _compare_shapes(directory: Path) -> Finding:
    """Shapes that transformers would make from the config against those of the file, quantized ones unpacked."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        expected = {
            name: tuple(tensor.shape) for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    found = reference_shapes(directory)
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
        found.pop("lm_head.weight", None)
    wrong = [
        f"{name}: {found.get(name, 'missing')} in the file, {expected.get(name, 'nothing')} by the config"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    return Finding("shapes", not wrong, "; ".join(wrong[:3]) if wrong else f"{len(found)} tensors as config.json says")


def _prompts(vocabulary: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return list(torch.randint(0, vocabulary, (_NUM_PROMPTS, _NUM_TOKENS), generator=draw))


def _logprobs(logits_TV: Tensor, tokens_T: Tensor) -> Tensor:
    """Log-probability of each token but the first."""
    return logits_TV.log_softmax(-1)[:-1].gather(1, tokens_T[1:, None])[:, 0]


@torch.inference_mode()
def _ask_transformers(directory: Path, prompts: list[Tensor]) -> VllmAnswer:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        logprobs = [_logprobs(model(prompt[None]).logits[0].float(), prompt).tolist() for prompt in prompts]
    except Exception as error:  # whatever loading raises is the finding
        return VllmAnswer(str(directory), error=f"{type(error).__name__}: {error}"[:500])
    return VllmAnswer(str(directory), logprobs)


@dataclass(frozen=True)
class Reference:
    """Log-probabilities of all prompts' tokens but the first, in plain torch, one after the other."""

    exact: Tensor
    """Computed in float32."""
    rounded: Tensor
    """Computed in bf16, as engines do."""


def reference_logprobs(directory: Path, prompts: Sequence[Tensor]) -> Reference:
    """What a checkpoint should give to `prompts`, and what bf16 makes of it."""
    exact, rounded = (
        torch.cat([_logprobs(*pair) for pair in zip(reference_logits(directory, prompts, dtype), prompts, strict=True)])
        for dtype in (torch.float32, torch.bfloat16)
    )
    return Reference(exact, rounded)


def deviations(reference: Reference, answer: VllmAnswer) -> tuple[float, float]:
    """Mean absolute difference, in nats, of an answer from plain torch, and of that from itself in bf16.

    The second is what rounding alone does: little in a dense model, more where activations are rounded to 8 bits,
    since one that lies near the middle of two steps may fall to either side.
    """
    given = torch.tensor([value for row in answer.logprobs for value in row])
    off, noise = (reference.exact - given).abs().mean(), (reference.exact - reference.rounded).abs().mean()
    return float(off), float(noise)


def tolerance(noise: float) -> float:
    """The difference that passes, in nats, where bf16 alone makes `noise`; a wrong weight gives many times that."""
    return 0.03 + 2 * noise


def _compare(what: str, reference: Reference, answer: VllmAnswer, hint: str = "") -> Finding:
    if answer.error:
        return Finding(what, False, f"does not load: {answer.error}" + (f"; {hint}" if hint else ""))
    off, noise = deviations(reference, answer)
    said = f"log-probabilities differ by {off:.3f} nats on average, where bf16 alone makes {noise:.3f}"
    return Finding(what, off < tolerance(noise), said)


def _text(directory: Path, tokens: list[int]) -> str:
    from transformers import AutoTokenizer

    try:
        return repr(AutoTokenizer.from_pretrained(directory).decode(tokens))
    except Exception as error:  # a tokenizer that does not load is a finding of its own
        raise UserError("tokenizer", directory, f"cannot be loaded ({error})", "restore its files") from error
