"""Tests of API keys from a file and the environment, and of the headers that carry them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from slimserve.core.errors import UserError
from slimserve.serve.policy.errors import Rejection
from slimserve.serve.policy.keys import KeyRing, load_api_keys


def test_keys_come_from_the_file_and_the_environment(tmp_path: Path) -> None:
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


def test_a_missing_key_file_is_an_error_and_one_that_others_can_read_a_warning(
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


def test_a_key_is_accepted_in_either_header_and_an_empty_ring_accepts_every_request() -> None:
    ring = KeyRing({"one", "two"})
    for headers in ([(b"authorization", b"Bearer one")], [(b"authorization", b"bearer two")], [(b"x-api-key", b"two")]):
        ring.check(headers)
    for headers in ([], [(b"authorization", b"one")], [(b"x-api-key", b"three")]):
        with pytest.raises(Rejection) as rejected:
            ring.check(headers)
        assert (rejected.value.status, rejected.value.code) == (401, "invalid_api_key")
        assert ("www-authenticate", "Bearer") in rejected.value.headers()
    KeyRing(()).check([])
