"""How much one engine process takes on, who may ask, and the one shape of every refusal.

The supervisor hands the limits to an engine's process as JSON in `SLIMSERVE_LIMITS`, and
the keys as the path of a file or in the environment: never on a command line, which
every user of the machine can read.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slimserve.core.errors import UserError

LIMITS_VARIABLE = "SLIMSERVE_LIMITS"
KEYS_FILE_VARIABLE = "SLIMSERVE_API_KEYS_FILE"
KEY_VARIABLES = ("SLIMSERVE_API_KEY", "VLLM_API_KEY")
_MIB = 2**20
_log = logging.getLogger("slimserve.limits")


class Limits(BaseModel):
    """The bounds of one engine's server.

    `max_queued` is what holds the tail under overload. Places come free at `max_running` per service time S, so who
    gets in has waited at most S × max_queued / max_running: with the default of half as many queued as running, a
    request takes 1.5 S where 2 S is the promise, which leaves room for the spread of S. Requests that run in step
    come free all at once instead; the queue's patience (serve/policy/admission.py) bounds that wait to 0.5 S. More than
    `max_running` in the queue breaks the promise, and throughput it never gives: the engine is already full.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    max_body_bytes: int = Field(default=8 * _MIB, gt=0)
    """Largest request body, as sent; more is answered 413."""
    max_running: int = Field(default=64, gt=0)
    """Inference requests inside the engine at once; a score request of many items is one."""
    max_queued: int = Field(default=32, ge=0)
    """Inference requests that wait for a place inside, first come first served; more are answered 429."""
    queue_timeout_s: float = Field(default=5.0, gt=0)
    """Longest wait for a place, or half of the mean service time where that is shorter; then 429."""
    request_timeout_s: float = Field(default=300.0, gt=0)
    """Longest life of a request, queue included; a header `X-Request-Timeout` may shorten it."""
    max_items: int = Field(default=1024, gt=0)
    """Items (score) or documents (rerank) of one request."""
    drain_s: float = Field(default=30.0, ge=0)
    """How long running requests may finish after SIGTERM."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Limits:
        """Read `SLIMSERVE_LIMITS` (a JSON object of the fields that differ); UserError where it is not valid."""
        text = (os.environ if environment is None else environment).get(LIMITS_VARIABLE, "")
        if not text:
            return cls()
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole text"
            raise UserError(
                LIMITS_VARIABLE, text, f"is not valid ({where}: {first['msg']})", "give a JSON object of Limits' fields"
            ) from error


def load_api_keys(environment: Mapping[str, str] | None = None) -> frozenset[str]:
    """Every key that opens this server; empty where none is set, which leaves it open.

    Keys come from the file that `SLIMSERVE_API_KEYS_FILE` names (one a line, `#` starts a comment line)
    and from `SLIMSERVE_API_KEY` and `VLLM_API_KEY`. UserError where the file is named
    but cannot be read or holds no key: a server must not fall open over a typing mistake.
    """
    environment = os.environ if environment is None else environment
    keys = {environment[name].strip() for name in KEY_VARIABLES if environment.get(name, "").strip()}
    if path := environment.get(KEYS_FILE_VARIABLE, ""):
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
            open_to = stat.S_IMODE(Path(path).stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("API key file", path, f"cannot be read ({error})", "name a UTF-8 text file") from error
        found = {line.strip() for line in lines} - {""}
        found = {line for line in found if not line.startswith("#")}
        if not found:
            raise UserError("API key file", path, "holds no key", "write one key a line, or leave the option out")
        if open_to:
            _log.warning("API key file %s can be read by others; chmod 600 keeps it yours", path)
        keys |= found
    for key in keys:
        if not (key.isascii() and key.isprintable()) or " " in key:
            # A header could not carry it; the key itself is not shown.
            raise UserError("API key", f"of {len(key)} characters", "is not printable ASCII", "make a new one")
    return frozenset(keys)


class KeyRing:
    """The keys that open a server; without one it is open, and the ring is false."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admits(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether a request with these headers, names in lower case, shows one of the keys."""
        shown = b""
        for name, value in headers:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                shown = value[7:].strip()
            elif name == b"x-api-key" and not shown:  # as clients of /v1/messages send it
                shown = value.strip()
        digest = _digest(shown)
        # All are compared, so that the time tells nothing about which one was near.
        return sum(hmac.compare_digest(digest, key) for key in self._digests) > 0


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def error_body(
    status: int,
    message: str,
    type: str | None = None,  # noqa: A002 - the name in the API
    code: str | int | None = None,
    param: str | None = None,
) -> dict[str, dict[str, str | int | None]]:
    """The error object of OpenAI's API, as vLLM sends it; type and code follow from the status."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    fallback = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {
        "error": {
            "message": message,
            "type": type or fallback,
            "param": param,
            "code": status if code is None else code,
        }
    }
