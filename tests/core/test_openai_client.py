import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from slimserve.core.errors import UserError
from slimserve.core.openai_client import Target, find_target
from slimserve.serve.launch.process import answers, free_port
from tests.conftest import FAKE_SERVER


@pytest.fixture
def locked_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the URL of a server with one model that requires a key."""
    monkeypatch.setenv("FAKE_KEY", "secret")
    monkeypatch.setenv("FAKE_MODELS", "only")
    port = free_port()
    server = subprocess.Popen([sys.executable, str(FAKE_SERVER), "--port", str(port)])
    while not answers(f"http://127.0.0.1:{port}/health"):
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


def test_the_only_model_needs_no_name(locked_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="answers 401 to /v1/models; set VLLM_API_KEY"):
        find_target(locked_url, None)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert find_target(f"{locked_url}/v1/", None) == Target(locked_url, "only")


@pytest.mark.parametrize("model", [None, "unknown"])
def test_the_error_for_a_model_that_is_not_served_lists_the_served_ones(fake_url: str, model: str | None) -> None:
    with pytest.raises(UserError, match="is not served .* give --model good or http-500"):
        find_target(fake_url, model)


def test_a_server_that_does_not_answer_is_reported_with_a_remedy() -> None:
    with pytest.raises(UserError, match="does not answer .*slimserve serve MODEL"):
        find_target(f"http://127.0.0.1:{free_port()}", None)


@pytest.mark.parametrize("url", ["localhost:8000", "127.0.0.1", ""])
def test_a_url_without_scheme_is_rejected(url: str) -> None:
    with pytest.raises(UserError, match="has no scheme"):
        find_target(url, None)
