"""Time limits for slow clients, and the deadline that a client may set."""

from __future__ import annotations

from slimserve.serve.policy.errors import Rejection

BODY_TIMEOUT_S = 30.0
"""Maximum seconds between the headers of a request and the end of its body."""
STALL_TIMEOUT_S = 60.0
"""Maximum seconds that a client may read nothing of its answer."""
LINGER_S = 2.0
"""Seconds that the server continues to read after an early answer.

Closing a connection with unread bytes resets it, and the client would never see the answer.
"""


def request_timeout_s(header: bytes, max_s: float) -> float:
    """Return the seconds until a request times out: the `X-Request-Timeout` header's value, at most `max_s`.

    Raises Rejection (400) if the header is not a positive number.
    """
    if not header:
        return max_s
    try:
        seconds = float(header)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise Rejection(400, "invalid_timeout", "X-Request-Timeout must be a number of seconds above 0")
    return min(seconds, max_s)


def timed_out(seconds: float) -> Rejection:
    """Return the error that ends a request after its deadline."""
    return Rejection(504, "timeout", f"the request was not complete after {seconds:g} s")
