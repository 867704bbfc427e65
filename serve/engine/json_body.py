"""Check a JSON body before vLLM parses it, so that malformed input gets 400 instead of a parser's own failure."""

from __future__ import annotations

import re

from slimserve.serve.policy.errors import Rejection

_MAX_DEPTH = 100
"""Maximum nesting of a JSON body: far above any tool schema, far below the recursion limits of the parsers in vLLM."""
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
_NO_LONE_SURROGATE = re.compile(
    rb"(?:[^\\]++|\\(?!u[dD][89a-fA-F]).|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*+", re.DOTALL
)


def check_json_body(body: bytes) -> None:
    """Raise Rejection (400) if the body is not UTF-8, is nested too deeply or has half of a surrogate pair.

    All checks take linear time.
    """
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise Rejection(400, "invalid_body", f"the body is not UTF-8 (byte {error.start})") from None
    if body.count(b"[") + body.count(b"{") > _MAX_DEPTH:
        depth = 0
        for bracket in _BRACKET.finditer(_STRING.sub(b"", body)):
            depth += 1 if bracket[0] in b"[{" else -1
            if depth > _MAX_DEPTH:
                raise Rejection(400, "invalid_body", f"the body is nested deeper than {_MAX_DEPTH} levels")
    if (b"\\ud" in body or b"\\uD" in body) and not _NO_LONE_SURROGATE.fullmatch(body):
        raise Rejection(400, "invalid_body", "the body has half of a surrogate pair, which is not a character")
