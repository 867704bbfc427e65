"""Log-probabilities of labels from full-precision logits, against a float64 softmax over the whole vocabulary."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.sample.sampler import Sampler

from slimserve.serve.engine import label_logits
from slimserve.serve.engine.logprobs import register
from slimserve.serve.engine.scoring import probabilities
from tests.serve.engine.test_logprobs import restore_vllm, sample

V, D, B = 200, 48, 6
PADDED = 256
"""Rows of the output layer in vLLM, which pads the vocabulary to a multiple of 64."""


@dataclass
class Head:
    """An output layer as vLLM keeps it, and what the reference knows about it."""

    weight_VD: Tensor
    """The layer in float64."""
    layer: Any
    checkpoint: Path | None = None
    bias_V: Tensor | None = None
    processor: dict[str, float] = field(default_factory=dict)


def plain(tmp_path: Path, **processor: float) -> Head:
    weight_VD = torch.zeros(PADDED, D, dtype=torch.bfloat16)
    weight_VD[:V] = torch.randn(V, D)
    layer = SimpleNamespace(
        weight=weight_VD, tp_size=1, quant_method=UnquantizedEmbeddingMethod(), cpu_linear=torch.nn.functional.linear
    )
    return Head(weight_VD[:V].double(), layer, processor=processor)


def biased(tmp_path: Path) -> Head:
    head = plain(tmp_path)
    head.bias_V = torch.randn(PADDED, dtype=torch.bfloat16)
    return head


def wrapped_for_lora(tmp_path: Path) -> Head:
    head = plain(tmp_path)
    head.layer = SimpleNamespace(base_layer=head.layer, **vars(head.layer))
    return head


def released(tmp_path: Path) -> Head:
    """Pack the layer and drop the original, as vLLM does if a quantization config leaves out `lm_head`."""
    head = plain(tmp_path)
    weight_VD = head.layer.weight
    save_file({"lm_head.weight": weight_VD[:V].clone()}, tmp_path / "model.safetensors")
    head.layer = SimpleNamespace(
        weight=torch.empty(0),
        tp_size=1,
        quant_method=UnquantizedLinearMethod(),
        cpu_linear=lambda x, _weight, bias: torch.nn.functional.linear(x, weight_VD, bias),
    )
    head.checkpoint = tmp_path
    return head


def int8(tmp_path: Path, scale_dims: int = 2) -> Head:
    codes_VD = torch.randint(-127, 128, (V, D), dtype=torch.int8)
    scale_V = torch.rand(V) * 0.02
    scale = scale_V[:, None] if scale_dims == 2 else scale_V
    tensors = {"model.lm_head.weight": codes_VD, "model.embed.weight": torch.zeros(1), "x.lm_head_norm.weight": scale_V}
    save_file(tensors, tmp_path / "model-00001-of-00002.safetensors")
    scales = {"model.lm_head.weight_scale": scale.to(torch.float32)}
    save_file(scales, tmp_path / "model-00002-of-00002.safetensors")
    files = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": files | dict.fromkeys(scales, "model-00002-of-00002.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    weight_VD = codes_VD.double() * scale_V.double()[:, None]

    def apply(_layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        return (x.double() @ weight_VD.T).to(torch.bfloat16)

    layer = SimpleNamespace(weight=None, tp_size=1, quant_method=SimpleNamespace(apply=apply))
    return Head(weight_VD, layer, tmp_path)


HEADS: dict[str, Callable[[Path], Head]] = {
    "plain": plain,
    "a soft cap (Gemma 2)": lambda path: plain(path, soft_cap=30.0),
    "a tight soft cap": lambda path: plain(path, soft_cap=2.0),
    "a divisor (Granite)": lambda path: plain(path, scale=1 / 8),
    "a factor (Cohere)": lambda path: plain(path, scale=0.0625),
    "a factor and a soft cap": lambda path: plain(path, scale=1.7, soft_cap=15.0),
    "a bias": biased,
    "a wrapper for LoRA": wrapped_for_lora,
    "packed, and released": released,
    "INT8": int8,
    "INT8 with scales of one dimension": lambda path: int8(path, scale_dims=1),
}


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    restore_vllm(monkeypatch)
    register()
    torch.manual_seed(3)
    label_logits._unavailable.cache_clear()


def step(head: Head, hidden_BD: Tensor, most_likely: int | None, labels: dict[int, list[int]]) -> Any:
    """Return the sampler's log-probabilities for one step."""
    return sample(Sampler(), logits_of(head, hidden_BD), most_likely, labels)


