"""Warm requests: the prefix of coming score requests, which the engine computes before their items are known.

Nobody waits for a warm request, but somebody waits for every score request. An engine step takes as long as all its
tokens, so a long history would delay the scores in its step and those that arrive during it. The engine therefore gets
a prefix in pieces, and the next piece waits while score requests are in flight.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from slimserve.serve.engine.prompt_tokenizer import PromptTokenizer
from slimserve.serve.engine.score_request import RequestError, WarmRequest

PIECE_TOKENS = 2048
"""Tokens that a warm request gives to the engine at once; a multiple of all block sizes of the prefix cache.

Each further piece costs an engine request: pieces of 256 tokens nearly doubled the time of a warm call (docs/log.md).
"""
MAX_WAIT_S = 1.0
"""Time for which the pieces of a warm request wait for score requests, all together, so that it ends under any load."""


class ScoresFirst:
    """Lets the pieces of warm requests wait for score requests. Used from one event loop."""

    def __init__(self) -> None:
        self._num_scoring = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Count a score request in its block."""
        self._num_scoring += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self._num_scoring -= 1
            if not self._num_scoring:
                self._is_idle.set()

    async def wait(self, limit_s: float) -> float:
        """Wait until no score request is in flight, for at most `limit_s`; return the seconds that this took."""
        begun = time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, limit_s)):
                await self._is_idle.wait()
        except TimeoutError:
            pass
        return time.monotonic() - begun


def piece_ends(num_tokens: int) -> list[int]:
    """Return the numbers of leading tokens that the engine gets one after the other."""
    return [*range(PIECE_TOKENS, num_tokens, PIECE_TOKENS), num_tokens]


async def compute_prefix(
    num_tokens: int, block_size: int, scores_first: ScoresFirst, compute: Callable[[int], Awaitable[int]]
) -> int:
    """Compute a prefix in pieces and return how many of its tokens were cached before.

    `compute(end)` computes the first `end` tokens and returns how many of them were cached then.
    """
    num_cached, is_cached, wait_s = 0, True, MAX_WAIT_S
    for end in piece_ends(num_tokens):
        wait_s -= await scores_first.wait(wait_s)
        found = await compute(end)
        # After a piece that was not cached, the engine finds what this request itself has computed.
        if is_cached:
            num_cached = found
            is_cached = end - found <= block_size
    return num_cached


def warm_prompt(
    request: WarmRequest,
    tokenizer: PromptTokenizer,
    vocabulary: int,
    max_prompt_tokens: int,
    render: Callable[[str, dict[str, Any]], str],
) -> list[int]:
    """Return the tokens that score requests with the query of a warm request begin with.

    The last token may differ, because an item that follows can merge with it. Raises RequestError for a query that
    cannot be scored either.
    """
    if request.apply_chat_template:
        if not isinstance(request.query, str):
            raise RequestError("apply_chat_template", "needs the query as a text, not as token ids")
        mark = secrets.token_hex(16)
        before, *after = render(request.query + mark, request.chat_template_kwargs).split(mark)
        if len(after) != 1:
            raise RequestError("apply_chat_template", "the model's chat template does not write the message once")
        tokens = tokenizer.encode(before, bool(request.add_special_tokens))
    elif isinstance(request.query, str):
        tokens = tokenizer.encode(request.query, request.add_special_tokens is not False)
    else:
        tokens = request.query
    if not tokens:
        raise RequestError("query", "is empty; there is nothing to compute")
    outside = next((token for token in tokens if not 0 <= token < vocabulary), None)
    if outside is not None:
        raise RequestError("query", f"token id {outside} is outside the vocabulary of {vocabulary} tokens")
    if len(tokens) > max_prompt_tokens:
        raise RequestError(
            "query", f"has {len(tokens)} tokens, and the model takes {max_prompt_tokens} before the label"
        )
    return tokens


def warm_response(model: str, num_tokens: int, num_cached: int) -> dict[str, Any]:
    """Return the answer to a warm request whose prefix has `num_tokens` tokens, some of which were cached before."""
    return {
        "object": "warm",
        "model": model,
        "usage": {
            "prompt_tokens": num_tokens,
            "total_tokens": num_tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        },
    }
