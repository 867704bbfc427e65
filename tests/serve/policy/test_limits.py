"""Limits and keys as a process finds them in its environment."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from slimserve.core.errors import UserError
from slimserve.serve.policy.limits import Limits, error_body, load_api_keys


def test_limits_come_from_the_environment_and_default_where_unset() -> None:
    found = Limits.from_environment({"SLIMSERVE_LIMITS": '{"max_running": 3, "drain_s": 1}'})
    assert (found.max_running, found.drain_s) == (3, 1)
    assert found.max_body_bytes == 8 * 2**20
    assert Limits.from_environment({}) == Limits()


def test_limits_survive_the_way_into_a_child_process() -> None:
    limits = Limits(max_running=7, queue_timeout_s=0.5)
    assert Limits.from_environment({"SLIMSERVE_LIMITS": limits.model_dump_json()}) == limits


@pytest.mark.parametrize("text", ["{", '{"max_runing": 3}', '{"max_running": 0}', '{"max_running": "3"}', "[]"])
def test_limits_that_cannot_be_are_named(text: str) -> None:
    with pytest.raises(UserError, match="SLIMSERVE_LIMITS"):
        Limits.from_environment({"SLIMSERVE_LIMITS": text})


def test_the_default_queue_keeps_the_promise_about_the_tail() -> None:
    limits = Limits()
    assert 1 + limits.max_queued / limits.max_running <= 1.5


def test_keys_are_those_of_the_file_and_of_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst\n\n  second  \n")
    file.chmod(0o600)
    environment = {"SLIMSERVE_API_KEYS_FILE": str(file), "VLLM_API_KEY": "third", "SLIMSERVE_API_KEY": ""}
    assert load_api_keys(environment) == {"first", "second", "third"}
    assert load_api_keys({}) == frozenset()


@pytest.mark.parametrize("content", ["", "# only a comment\n", "with a space\n", "schlüssel\n"])
def test_a_key_file_without_a_usable_key_does_not_leave_the_server_open(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(UserError, match="API key") as error:
        load_api_keys({"SLIMSERVE_API_KEYS_FILE": str(file)})
    assert content.strip() == "" or content.strip() not in str(error.value)


def test_a_key_file_that_is_missing_is_an_error_and_one_that_others_read_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_api_keys({"SLIMSERVE_API_KEYS_FILE": str(tmp_path / "none")})
    file = tmp_path / "keys"
    file.write_text("secret\n")
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        load_api_keys({"SLIMSERVE_API_KEYS_FILE": str(file)})
    assert "chmod 600" in caplog.text
    assert "secret" not in caplog.text


def test_an_error_is_the_object_of_openais_api() -> None:
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
