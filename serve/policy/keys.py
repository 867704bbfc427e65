"""API keys: where they come from and how a request's key is compared.

Keys reach a process through the path of a file or through the environment, never through the command line, which
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

from slimserve.core.errors import UserError
from slimserve.core.text import read_text, split_lines
from slimserve.serve.policy.errors import invalid_key

KEYS_FILE_VARIABLE = "SLIMSERVE_API_KEYS_FILE"
KEY_VARIABLES = ("SLIMSERVE_API_KEY", "VLLM_API_KEY")
_log = logging.getLogger("slimserve.keys")


def load_api_keys(environment: Mapping[str, str] | None = None) -> frozenset[str]:
    """Return all API keys of this server; an empty set means that it needs no key.

    Keys come from the file named by `SLIMSERVE_API_KEYS_FILE` (one per line, `#` starts a comment line) and from
    `SLIMSERVE_API_KEY` and `VLLM_API_KEY`. Raises UserError if the file cannot be read or holds no key, because a
    typing mistake must not leave the server open.
    """
    environment = os.environ if environment is None else environment
    keys = {environment[name].strip() for name in KEY_VARIABLES if environment.get(name, "").strip()}
    if path := environment.get(KEYS_FILE_VARIABLE, ""):
        try:
            other_access = stat.S_IMODE(Path(path).stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO)
        except OSError as error:
            raise UserError("API key file", path, f"cannot be read ({error})", "name a UTF-8 text file") from error
        lines = split_lines(read_text(Path(path), "API key file", "name a UTF-8 text file"))
        file_keys = {line.strip() for line in lines if line.strip() and not line.strip().startswith("#")}
        if not file_keys:
            raise UserError("API key file", path, "has no key", "write one key per line, or leave the option out")
        if other_access:
            _log.warning("API key file %s is readable by other users; run chmod 600 on it", path)
        keys |= file_keys
    for key in keys:
        if not (key.isascii() and key.isprintable()) or " " in key:
            # A header cannot carry such a key. The message must not show it.
            problem = "has spaces or characters outside printable ASCII"
            raise UserError("API key", f"of {len(key)} characters", problem, "create a new key")
    return frozenset(keys)


class KeyRing:
    """The API keys of a server; an empty ring is false and accepts every request."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raise Rejection (401) unless the headers, names in lower case, carry one of the keys."""
        if not self.accepts(headers):
            raise invalid_key()

    def accepts(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Return whether the headers carry one of the keys, or the ring is empty."""
        if not self:
            return True
        received = b""
        for name, value in headers:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                received = value[7:].strip()
            elif name == b"x-api-key" and not received:  # clients of /v1/messages send this header
                received = value.strip()
        digest = _digest(received)
        # All keys are compared, so that the time does not depend on which one matches.
        return sum(hmac.compare_digest(digest, key) for key in self._digests) > 0


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
