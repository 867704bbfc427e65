"""Tests of batches against a layout by hand, of epochs, and of equal results for packed and padded sequences."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from slimserve.distill.batches import make_batches, step_indices
from slimserve.distill.supervision import SupervisedSequence

SEQUENCES = [
    SupervisedSequence("a", (11, 12, 13), (1, 2)),
    SupervisedSequence("b", (21, 22, 23, 24, 25), (3,)),
    SupervisedSequence("c", (31, 32), (1,)),
    SupervisedSequence("d", (41, 42, 43), (2,)),
]


def test_padding_is_on_the_right_and_each_target_has_its_source_position() -> None:
    (batch,) = make_batches(SEQUENCES, [0, 1, 2], 15)
    assert batch.names == ("b", "a", "c")
    assert batch.tokens_BT.tolist() == [[21, 22, 23, 24, 25], [11, 12, 13, 0, 0], [31, 32, 0, 0, 0]]
    assert batch.labels_N.tolist() == [24, 12, 13, 32]
    assert batch.tokens_BT.flatten()[batch.source_N].tolist() == [23, 11, 12, 31]
    assert batch.positions_BT is None


def test_packing_lays_sequences_end_to_end() -> None:
    (batch,) = make_batches(SEQUENCES, [0, 1, 2], 10, is_packed=True)
    assert batch.tokens_BT.tolist() == [[21, 22, 23, 24, 25, 11, 12, 13, 31, 32]]
    assert batch.positions_BT is not None
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1]]
    assert batch.tokens_BT.flatten()[batch.source_N].tolist() == [23, 11, 12, 31]
    assert batch.labels_N.tolist() == [24, 12, 13, 32]


def test_a_batch_exceeds_the_limit_only_for_a_single_sequence() -> None:
    for max_tokens in range(1, 21):
        for is_packed in (False, True):
            batches = make_batches(SEQUENCES, range(4), max_tokens, is_packed=is_packed)
            assert sorted(name for batch in batches for name in batch.names) == ["a", "b", "c", "d"]
            assert all(batch.tokens_BT.numel() <= max_tokens or len(batch.names) == 1 for batch in batches)


def test_every_sequence_comes_once_per_epoch_in_a_step_of_similar_lengths() -> None:
    lengths = [(7 * number) % 101 for number in range(101)]
    per_epoch = -(-101 // 4)
    steps = list(islice(step_indices(lengths, 4, seed=3), 3 * per_epoch))
    for epoch in range(3):
        numbers = [number for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for number in step]
        assert sorted(numbers) == list(range(101))
    assert steps[:per_epoch] != steps[per_epoch : 2 * per_epoch]
    spreads = [max(lengths[n] for n in step) - min(lengths[n] for n in step) for step in steps]
    assert sum(spreads) / len(spreads) < 15, "steps of four random lengths have a mean spread of 60"
    assert list(islice(step_indices(lengths, 4, seed=3), 5, 9)) == steps[5:9]


def test_packed_padded_and_single_sequences_have_the_same_hidden_states(tiny_student: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_student, dtype=torch.float32).get_decoder()
    numbers = torch.Generator().manual_seed(5)
    sequences = [
        SupervisedSequence(
            str(length), tuple(torch.randint(0, 1000, (length,), generator=numbers).tolist()), (length - 1,)
        )
        for length in (9, 2, 17, 5)
    ]

    def states(**options: bool) -> torch.Tensor:
        (batch,) = make_batches(sequences, range(4), 1000, **options)
        with torch.no_grad():
            output = model(input_ids=batch.tokens_BT, position_ids=batch.positions_BT, use_cache=False)
        return output.last_hidden_state.flatten(0, 1)[batch.source_N]

    singly = []
    for sequence in sorted(sequences, key=lambda one: -len(one.tokens)):
        with torch.no_grad():
            output = model(input_ids=torch.tensor([sequence.tokens]), use_cache=False)
        singly.append(output.last_hidden_state[0, -2])
    torch.testing.assert_close(states(), torch.stack(singly), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states(is_packed=True), torch.stack(singly), rtol=1e-5, atol=1e-5)
