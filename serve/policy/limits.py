"""Limits of one engine process: body size, running and queued requests, time.

The launcher passes them to the engine process as JSON in the environment variable `SLIMSERVE_LIMITS`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from pydantic import ConfigDict, Field, ValidationError

from slimserve.core.config import StrictModel
from slimserve.core.errors import UserError

LIMITS_VARIABLE = "SLIMSERVE_LIMITS"
_MIB = 2**20


class Limits(StrictModel):
    """The limits of one engine process.

    `max_queued` bounds the tail latency under overload. Slots come free at the rate `max_running` / S, where S is the
    service time, so a request waits at most S × max_queued / max_running. With the default (half as many queued as
    running) it takes at most 1.5 S; the promise is 2 S, which leaves room for the spread of S. Requests that run in
    step free all slots at once instead; the queue timeout (serve/policy/admission.py) bounds that wait to 0.5 S.
    More queued than running requests break the promise and add no throughput, because the engine is already full.
    """

    model_config = ConfigDict(strict=True)

    max_body_bytes: int = Field(default=8 * _MIB, gt=0)
    """Maximum size of a request body in bytes; larger bodies get 413."""
    max_running: int = Field(default=64, gt=0)
    """Maximum number of inference requests inside the engine; a score request with many items counts as one."""
    max_queued: int = Field(default=32, ge=0)
    """Maximum number of inference requests that wait for a slot in order of arrival; further requests get 429."""
    queue_timeout_s: float = Field(default=5.0, gt=0)
    """Maximum wait for a slot in seconds, or half of the mean service time if that is shorter; then 429."""
    request_timeout_s: float = Field(default=300.0, gt=0)
    """Maximum duration of a request in seconds, queue included; the header `X-Request-Timeout` may shorten it."""
    max_items: int = Field(default=1024, gt=0)
    """Maximum number of items (score) or documents (rerank) in one request."""
    drain_s: float = Field(default=30.0, ge=0)
    """Seconds that running requests may take to finish after SIGTERM."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Limits:
        """Read `SLIMSERVE_LIMITS`, a JSON object of the fields that differ from the defaults; UserError if invalid."""
        text = (os.environ if environment is None else environment).get(LIMITS_VARIABLE, "")
        if not text:
            return cls()
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the text"
            problem = f"is invalid ({field}: {first['msg']})"
            raise UserError(LIMITS_VARIABLE, text, problem, "write a JSON object with the fields of Limits") from error
