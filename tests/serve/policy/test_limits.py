"""Tests of limits that a process reads from its environment."""

from __future__ import annotations

import pytest

from slimserve.core.errors import UserError
from slimserve.serve.policy.limits import Limits


def test_limits_come_from_the_environment_or_have_their_defaults() -> None:
    limits = Limits.from_environment({"SLIMSERVE_LIMITS": '{"max_running": 3, "drain_s": 1}'})
    assert (limits.max_running, limits.drain_s) == (3, 1)
    assert limits.max_body_bytes == 8 * 2**20
    assert Limits.from_environment({}) == Limits()


def test_limits_round_trip_through_the_environment() -> None:
    limits = Limits(max_running=7, queue_timeout_s=0.5)
    assert Limits.from_environment({"SLIMSERVE_LIMITS": limits.model_dump_json()}) == limits


@pytest.mark.parametrize("text", ["{", '{"max_runing": 3}', '{"max_running": 0}', '{"max_running": "3"}', "[]"])
def test_invalid_limits_are_rejected(text: str) -> None:
    with pytest.raises(UserError, match="SLIMSERVE_LIMITS"):
        Limits.from_environment({"SLIMSERVE_LIMITS": text})


def test_the_default_queue_adds_at_most_half_a_service_time() -> None:
    limits = Limits()
    assert 1 + limits.max_queued / limits.max_running <= 1.5
