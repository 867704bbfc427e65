"""The server under load, seen from outside: is it there, what does it serve, what does it count."""

from __future__ import annotations

import os
from dataclasses import dataclass

import httpx

from slimserve.core.errors import UserError

_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Target:
    """One model behind one OpenAI-compatible server."""

    url: str
    """Base URL without `/v1`."""
    model: str


def auth_headers() -> dict[str, str]:
    """The API key of `VLLM_API_KEY`, the variable that vLLM's server reads too, as a header."""
    key = os.environ.get("VLLM_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def find_target(url: str, model: str | None) -> Target:
    """Check that a server answers at `url` and serves `model` (None: the only one it has); UserError if not."""
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise UserError("url", url, "has no scheme", "write it as http://HOST:PORT")
    try:
        response = httpx.get(f"{base}/v1/models", headers=auth_headers(), timeout=_TIMEOUT_S)
        response.raise_for_status()
        served = [entry["id"] for entry in response.json()["data"]]
    except httpx.HTTPStatusError as error:
        code = error.response.status_code
        remedy = "set VLLM_API_KEY to its key" if code in {401, 403} else "check that it speaks the OpenAI API"
        raise UserError("url", url, f"answers {code} to /v1/models", remedy) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(
            "url", url, f"is not answered ({error})", "start the server (slimserve serve MODEL) or check the address"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("url", url, "answers /v1/models with something else", "check the address") from error
    if model is None and len(served) == 1:
        return Target(base, served[0])
    if model is None or model not in served:
        raise UserError("model", model, f"is not served at {base}", f"give --model {' or '.join(served)}")
    return Target(base, model)
