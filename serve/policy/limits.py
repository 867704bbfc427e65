"""Limits of one engine process: body size, running and queued requests, time.

The launcher passes them to the engine process as JSON in the environment variable `SLIMSERVE_LIMITS`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, ValidationError

from slimserve.core.config import Duration, Settings, Text, setting
from slimserve.core.errors import UserError

LIMITS_VARIABLE = "SLIMSERVE_LIMITS"
_MIB = 2**20
_PANEL = "Limits of each engine"
_SIZE = re.compile(r"(\d+)\s*(B|KiB|MiB|GiB)?")
_BYTES_PER_UNIT = {"B": 1, "KiB": 2**10, "MiB": _MIB, "GiB": 2**30}


def parse_size(value: object) -> object:
    """Return the bytes of `8MiB`, `512KiB` or `100000`; a number is already in bytes."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("this is not a size; write 8MiB or 100000")
    return int(match[1]) * _BYTES_PER_UNIT[match[2] or "B"]


Size = Annotated[int, BeforeValidator(parse_size), Text("SIZE", lambda size: f"{size / _MIB:g}MiB")]
"""Bytes as an integer; on the command line `8MiB` or `100000`."""


class Limits(Settings):
    """The limits of one engine process.

    `max_queued` bounds the tail latency under overload. Slots come free at the rate `max_running` / S, where S is the
    service time, so a request waits at most S × max_queued / max_running. With the default (half as many queued as
    running) it takes at most 1.5 S; the promise is 2 S, which leaves room for the spread of S. Requests that run in
    step free all slots at once instead; the queue timeout (serve/policy/admission.py) bounds that wait to 0.5 S.
    More queued than running requests break the promise and add no throughput, because the engine is already full.
    """

    model_config = ConfigDict(strict=True)

    max_body_bytes: Size = setting(
        8 * _MIB, "Maximum size of a request body; larger bodies get HTTP 413.", option="--max-body", panel=_PANEL, gt=0
    )
    max_running: int = setting(
        64, "Maximum number of inference requests inside an engine; a score request counts as one.", panel=_PANEL, gt=0
    )
    max_queued: int = setting(
        32, "Maximum number of queued inference requests; further requests get HTTP 429.", panel=_PANEL, ge=0
    )
    queue_timeout_s: Duration = setting(
        5.0,
        "Maximum wait in the queue, or half of the mean service time if that is shorter; then HTTP 429.",
        option="--queue-timeout",
        panel=_PANEL,
        gt=0,
    )
    request_timeout_s: Duration = setting(
        300.0,
        "Maximum duration of a request, queue included; the header X-Request-Timeout may shorten it.",
        option="--timeout",
        panel=_PANEL,
        gt=0,
    )
    max_items: int = setting(
        1024, "Maximum number of items (score) or documents (rerank) in one request.", panel=_PANEL, gt=0
    )
    drain_s: Duration = setting(
        30.0, "Time that running requests have to finish after SIGTERM.", option="--drain", panel=_PANEL, ge=0
    )

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