def processor_of(head: Head) -> LogitsProcessor:
    config: Any = VllmConfig()
    config.model_config = SimpleNamespace(head_dtype=torch.bfloat16, model=str(head.checkpoint or "no directory"))
    with set_current_vllm_config(config):
        return LogitsProcessor(PADDED, V, **head.processor)


def logits_of(head: Head, hidden_BD: Tensor) -> Tensor:
    logits_BV: Tensor = processor_of(head)(head.layer, hidden_BD, head.bias_V)
    assert logits_BV.shape == (len(hidden_BD), V)
    return logits_BV


def reference(head: Head, hidden_D: Tensor, rounded_V: Tensor, labels: list[int]) -> Tensor:
    """Return the labels' log-probabilities with exact logits of labels and the engine's logits of other tokens."""
    exact_V = head.weight_VD @ hidden_D.double()
    if head.bias_V is not None:
        exact_V = exact_V + head.bias_V[:V].double()
    if cap := head.processor.get("soft_cap"):
        exact_V = cap * torch.tanh(exact_V / cap)
    exact_V = exact_V * head.processor.get("scale", 1.0)
    assert (exact_V - rounded_V).abs().max() < 0.02 * exact_V.abs().max(), "the reference is not this layer"
    logits_V = rounded_V.double().clone()
    logits_V[labels] = exact_V[labels]
    return logits_V.log_softmax(-1)[labels]


@pytest.mark.parametrize("kind", HEADS)
def test_labels_get_the_log_probabilities_of_exact_logits(kind: str, tmp_path: Path) -> None:
    head = HEADS[kind](tmp_path)
    hidden_BD = torch.randn(B, D).to(torch.bfloat16)
    rounded_BV = logits_of(head, hidden_BD)
    best = int(rounded_BV[4].argmax())
    labels = {0: [5, 9], 1: [5, 9], 2: [7], 4: [best, 3, 199, 3, 0], 5: [11, best]}
    result = step(head, hidden_BD, None, labels)
    for row, tokens in labels.items():
        expected = reference(head, hidden_BD[row], rounded_BV[row], tokens)
        torch.testing.assert_close(result.logprobs[row, 1 : len(tokens) + 1].double(), expected, rtol=0, atol=2e-6)
        assert result.logprob_token_ids[row, 1 : len(tokens) + 1].tolist() == tokens
    assert result.logprobs[4, 0] == result.logprobs[4, 1], "the sampled token is a label and has one value"
    coarse = rounded_BV.float().log_softmax(-1)
    assert (result.logprobs[0, 1:3] - coarse[0, [5, 9]]).abs().max() > 1e-4, "the rounded logits would not do"


def test_ninety_documents_have_ninety_scores(tmp_path: Path) -> None:
    head = plain(tmp_path)
    # Documents differ little in the answer, so the logits have few values in bfloat16.
    hidden_BD = (torch.randn(1, D) * 2 + torch.randn(90, D) * 0.02).to(torch.bfloat16)
    labels = [3, 4]
    with torch.no_grad():
        head.layer.weight[4] = head.layer.weight[3] + 0.1 * torch.randn(D)
        head.weight_VD[labels] = head.layer.weight[labels].double()

    def scores(logprobs: Tensor) -> list[float]:
        return [probabilities(row, apply_softmax=True)[0] for row in logprobs.tolist()]

    ours = scores(step(head, hidden_BD, None, dict.fromkeys(range(90), labels)).logprobs[:, 1:])
    rounded = scores(logits_of(head, hidden_BD).float().log_softmax(-1)[:, labels])
    exact = scores((hidden_BD.double() @ head.weight_VD.T)[:, labels])
    assert len(set(rounded)) < 30
    assert len(set(ours)) == 90
    agree = sum((a < b) == (c < d) for (a, c), (b, d) in itertools.combinations(zip(ours, exact, strict=True), 2))
    assert agree == 90 * 89 / 2


