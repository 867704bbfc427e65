"""Graceful shutdown: reject new requests, let running requests finish, then end the rest with an error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Protocol

from slimserve.serve.policy.errors import Rejection, shutdown

_POLL_S = 0.05


class Interruptible(Protocol):
    """A request in flight."""

    def interrupt(self, rejection: Rejection) -> None:
        """End the request with an error that the client can read."""


async def drain(in_flight: Callable[[], Collection[Interruptible]], drain_s: float, grace_s: float) -> None:
    """Wait until no request is in flight; after `drain_s` seconds, interrupt the rest.

    Interrupted requests have `grace_s` seconds to send their last bytes. The caller rejects new requests.
    """
    await _wait_until_idle(in_flight, drain_s)
    for request in list(in_flight()):
        request.interrupt(shutdown(drain_s))
    await _wait_until_idle(in_flight, grace_s)


async def _wait_until_idle(in_flight: Callable[[], Collection[Interruptible]], seconds: float) -> None:
    end = asyncio.get_running_loop().time() + seconds
    while in_flight() and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(_POLL_S)
