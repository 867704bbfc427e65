"""Tests of request ids."""

from __future__ import annotations

import re

import pytest

from slimserve.serve.policy.request_id import request_id_of


@pytest.mark.parametrize("header", [b"abc-1.2_3", b"x" * 128])
def test_a_valid_id_is_kept(header: bytes) -> None:
    assert request_id_of(header) == header.decode()


@pytest.mark.parametrize("header", [b"", b"a b", b"a\n", b"\xff", b"x" * 129])
def test_a_missing_or_invalid_id_is_replaced_by_a_new_one(header: bytes) -> None:
    ids = {request_id_of(header) for _ in range(2)}
    assert len(ids) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", made) for made in ids)
