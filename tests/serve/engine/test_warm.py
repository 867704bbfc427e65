"""Tests of the order of warm and score requests, without an engine."""

from __future__ import annotations

import asyncio
import time

import pytest

from slimserve.serve.engine.warm import PIECE_TOKENS, ScoresFirst, compute_prefix, piece_ends


def test_a_prefix_has_pieces_of_full_blocks_and_a_rest() -> None:
    assert PIECE_TOKENS % 64 == 0
    assert piece_ends(1) == [1]
    assert piece_ends(PIECE_TOKENS) == [PIECE_TOKENS]
    assert piece_ends(2 * PIECE_TOKENS + 5) == [PIECE_TOKENS, 2 * PIECE_TOKENS, 2 * PIECE_TOKENS + 5]


def test_a_piece_waits_for_all_scores_and_no_longer() -> None:
    async def run() -> list[str]:
        turns, order = ScoresFirst(), []

        async def score(seconds: float) -> None:
            with turns.scoring():
                await asyncio.sleep(seconds)
                order.append(f"scores after {seconds}")

        async def warm() -> None:
            await asyncio.sleep(0)
            assert 0.03 < await turns.wait(10) < 5
            order.append("piece")

        await asyncio.gather(score(0.02), score(0.05), warm())
        assert await turns.wait(10) < 0.02
        return order

    assert asyncio.run(run()) == ["scores after 0.02", "scores after 0.05", "piece"]


@pytest.mark.parametrize("limit_s", [0.05, 0.0, -1.0])
def test_a_piece_does_not_wait_for_ever(limit_s: float) -> None:
    async def run() -> float:
        turns = ScoresFirst()
        with turns.scoring():
            return await turns.wait(limit_s)

    begun = time.monotonic()
    assert asyncio.run(run()) >= 0
    assert time.monotonic() - begun < 5


def test_a_failed_or_cancelled_score_request_lets_pieces_go_on() -> None:
    async def run() -> float:
        turns = ScoresFirst()

        async def score() -> None:
            with turns.scoring():
                await asyncio.sleep(60)

        task = asyncio.create_task(score())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return await turns.wait(30)

    assert asyncio.run(run()) < 5


@pytest.mark.parametrize("num_before", [0, 32, PIECE_TOKENS - 32, PIECE_TOKENS, PIECE_TOKENS + 320, 2 * PIECE_TOKENS])
def test_what_a_request_computes_itself_does_not_count_as_cached(num_before: int) -> None:
    num_tokens, block_size, cached = 2 * PIECE_TOKENS + 100, 32, num_before

    async def compute(end: int) -> int:
        """Find full blocks, but not the one with the last token, as vLLM does."""
        nonlocal cached
        found = min(cached, (end - 1) // block_size * block_size)
        cached = max(cached, end // block_size * block_size)
        return found

    found = asyncio.run(compute_prefix(num_tokens, block_size, ScoresFirst(), compute))
    # The engine computes the last block of a piece again, so a piece that lacks only this block looks complete.
    assert found == (PIECE_TOKENS if num_before == PIECE_TOKENS - block_size else num_before)
    again = asyncio.run(compute_prefix(num_tokens, block_size, ScoresFirst(), compute))
    assert again == (num_tokens - 1) // block_size * block_size
