"""The raw measurement of one request, stored as one JSON line; all metrics are computed from these rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from slimserve.core.errors import UserError


@dataclass(frozen=True)
class Row:
    """The client's view of one request; times in seconds since the load began."""

    scheduled_s: float
    """Time at which the request was scheduled; in a closed loop, the time at which it was sent."""
    sent_s: float
    end_s: float
    """Time at which the last byte arrived or the request failed."""
    arrivals: tuple[tuple[float, int], ...] = ()
    """Arrival time and number of tokens of each streamed chunk that carried tokens."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    num_items: int = 0
    """Number of scored candidate items."""
    error: str | None = None
    """Kind of failure; None if the request succeeded."""
    kind: str = ""
    """Name of the request's workload; a mixed run has several."""
    prompt: int = -1
    """Number of the prompt in the order of the prompt seed, which is the same for every server."""
    first_answer_s: float | None = None
    """Arrival time of the first token after the chain of thought; None if there was no such token."""
    cached_tokens: int | None = None
    """Number of prompt tokens that the server took from its prefix cache, if the server reports it."""
    finish_reason: str | None = None
    text: str = ""
    """Generated text, including the chain of thought."""
    scores: tuple[float, ...] = ()
    """Score of each candidate: the first label's share of the labels' probability."""
    fixed_tokens: int = 0
    """Number of tokens of a complete answer if the request fixes it (`--exact-tokens`); 0 if the model decides."""

    @property
    def e2e_s(self) -> float:
        """End-to-end latency in seconds, from the scheduled time."""
        return self.end_s - self.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token in seconds, from the scheduled time; None if nothing was streamed."""
        return self.arrivals[0][0] - self.scheduled_s if self.arrivals else None

    @property
    def send_lag_s(self) -> float:
        """Delay of the client in seconds; above a few milliseconds the client limits the measurement."""
        return self.sent_s - self.scheduled_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first chunk; None if there was only one chunk."""
        later = sum(count for _, count in self.arrivals[1:])
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / later if later else None

    def inter_token_gaps_s(self) -> Iterator[float]:
        """Yield one gap per token after the first chunk; a chunk of k tokens counts as k equal gaps."""
        for (before, _), (at, count) in zip(self.arrivals, self.arrivals[1:], strict=False):
            yield from [(at - before) / count] * count


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Row)


def encode_row(row: Row) -> bytes:
    """Return the row as one line of JSON."""
    return _encoder.encode(row) + b"\n"


def decode_row(line: bytes) -> Row:
    return _decoder.decode(line)


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a file; an incomplete last line, left by a killed run, is skipped."""
    lines = file.read_bytes().split(b"\n")
    try:
        return [decode_row(line) for line in lines[:-1] if line]
    except msgspec.MsgspecError as error:
        raise UserError("rows", file, f"is not a file of raw rows ({error})", "give a SUITE.rows.jsonl") from error
