"""Progress of long tasks: a bar with rate and remaining time on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partialmethod
from typing import Protocol

_PLAIN_EVERY_S = 10.0


class ProgressCallback(Protocol):
    """Reports the number of units done so far and an optional note on the current one."""

    def __call__(self, done: float, note: str = "") -> None: ...


def print_status(message: str) -> None:
    """Print one status line to standard error immediately."""
    print(message, file=sys.stderr, flush=True)


@cache
def print_once(message: str) -> None:
    """Print a status line unless this process has printed it before."""
    print_status(message)


@contextmanager
def hidden_bars() -> Iterator[None]:
    """Hide the progress bars of libraries if standard error is no terminal, where each update would be a line."""
    if sys.stderr.isatty():
        yield
        return
    from tqdm.std import tqdm

    shown = tqdm.__init__
    tqdm.__init__ = partialmethod(shown, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = shown


@contextmanager
def progress(title: str, total: float | None, unit: str) -> Iterator[ProgressCallback]:
    """Show the progress of a task of `total` units; with None only the elapsed time is shown.

    A terminal gets a live bar with rate and remaining time, anything else a plain line at most every ten seconds. The
    last line states the duration.
    """
    start = time.monotonic()
    if sys.stderr.isatty():
        with _live_bar(title, total, unit) as tick:
            yield tick
    else:
        print_status(f"{title} …")
        yield _PlainTick(title, total, unit)
    print_status(f"{title}: done in {time.monotonic() - start:.1f} s")


@contextmanager
def _live_bar(title: str, total: float | None, unit: str) -> Iterator[ProgressCallback]:
    from tqdm import tqdm

    layout = (
        "{desc} {n:.0f}/{total:.0f} {unit} |{bar:20}| {rate_fmt}, {remaining} left {postfix}"
        if total
        else "{desc} {elapsed} {postfix}"
    )
    with tqdm(total=total, desc=title, unit=unit, leave=False, bar_format=layout) as bar:

        def tick(done: float, note: str = "") -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)
            bar.refresh()

        yield tick


class _PlainTick:
    def __init__(self, title: str, total: float | None, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._start = self._printed = time.monotonic()

    def __call__(self, done: float, note: str = "") -> None:
        now = time.monotonic()
        if now - self._printed < _PLAIN_EVERY_S:
            return
        self._printed = now
        elapsed = now - self._start
        counted = f" {done:.0f}/{self._total:.0f} {self._unit}" if self._total else ""
        left = f", about {elapsed * (self._total - done) / done:.0f} s left" if self._total and done else ""
        print_status(f"{self._title}:{counted} after {elapsed:.0f} s{left}{' (' + note + ')' if note else ''}")
