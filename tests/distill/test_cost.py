"""Tests of FLOPs against torch's counter and a count by hand, and of peak memory against a known allocation."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from slimserve.distill.cost import ModelShape, PeakMemory, training_flops

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
    ours = SHAPE.block_flops([15, 15]) + SHAPE.head_flops(30)
    # We leave out the small product that computes the rotary embedding's frequencies.
    assert ours - attention_half + attention_all == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_a_step_costs_three_forward_passes_plus_the_teachers() -> None:
    teacher = ModelShape(36, 3, 6, 2, 6, 44, 100)
    alone = training_flops(SHAPE, None, [7, 9], 5)
    assert alone == 3 * (SHAPE.block_flops([7, 9]) + SHAPE.head_flops(5))
    both = training_flops(SHAPE, teacher, [7, 9], 5)
    assert both - alone == teacher.block_flops([7, 9]) + teacher.head_flops(5)
    again = training_flops(SHAPE, None, [7, 9], 5, is_checkpointed=True)
    assert again - alone == SHAPE.block_flops([7, 9])


def test_half_the_tokens_cost_less_than_half_the_flops() -> None:
    assert training_flops(SHAPE, SHAPE, [1024], 512) < 0.5 * training_flops(SHAPE, SHAPE, [2048], 1024)


def test_peak_memory_includes_memory_that_was_freed() -> None:
    memory = PeakMemory()
    memory.reset()
    before = memory.now_bytes()
    with mmap.mmap(-1, 64 * 2**20) as block:  # the heap may have this much free memory and not grow
        block.write(bytes(64 * 2**20))
    assert memory.peak_bytes() - before > 60 * 2**20
