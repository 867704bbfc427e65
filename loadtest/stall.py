"""Detection of times at which a process of the load generator stood still.

A stop signal, a suspended machine, a long garbage collection or a lack of CPU delay every request that is in flight or
scheduled at that time. The client cannot tell such a delay from the server's, so a run with one is not valid.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import gevent

_INTERVAL_S = 0.05
_SHORTEST_S = 0.1
"""Shorter delays of the event loop are those of a busy client, which its CPU use and its send lag show."""

Stall = tuple[float, float, float]
"""Begin and end of a stall in seconds since the load began, and its length in seconds.

The length includes the time for which the machine was suspended, which the clock of the load does not count.
"""


def _elapsed_s() -> float:
    """Return the seconds of a clock that continues while the machine is suspended, if the system has one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.perf_counter()


class StallWatch:
    """Wakes up at short intervals and records every time at which it woke up much too late."""

    def __init__(
        self, epoch: float, clock: Callable[[], float] = time.perf_counter, elapsed: Callable[[], float] = _elapsed_s
    ) -> None:
        """Watch from now on; `epoch` is the begin of the load as a time of `clock`."""
        self.stalls: list[Stall] = []
        self._epoch = epoch
        self._clock = clock
        self._elapsed = elapsed
        self._last = (clock(), elapsed())

    def run(self) -> None:
        """Watch until the greenlet is killed."""
        while True:
            gevent.sleep(_INTERVAL_S)
            self.tick()

    def tick(self) -> None:
        """Record the time since the last tick if it is much longer than the interval."""
        last_s, last_elapsed_s = self._last
        now_s, now_elapsed_s = self._last = (self._clock(), self._elapsed())
        length_s = now_elapsed_s - last_elapsed_s - _INTERVAL_S
        if length_s >= _SHORTEST_S:
            self.stalls.append((last_s - self._epoch, now_s - self._epoch, length_s))


def longest_stall_s(stalls: Sequence[Stall], begin_s: float, end_s: float) -> float:
    """Return the length of the longest stall that overlaps the given time of the load, in seconds; 0 without any."""
    return max(
        (length_s for begun_s, ended_s, length_s in stalls if begun_s < end_s and ended_s > begin_s), default=0.0
    )