def test_completions_in_the_step_keep_their_log_probabilities(tmp_path: Path) -> None:
    head = plain(tmp_path)
    hidden_BD = torch.randn(B, D).to(torch.bfloat16)
    alone = step(head, hidden_BD, 3, {})
    mixed = step(head, hidden_BD, 3, {1: [2, 3], 4: [8]})
    for row in (0, 2, 3, 5):
        assert torch.equal(mixed.logprobs[row, :4], alone.logprobs[row, :4])
        assert torch.equal(mixed.logprob_token_ids[row, :4], alone.logprob_token_ids[row, :4])
    assert mixed.selected_token_ranks.tolist() == alone.selected_token_ranks.tolist()


def test_equal_inputs_have_equal_scores_in_batches_of_any_size(tmp_path: Path) -> None:
    head = plain(tmp_path)
    hidden_BD = torch.randn(64, D).to(torch.bfloat16)
    hidden_BD[40] = hidden_BD[3]
    together = step(head, hidden_BD, None, {row: [5, 9] for row in range(64)}).logprobs
    assert torch.equal(together[3], together[40])
    for row in (0, 17, 63):
        alone = step(head, hidden_BD[row : row + 1], None, {0: [5, 9]}).logprobs
        assert torch.equal(alone[0], together[row])


