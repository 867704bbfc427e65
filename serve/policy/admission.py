"""A place inside the engine for so many requests, and a short queue for it.

Overload is refused at the door, as vLLM's own queue has no end: ten times the load would
wait ten times as long, and every client would have gone before its answer came.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable

from slimserve.serve.policy.limits import Limits

_NEW_SHARE = 0.2
_FIRST_GUESS_S = 1.0
_MAX_RETRY_S = 60
_PATIENCE = 0.5
_LEAST_PATIENCE_S = 0.25


class Refused(Exception):  # noqa: N818 - not an error of ours
    """There is no place: `reason` for the counter, `retry_after_s` for the client."""

    def __init__(self, reason: str, retry_after_s: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s


class Gone(Exception):  # noqa: N818
    """The client left while it waited."""


class Admission:
    """At most `max_running` inside, at most `max_queued` waiting, first come first served.

    A place that is given back goes to the first in the queue, never to someone who just
    arrived. `service_s` is the moving mean of the time that a request keeps its place. Nobody
    waits longer than half of it (or a quarter of a second, where that is more): requests of one
    length that came together end together, and who came just after would wait a whole service time.
    """

    def __init__(self, limits: Limits, changed: Callable[[int, int], object]) -> None:
        self._limits = limits
        self._changed = changed
        self._queue: deque[asyncio.Future[None]] = deque()
        self._running = 0
        self._refusing = False
        self.service_s = _FIRST_GUESS_S

    @property
    def num_running(self) -> int:
        return self._running

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    def check(self) -> None:
        """Raise Refused where `enter` would now refuse at once."""
        if self._refusing:
            raise Refused("draining", self.retry_after_s())
        if self._running >= self._limits.max_running and len(self._queue) >= self._limits.max_queued:
            raise Refused("queue_full", self.retry_after_s())

    async def enter(self, gone: Callable[[], Awaitable[object]]) -> None:
        """Return with a place, which `leave` gives back. Raises Refused, or Gone where `gone()` is done first."""
        self.check()
        if self._running < self._limits.max_running:
            self._running += 1
            self._tell()
            return
        place = asyncio.get_running_loop().create_future()
        self._queue.append(place)
        self._tell()
        try:
            left = asyncio.ensure_future(gone())
            patience_s = min(self._limits.queue_timeout_s, max(_LEAST_PATIENCE_S, _PATIENCE * self.service_s))
            await asyncio.wait({place, left}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            if place.done():
                place.result()  # raises where the queue was closed
                return
            raise Gone if left.done() else Refused("queue_timeout", self.retry_after_s())
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                self._pass_on()
            raise
        finally:
            if not place.done():
                self._queue.remove(place)
                place.cancel()
                self._tell()

    def leave(self, service_s: float) -> None:
        """Give back a place that was kept for so long."""
        self.service_s += _NEW_SHARE * (service_s - self.service_s)
        self._pass_on()

    def close(self) -> None:
        """Refuse whoever waits and whoever comes; those inside may stay."""
        self._refusing = True
        while self._queue:
            self._queue.popleft().set_exception(Refused("draining", self.retry_after_s()))
        self._tell()

    def retry_after_s(self) -> int:
        """Whole seconds until the queue ahead will have passed, if all goes on as it did; 1 to 60."""
        ahead = len(self._queue) + 1
        return min(_MAX_RETRY_S, max(1, math.ceil(self.service_s * ahead / self._limits.max_running)))

    def _pass_on(self) -> None:
        if self._queue:
            self._queue.popleft().set_result(None)
        else:
            self._running -= 1
        self._tell()

    def _tell(self) -> None:
        self._changed(self._running, len(self._queue))
