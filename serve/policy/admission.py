"""Admission control: a fixed number of slots in the engine and a short queue in front of them.

Overload is rejected early because vLLM's own queue has no limit: at ten times the capacity every request would wait
ten times as long, and its client would be gone before the answer came.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable

from slimserve.serve.policy.errors import ClientDisconnected, Rejection, draining
from slimserve.serve.policy.limits import Limits

_SMOOTHING = 0.2
_INITIAL_SERVICE_S = 1.0
_MAX_RETRY_S = 60
_MAX_WAIT_FRAC = 0.5
_MIN_WAIT_S = 0.25


class Admission:
    """Admits at most `max_running` requests; at most `max_queued` more wait in order of arrival.

    A freed slot goes to the first request in the queue, never to one that has just arrived. `service_s` is the moving
    mean of the time that a request holds its slot. No request waits longer than half of it, or 0.25 s if that is
    more: requests of one length that started together end together, and one that came just after them would
    otherwise wait a full service time. `on_change(num_running, num_queued)` is called after every change.
    """

    def __init__(self, limits: Limits, on_change: Callable[[int, int], object]) -> None:
        self._limits = limits
        self._on_change = on_change
        self._queue: deque[asyncio.Future[None]] = deque()
        self._num_running = 0
        self._is_closed = False
        self.service_s = _INITIAL_SERVICE_S

    @property
    def num_running(self) -> int:
        """Number of requests that hold a slot."""
        return self._num_running

    @property
    def num_queued(self) -> int:
        """Number of requests that wait for a slot."""
        return len(self._queue)

    def check(self) -> None:
        """Raise the Rejection that `acquire` would raise at once, so that no body is read in vain."""
        if self._is_closed:
            raise draining()
        if self._num_running >= self._limits.max_running and len(self._queue) >= self._limits.max_queued:
            raise self._overloaded("queue_full")

    async def acquire(self, disconnected: Callable[[], Awaitable[object]]) -> None:
        """Wait for a slot, which the caller must `release`.

        Raises Rejection (429 or 503) if no slot is available in time, and ClientDisconnected if `disconnected()`
        completes first.
        """
        self.check()
        if self._num_running < self._limits.max_running:
            self._num_running += 1
            self._changed()
            return
        slot = asyncio.get_running_loop().create_future()
        self._queue.append(slot)
        self._changed()
        try:
            left = asyncio.ensure_future(disconnected())
            max_wait_s = min(self._limits.queue_timeout_s, max(_MIN_WAIT_S, _MAX_WAIT_FRAC * self.service_s))
            await asyncio.wait({slot, left}, timeout=max_wait_s, return_when=asyncio.FIRST_COMPLETED)
            if slot.done():
                slot.result()  # raises if the queue was closed
                return
            raise ClientDisconnected if left.done() else self._overloaded("queue_timeout")
        except asyncio.CancelledError:
            if slot.done() and not slot.cancelled() and slot.exception() is None:
                self._pass_on()
            raise
        finally:
            if not slot.done():
                self._queue.remove(slot)
                slot.cancel()
                self._changed()

    def release(self, service_s: float) -> None:
        """Return a slot that was held for `service_s` seconds."""
        self.service_s += _SMOOTHING * (service_s - self.service_s)
        self._pass_on()

    def close(self) -> None:
        """Reject queued and new requests; running requests keep their slots."""
        self._is_closed = True
        while self._queue:
            self._queue.popleft().set_exception(draining())
        self._changed()

    def retry_after_s(self) -> int:
        """Return the seconds until the present queue will have passed at the present pace, from 1 to 60."""
        ahead = len(self._queue) + 1
        return min(_MAX_RETRY_S, max(1, math.ceil(self.service_s * ahead / self._limits.max_running)))

    def _overloaded(self, code: str) -> Rejection:
        message = "the server is at its limit; try again later"
        return Rejection(429, code, message, retry_after_s=self.retry_after_s())

    def _pass_on(self) -> None:
        if self._queue:
            self._queue.popleft().set_result(None)
        else:
            self._num_running -= 1
        self._changed()

    def _changed(self) -> None:
        self._on_change(self._num_running, len(self._queue))
