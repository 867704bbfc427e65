"""Tests of FLOPs against torch's counter and a count by hand, and of peak memory against a known allocation."""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from slimserve.distill.cost import ModelShape, PeakMemory, training_flops
from slimserve.distill.models import with_lora

SHAPE = ModelShape(
    hidden_size=24, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=6, mlp_size=44, vocab_size=49_152
)


def test_a_shape_is_read_from_a_config(tiny_student: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny_student).config.to_dict()
    assert ModelShape.of(config) == SHAPE
    # q and o are 36 x 24, k and v 12 x 24, the MLP's three 44 x 24.
    assert SHAPE.block_weights == 2 * (2 * 36 * 24 + 2 * 12 * 24 + 3 * 44 * 24)


def test_linear_layers_are_counted_as_torch_counts_them(tiny_student: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_student, attn_implementation="eager")
    tokens = torch.arange(2 * 15).view(2, 15)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, use_cache=False)
    # Torch counts the full attention matrix; we count only the causal half.
    flops_per_pair = 4 * SHAPE.num_layers * SHAPE.num_heads * SHAPE.head_dim
    attention_all, attention_half = flops_per_pair * 2 * 15 * 15, flops_per_pair * 2 * 15 * 16 / 2
    ours = SHAPE.forward_flops([15, 15], 30)
    # We leave out the small product that computes the rotary embedding's frequencies.
    assert ours - attention_half + attention_all == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_a_step_costs_three_forward_passes_and_a_fourth_with_checkpointing() -> None:
    alone = training_flops(SHAPE, [7, 9], 5)
    assert alone == 3 * SHAPE.forward_flops([7, 9], 5)
    again = training_flops(SHAPE, [7, 9], 5, is_checkpointed=True)
    assert again - alone == SHAPE.block_flops([7, 9])


def test_half_the_tokens_cost_less_than_half_the_flops() -> None:
    assert training_flops(SHAPE, [1024], 512) < 0.5 * training_flops(SHAPE, [2048], 1024)


def test_lora_is_counted_as_torch_counts_it(tiny_student: Path) -> None:
    shape = replace(SHAPE, lora_rank=3)
    model: Any = with_lora(AutoModelForCausalLM.from_pretrained(tiny_student, attn_implementation="eager"), 3, 0)
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    # By hand: q and o are 36 x 24, k and v 12 x 24, the MLP's three 44 x 24.
    assert shape.adapter_weights == sum(trained) == 2 * 3 * (2 * (36 + 24) + 2 * (12 + 24) + 3 * (44 + 24))
    tokens = torch.arange(2 * 15).view(2, 15)
    with FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False).logits.sum().backward()
    num_tokens = 30
    # Torch counts the full attention matrix, forward and backward; we count only the causal half.
    flops_per_pair = 4 * SHAPE.num_layers * SHAPE.num_heads * SHAPE.head_dim
    attention = 3 * flops_per_pair * (2 * 15 * 15 - 2 * 15 * 16 / 2)
    # The first layer's q, k and v need no gradient of their inputs, which are the frozen embeddings; we count them.
    first_inputs = 2 * num_tokens * ((36 + 2 * 12) * 24 + 3 * 3 * 24)
    ours = training_flops(shape, [15, 15], num_tokens)
    assert ours + attention - first_inputs == pytest.approx(counter.get_total_flops(), rel=1e-3)
    # Frozen weights cost two products and adapters three, where trained weights cost three.
    saved = 2 * num_tokens * SHAPE.block_weights + SHAPE.head_flops(num_tokens)
    added = 3 * 2 * num_tokens * shape.adapter_weights
    assert ours == training_flops(SHAPE, [15, 15], num_tokens) - saved + added


def test_a_sampled_reply_is_counted_as_torch_counts_its_generation(tiny_student: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_student, attn_implementation="eager")
    prompt, num_reply = torch.arange(11)[None], 5
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.generate(prompt, max_new_tokens=num_reply, min_new_tokens=num_reply, do_sample=False, pad_token_id=0)
    # The pass over the prompt has all 11 x 11 pairs in torch's count; each later token sees all before it.
    flops_per_pair = 4 * SHAPE.num_layers * SHAPE.num_heads * SHAPE.head_dim
    ours = SHAPE.sampling_flops([(11, num_reply)]) + flops_per_pair * (11 * 11 - 11 * 12 / 2)
    assert ours == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_peak_memory_includes_memory_that_was_freed() -> None:
    memory = PeakMemory()
    memory.reset()
    before = memory.now_bytes()
    with mmap.mmap(-1, 64 * 2**20) as block:  # the heap may have this much free memory and not grow
        block.write(bytes(64 * 2**20))
    assert memory.peak_bytes() - before > 60 * 2**20
