"""The raw measurement of one request, one JSON line each: everything else is computed from these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from json import dumps, loads
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class Row:
    """What the client saw of one request; times in seconds since the load began."""

    due_s: float
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

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.due_s

    @property
    def ttft_s(self) -> float | None:
        """Seconds until the first token's bytes; None where nothing was streamed."""
        return self.arrivals[0][0] - self.due_s if self.arrivals else None

    def inter_token_gaps_s(self) -> Iterator[float]:
        """One gap per token after the first chunk; a chunk of k tokens counts as k equal gaps."""
        for (before, _), (at, count) in zip(self.arrivals, self.arrivals[1:], strict=False):
            yield from [(at - before) / count] * count


def write_row(file: IO[str], row: Row) -> None:
    file.write(dumps(asdict(row), separators=(",", ":")) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Rows of a file that write_row made."""
    return list(_parse(path.read_text(encoding="utf-8").splitlines()))


def _parse(lines: Iterable[str]) -> Iterator[Row]:
    for line in lines:
        fields = loads(line)
        fields["arrivals"] = tuple((at, count) for at, count in fields["arrivals"])
        yield Row(**fields)
