"""Requests from web pages of other origins (CORS): one set of rules for a single engine and for the gateway.

vLLM's arguments `--allowed-origins`, `--allowed-methods`, `--allowed-headers` and `--allow-credentials` set the rules;
by default, every page may call the server. Starlette applies them to vLLM's answers, and `CorsRules` to preflights in
front of the gateway and to each answer that the gateway or a middleware gives in place of an engine. A page can
therefore read errors as well.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from slimserve.core.errors import UserError

RawHeaders = Sequence[tuple[bytes, bytes]]
_LISTS = ("--allowed-origins", "--allowed-methods", "--allowed-headers")


def is_preflight(method: str, headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether a browser asks if a page may send a request; such a question never carries an API key."""
    names = {name for name, _ in headers} if method == "OPTIONS" else set()
    return {b"origin", b"access-control-request-method"} <= names


class CorsRules:
    """The pages that may call a server, and the headers that tell their browsers so."""

    def __init__(self, middleware: CORSMiddleware | None = None) -> None:
        self._rules = middleware or _middleware(["*"], ["*"], ["*"], False)

    @classmethod
    def of_app(cls, app: ASGIApp) -> CorsRules:
        """Return the rules of the CORS middleware inside an app; the defaults if there is none."""
        layer: Any = app
        while layer is not None and not isinstance(layer, CORSMiddleware):
            layer = getattr(layer, "app", None)
        return cls(layer)

    @classmethod
    def of_arguments(cls, arguments_of: Sequence[Sequence[str]]) -> CorsRules:
        """Return the rules that vLLM's arguments for each variant set.

        Raises UserError if they cannot be read, or if variants differ: a preflight does not say which one it is for.
        """
        given = [_given(arguments) for arguments in arguments_of]
        if any(other != given[0] for other in given):
            problem = "differ between variants, and the gateway has one set of CORS rules"
            raise UserError("vllm_args", ", ".join(_LISTS), problem, "give them once, to all variants")
        return cls(_middleware(*given[0])) if given else cls()

    def answer_headers(self, request_headers: RawHeaders) -> list[tuple[str, str]]:
        """Return the headers to add to an answer, for a request with these headers (names in lower case)."""
        rules = self._rules
        origin = Headers(raw=list(request_headers)).get("origin")
        if origin is None:
            return []
        headers = MutableHeaders(dict(rules.simple_headers))
        if rules.allow_all_origins and not rules.allow_credentials:
            return headers.items()
        if rules.is_allowed_origin(origin):
            rules.allow_explicit_origin(headers, origin)
        else:
            headers["Vary"] = "Origin"
        return headers.items()

    def preflight(self, request_headers: RawHeaders) -> tuple[int, list[tuple[str, str]], bytes]:
        """Return status, headers and body of the answer to a preflight."""
        response = self._rules.preflight_response(Headers(raw=list(request_headers)))
        framing = {"content-length", "content-type"}
        headers = [(name, value) for name, value in response.headers.items() if name not in framing]
        return response.status_code, headers, bytes(response.body)


def _middleware(
    origins: Sequence[str], methods: Sequence[str], headers: Sequence[str], allows_credentials: bool
) -> CORSMiddleware:
    async def no_app(*_: object) -> None:
        raise AssertionError

    return CORSMiddleware(
        no_app,
        allow_origins=origins,
        allow_methods=methods,
        allow_headers=headers,
        allow_credentials=allows_credentials,
    )


def _given(arguments: Sequence[str]) -> tuple[list[str], list[str], list[str], bool]:
    """Return origins, methods, headers and whether credentials are allowed, as vLLM reads its arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in _LISTS:
        parser.add_argument(name, name.replace("-", "_").replace("__", "--", 1), default='["*"]')
    parser.add_argument("--allow-credentials", "--allow_credentials", action=argparse.BooleanOptionalAction)
    options, _ = parser.parse_known_args(list(arguments))
    lists = []
    for name in _LISTS:
        text = getattr(options, name[2:].replace("-", "_"))
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise UserError("vllm_args", f"{name} {text}", "is no JSON list of texts", f"write: {name} '[\"*\"]'")
        lists.append(value)
    return lists[0], lists[1], lists[2], bool(options.allow_credentials)