def test_a_lora_adapter_of_the_output_layer_counts(tmp_path: Path) -> None:
    head = plain(tmp_path)
    hidden_BD = torch.randn(B, D).to(torch.bfloat16)
    down, up = torch.randn(2, 1, 4, D).to(torch.bfloat16), torch.randn(2, 1, V, 4).to(torch.bfloat16)
    adapters = torch.tensor([0, 1, 1, 0, 1, 0])
    processor = SimpleNamespace(
        lora_a_stacked=down,
        lora_b_stacked=up,
        punica_wrapper=SimpleNamespace(sampler_indices=adapters),
        soft_cap=None,
        scale=1.0,
    )
    logits_BV = torch.zeros(B, V, dtype=torch.bfloat16)
    product = label_logits.HeadProduct(processor, head.layer, hidden_BD, None, logits_BV)
    rows, tokens = torch.tensor([1, 3, 4]), torch.tensor([9, 2])
    ours = label_logits.exact_logits(product, rows, tokens)
    for index, row in enumerate(rows.tolist()):
        adapter = up[adapters[row], 0].double() @ down[adapters[row], 0].double()
        expected = ((head.weight_VD + adapter) @ hidden_BD[row].double())[tokens]
        assert ours is not None
        torch.testing.assert_close(ours[index], expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tp_size": 2}, "split between processes"),
        ({"quant_method": SimpleNamespace(), "weight": torch.zeros(V, D // 2, dtype=torch.int8)}, "no checkpoint"),
    ],
)
def test_the_engines_logits_remain_where_no_rows_are_available(
    change: dict[str, Any], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = plain(tmp_path)
    logits_BV = logits_of(head, torch.randn(B, D).to(torch.bfloat16))
    vars(head.layer).update(change)
    result = sample(Sampler(), logits_BV, None, {1: [4, 2]})
    expected = logits_BV.float().log_softmax(-1)[1, [4, 2]]
    assert torch.equal(result.logprobs[1, 1:3], expected)
    assert [record for record in caplog.records if reason in record.message]


@pytest.mark.parametrize(
    "tensors",
    [
        {"lm_head.weight_packed": torch.zeros(V, 6, dtype=torch.int32)},
        {"lm_head.weight": torch.zeros(V, D, dtype=torch.int8)},
        {"lm_head.weight": torch.zeros(V, D).to(torch.float8_e4m3fn), "lm_head.weight_scale": torch.ones(1)},
        {"model.embed_tokens.weight": torch.zeros(V, D)},
        {},
    ],
    ids=["packed", "INT8 without scales", "FP8", "no output layer", "no weights"],
)
def test_other_formats_of_the_output_layer_are_not_misread(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    if tensors:
        save_file(tensors, tmp_path / "model.safetensors")
    assert label_logits._checkpoint_row(tmp_path, 3) is None


COMPARED = {"extra_args": {label_logits.LABELS_ALONE: True}, "max_tokens": 1}


class Engine:
    """An output layer and its processor in a process whose model runner knows the requests of the step."""

    def __init__(self, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
        self.head, self.runner = head, SimpleNamespace(speculative_config=None)
        monkeypatch.setattr(label_logits, "_runner", [self.runner])
        self.processor = processor_of(head)
        self.logits(torch.zeros(1, D, dtype=torch.bfloat16), {})
        assert not self.leaves_out, "no step has shown yet that the sampler gets the logits unchanged"
        self.step(torch.zeros(1, D, dtype=torch.bfloat16), {0: [1]})

    @property
    def leaves_out(self) -> bool:
        return bool(self.last_logits.shape[1] == 0)

    def logits(self, hidden_BD: Tensor, params: dict[str, Any]) -> Tensor:
        requests = [SamplingParams(**(COMPARED | params)) for _ in hidden_BD]
        self.runner.input_batch = SimpleNamespace(req_ids=[str(row) for row in range(len(requests))])
        self.runner.requests = {str(row): SimpleNamespace(sampling_params=one) for row, one in enumerate(requests)}
        self.last_logits: Tensor = self.processor(self.head.layer, hidden_BD, self.head.bias_V)
        return self.last_logits

    def step(self, hidden_BD: Tensor, labels: dict[int, list[int]], **params: Any) -> Any:
        return sample(Sampler(), self.logits(hidden_BD, params), None, labels)


@pytest.mark.parametrize("kind", HEADS)
def test_steps_that_compare_labels_compute_no_other_logits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(HEADS[kind](tmp_path), monkeypatch)
    hidden_BD = torch.randn(B, D).to(torch.bfloat16)
    labels = {0: [5, 9], 1: [9, 5], 2: [7], 4: [8, 3, 199, 0], 5: [5, 9]}
    result = engine.step(hidden_BD, labels)
    assert engine.leaves_out
    rounded_BV = logits_of(engine.head, hidden_BD)
    for row, tokens in labels.items():
        expected = reference(engine.head, hidden_BD[row], rounded_BV[row], tokens).log_softmax(-1)
        torch.testing.assert_close(result.logprobs[row, 1 : len(tokens) + 1].double(), expected, rtol=0, atol=2e-6)
        assert result.logprob_token_ids[row, : len(tokens) + 1].tolist() == [tokens[expected.argmax()], *tokens]
        assert result.logprobs[row, 0] == result.logprobs[row, 1 : len(tokens) + 1].max()


def test_a_step_of_warm_calls_alone_has_no_log_probabilities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(plain(tmp_path), monkeypatch)
    assert engine.step(torch.randn(B, D).to(torch.bfloat16), {}) is None
    assert engine.leaves_out


@pytest.mark.parametrize(
    "params",
    [
        {"extra_args": None},
        {"extra_args": {"other": 1}},
        {"max_tokens": 2},
        {"logprobs": 1},
        {"prompt_logprobs": 1},
        {"structured_outputs": StructuredOutputsParams(json={})},
    ],
    ids=str,
)
def test_a_request_that_asks_for_more_gets_all_logits(
    params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(plain(tmp_path), monkeypatch)
    engine.logits(torch.randn(B, D).to(torch.bfloat16), params)
    assert not engine.leaves_out


def test_other_rows_and_draft_tokens_get_all_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(plain(tmp_path), monkeypatch)
    hidden_BD = torch.randn(B, D).to(torch.bfloat16)
    assert engine.logits(hidden_BD, {}).shape == (B, 0)
    # Prompt log-probabilities need the logits of other positions than the last ones of the requests.
    assert engine.processor(engine.head.layer, hidden_BD[:3]).shape == (3, V)
    engine.runner.speculative_config = object()
    assert engine.logits(hidden_BD, {}).shape == (B, V)


def test_without_the_labels_rows_the_product_is_computed_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(plain(tmp_path), monkeypatch)
    hidden_BD = torch.randn(B, D).to(torch.bfloat16)
    expected = logits_of(engine.head, hidden_BD).float().log_softmax(-1)
    monkeypatch.setattr(label_logits, "_head_rows", lambda _product, _tokens: None)
    result = engine.step(hidden_BD, {1: [4, 2]})
    assert engine.leaves_out
    assert torch.equal(result.logprobs[1, 1:3], expected[1, [4, 2]])


def test_logits_that_other_code_replaced_are_left_alone(tmp_path: Path) -> None:
    head = plain(tmp_path)
    other_BV = logits_of(head, torch.randn(B, D).to(torch.bfloat16)) * 2
    result = sample(Sampler(), other_BV, None, {1: [4, 2]})
    assert torch.equal(result.logprobs[1, 1:3], other_BV.float().log_softmax(-1)[1, [4, 2]])
