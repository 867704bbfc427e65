"""Limits on request bodies while they arrive: the size of each, and the memory of all together."""

from __future__ import annotations

from collections.abc import Callable

from slimserve.serve.policy.errors import Rejection

MAX_FULL_BODIES = 32
"""Number of bodies of the maximum size that may be in memory before their requests are complete."""


class UploadLimits:
    """The body limits of one process; `num_bytes` counts the bytes of all bodies that are still arriving."""

    def __init__(self, max_body_bytes: int, retry_after_s: Callable[[], int] = lambda: 1) -> None:
        self.max_body_bytes = max_body_bytes
        self.num_bytes = 0
        self._retry_after_s = retry_after_s

    def check_content_length(self, header: bytes) -> None:
        """Raise Rejection (413) if the `Content-Length` header announces a body above the limit."""
        if header.isdigit() and int(header) > self.max_body_bytes:
            raise self._too_large()

    def check(self, body_bytes: int) -> None:
        """Raise Rejection (413 or 429) if one body of this size, or all arriving bodies together, exceed the limits."""
        if body_bytes > self.max_body_bytes:
            raise self._too_large()
        if self.num_bytes > self.max_body_bytes * MAX_FULL_BODIES:
            message = "too many request bodies are arriving at once; try again later"
            raise Rejection(429, "uploads", message, retry_after_s=self._retry_after_s(), close=True)

    def _too_large(self) -> Rejection:
        message = f"the body is larger than {self.max_body_bytes} bytes"
        return Rejection(413, "body_too_large", message, close=True)


class Upload:
    """One request body that is arriving."""

    def __init__(self, limits: UploadLimits) -> None:
        self._limits = limits
        self._parts: list[bytes] = []
        self._num_bytes = 0

    def add(self, part: bytes) -> None:
        """Keep a part of the body; raises Rejection where it exceeds a limit."""
        self._parts.append(part)
        self._num_bytes += len(part)
        self._limits.num_bytes += len(part)
        self._limits.check(self._num_bytes)

    def body(self) -> bytes:
        """Return all parts joined."""
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)

    def close(self) -> None:
        """Drop the parts; the body is complete or no longer wanted."""
        self._limits.num_bytes -= self._num_bytes
        self._parts, self._num_bytes = [], 0
