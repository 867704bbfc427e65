"""The error object of OpenAI's API, and the errors that both the engine process and the gateway send."""

from __future__ import annotations

from typing import Any


class Rejection(Exception):  # noqa: N818 - an answer to the client, not a failure of ours
    """An error answer that is sent in place of the engine's answer.

    `code` is the error code in the body and the `reason` label of the rejection counter; without one the body has
    the status as its code. `retry_after_s` becomes the Retry-After header. `close` ends the connection after the
    answer, which is necessary if the request's body was not read. `allow` names the methods that a route takes.
    """

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        *,
        retry_after_s: int | None = None,
        allow: str | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s
        self.allow = allow
        self.close = close

    def body(self) -> dict[str, Any]:
        """Return the JSON body of the answer."""
        return error_body(self.status, str(self), code=self.code)

    def headers(self) -> list[tuple[str, str]]:
        """Return the headers that tell the client what to do, names in lower case; `connection` is not among them."""
        headers = []
        if self.retry_after_s is not None:
            headers.append(("retry-after", str(self.retry_after_s)))
        if self.allow is not None:
            headers.append(("allow", self.allow))
        if self.status == 401:
            headers.append(("www-authenticate", "Bearer"))
        return headers


class ClientDisconnected(Exception):  # noqa: N818 - no failure of ours, and nobody is left to answer
    """The client closed the connection before its request was complete or had a slot."""


def error_body(
    status: int,
    message: str,
    type: str | None = None,  # noqa: A002 - the name in the API
    code: str | int | None = None,
    param: str | None = None,
) -> dict[str, dict[str, str | int | None]]:
    """Return the error object as vLLM sends it; the status gives the type and the code if they are not passed."""
    types = {401: "authentication_error", 429: "rate_limit_error"}
    default_type = types.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {
        "error": {
            "message": message,
            "type": type or default_type,
            "param": param,
            "code": status if code is None else code,
        }
    }


def invalid_key() -> Rejection:
    """Return the answer to a request without a valid API key."""
    return Rejection(401, "invalid_api_key", "the API key is missing or unknown; send Authorization: Bearer KEY")


def no_such_route() -> Rejection:
    """Return the answer to a request for a path that does not exist."""
    return Rejection(404, "not_found", "this server has no such route")


def wrong_method(allow: str) -> Rejection:
    """Return the answer to a request whose route takes only the methods `allow`, separated by commas."""
    return Rejection(405, "method_not_allowed", f"this route takes only {allow}", allow=allow)


def draining() -> Rejection:
    """Return the answer to a request that arrives while the server shuts down."""
    return Rejection(503, "draining", "the server is shutting down", retry_after_s=5, close=True)


def shutdown(drain_s: float) -> Rejection:
    """Return the error that ends a request which was still running `drain_s` seconds after the shutdown began."""
    return Rejection(503, "shutdown", f"the server is shutting down and waited {drain_s:g} s for this request")
