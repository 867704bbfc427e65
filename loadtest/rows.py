"""The raw measurement of one request, one JSON line each: everything else is computed from these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from slimserve.core.errors import UserError


@dataclass(frozen=True)
class Row:
    """What the client saw of one request; times in seconds since the load began."""

    scheduled_s: float
    """When the request should have been sent; in closed-loop load, when it was."""
    sent_s: float
    end_s: float
    """When the last byte arrived, or the request failed."""
    arrivals: tuple[tuple[float, int], ...] = ()
    """Per streamed chunk that carried tokens: when it arrived and how many it held."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    num_items: int = 0
    """Candidates scored."""
    error: str | None = None
    """Kind of failure; None for a good answer."""
    kind: str = ""
    """Workload that the request belongs to: a mixed run has several."""
    prompt: int = -1
    """Number of the prompt in the order of the run's seed, the same for every server that is asked."""
    first_answer_s: float | None = None
    """When the first token after the chain of thought arrived; None where there was no such token."""
    cached_tokens: int | None = None
    """Prompt tokens that the server says it did not compute."""
    finish_reason: str | None = None
    text: str = ""
    """What was generated, chain of thought included."""
    scores: tuple[float, ...] = ()
    """Per candidate the first label's share, as it came back under load."""

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        """Seconds until the first token's bytes; None where nothing was streamed."""
        return self.arrivals[0][0] - self.scheduled_s if self.arrivals else None

    @property
    def send_lag_s(self) -> float:
        """How late the client was; beyond a few milliseconds the client is what was measured."""
        return self.sent_s - self.scheduled_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first chunk; None where there was one chunk."""
        later = sum(count for _, count in self.arrivals[1:])
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / later if later else None

    def inter_token_gaps_s(self) -> Iterator[float]:
        """One gap per token after the first chunk; a chunk of k tokens counts as k equal gaps."""
        for (before, _), (at, count) in zip(self.arrivals, self.arrivals[1:], strict=False):
            yield from [(at - before) / count] * count


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Row)


def encode_row(row: Row) -> bytes:
    """The row as one line of JSON."""
    return _encoder.encode(row) + b"\n"


def decode_row(line: bytes) -> Row:
    return _decoder.decode(line)


def read_rows(file: Path) -> list[Row]:
    """Rows of a file of such lines; a last line without its end, of a run that was killed, is left out."""
    lines = file.read_bytes().split(b"\n")
    try:
        return [decode_row(line) for line in lines[:-1] if line]
    except msgspec.MsgspecError as error:
        raise UserError("rows", file, f"is not a file of raw rows ({error})", "give a SUITE.rows.jsonl") from error
