"""Tests of limits on request bodies while they arrive."""

from __future__ import annotations

import pytest

from slimserve.serve.policy.errors import Rejection
from slimserve.serve.policy.uploads import MAX_FULL_BODIES, Upload, UploadLimits


def test_a_body_within_the_limit_is_joined_and_its_bytes_are_released() -> None:
    limits = UploadLimits(10)
    upload = Upload(limits)
    upload.add(b"12345")
    upload.add(b"67890")
    assert (upload.body(), limits.num_bytes) == (b"1234567890", 10)
    upload.close()
    assert limits.num_bytes == 0


def test_a_body_above_the_limit_is_rejected_by_its_length_or_while_it_arrives() -> None:
    limits = UploadLimits(10)
    limits.check_content_length(b"10")
    limits.check_content_length(b"")
    with pytest.raises(Rejection) as announced:
        limits.check_content_length(b"11")
    with pytest.raises(Rejection) as streamed:
        Upload(limits).add(b" " * 11)
    for rejected in (announced, streamed):
        assert (rejected.value.status, rejected.value.code, rejected.value.close) == (413, "body_too_large", True)


def test_all_arriving_bodies_together_are_limited() -> None:
    limits = UploadLimits(10, retry_after_s=lambda: 7)
    for _ in range(MAX_FULL_BODIES):
        Upload(limits).add(b" " * 10)
    with pytest.raises(Rejection) as rejected:
        Upload(limits).add(b" ")
    assert (rejected.value.status, rejected.value.code, rejected.value.retry_after_s) == (429, "uploads", 7)
