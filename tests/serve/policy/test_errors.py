"""Tests of error bodies in the form of OpenAI's API."""

from __future__ import annotations

from slimserve.serve.policy.errors import Rejection, draining, error_body


def test_an_error_has_the_form_of_openais_api() -> None:
    assert error_body(429, "busy", code="queue_full") == {
        "error": {"message": "busy", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    }
    assert error_body(404, "no")["error"] == {
        "message": "no",
        "type": "invalid_request_error",
        "param": None,
        "code": 404,
    }
    assert error_body(500, "no")["error"]["type"] == "server_error"


def test_a_rejection_has_a_body_and_the_headers_that_say_when_to_retry() -> None:
    assert Rejection(429, "queue_full", "busy").body() == error_body(429, "busy", code="queue_full")
    assert Rejection(404, None, "no").body()["error"]["code"] == 404
    assert draining().headers() == [("retry-after", "5")]
