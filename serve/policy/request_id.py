"""Request ids: a valid `X-Request-Id` of the client is kept, otherwise a new id is made."""

from __future__ import annotations

import re
import uuid

HEADER = b"x-request-id"
_VALID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


def request_id_of(header: bytes) -> str:
    """Return the id in the value of an `X-Request-Id` header, or a new random id if the value is missing or invalid."""
    return header.decode() if _VALID.fullmatch(header) else uuid.uuid4().hex
