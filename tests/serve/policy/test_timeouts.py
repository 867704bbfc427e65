"""Tests of the deadline that a client may set."""

from __future__ import annotations

import pytest

from slimserve.serve.policy.errors import Rejection
from slimserve.serve.policy.timeouts import request_timeout_s


def test_a_client_may_shorten_the_deadline_but_not_extend_it() -> None:
    assert [request_timeout_s(header, 5.0) for header in (b"", b"2.5", b"9")] == [5.0, 2.5, 5.0]


@pytest.mark.parametrize("header", [b"0", b"-1", b"nan", b"inf", b"soon"])
def test_a_deadline_that_is_not_a_positive_number_is_rejected(header: bytes) -> None:
    with pytest.raises(Rejection) as rejected:
        request_timeout_s(header, 5.0)
    assert (rejected.value.status, rejected.value.code) == (400, "invalid_timeout")
