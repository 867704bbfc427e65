"""A client for one model behind an OpenAI-compatible server, used wherever answers matter and not their timing.

`find_target` checks that the server serves the model. `ask_all` sends many prompts with a bounded number of requests in
flight and returns the results in the order of the prompts. The load generator has its own client, because it must
timestamp every chunk (loadtest/http_client.py).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import httpx

from slimserve.core.errors import UserError
from slimserve.core.progress import progress

_CHECK_TIMEOUT_S = 10.0
_REQUEST_TIMEOUT_S = 600.0
_NUM_SHOWN_CHARACTERS = 200

P = TypeVar("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Target:
    """One model behind one OpenAI-compatible server."""

    url: str
    """Base URL without `/v1`."""
    model: str
    tokenizer: str | None = None
    """Directory of the model's tokenizer; None if it is not known, as for an external server."""


def auth_headers() -> dict[str, str]:
    """Return the API key of `VLLM_API_KEY`, the variable that vLLM's server also reads, as a header."""
    key = os.environ.get("VLLM_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def find_target(url: str, model: str | None) -> Target:
    """Check that a server answers at `url` and serves `model`; None selects the only model that it serves.

    Raises UserError if it does not.
    """
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise UserError("url", url, "has no scheme", "write it as http://HOST:PORT")
    try:
        response = httpx.get(f"{base}/v1/models", headers=auth_headers(), timeout=_CHECK_TIMEOUT_S)
        response.raise_for_status()
        served = [entry["id"] for entry in response.json()["data"]]
    except httpx.HTTPStatusError as error:
        code = error.response.status_code
        remedy = "set VLLM_API_KEY to its key" if code in {401, 403} else "check that it speaks the OpenAI API"
        raise UserError("url", url, f"answers {code} to /v1/models", remedy) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(
            "url",
            url,
            f"does not answer ({error})",
            "start the server with `slimserve serve MODEL` or check the address",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("url", url, "does not answer /v1/models with a list of models", "check the address") from error
    if model is None and len(served) == 1:
        return Target(base, served[0])
    if model is None or model not in served:
        raise UserError("model", model, f"is not served at {base}", f"give --model {' or '.join(served)}")
    return Target(base, model)


class OpenAIClient:
    """Sends JSON requests to one model. Every request names the model."""

    def __init__(self, target: Target, http: httpx.AsyncClient) -> None:
        self.target = target
        self._http = http

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON answer to a POST; UserError names the path and quotes the server if it fails."""
        response = await self._send(path, body)
        if response.status_code != 200:
            quote = response.text[:_NUM_SHOWN_CHARACTERS]
            raise UserError("request", path, f"failed with {response.status_code}: {quote}", "read the server's log")
        try:
            return cast("dict[str, Any]", response.json())
        except ValueError as error:
            raise UserError("request", path, "was not answered with JSON", "check the address of the server") from error

    async def try_post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON answer, or an empty dictionary if the server does not know the path or refuses the body."""
        response = await self._send(path, body)
        try:
            answer = response.json() if response.status_code == 200 else {}
        except ValueError:
            return {}
        return answer if isinstance(answer, dict) else {}

    async def _send(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        try:
            return await self._http.post(path, json={"model": self.target.model, **body})
        except httpx.HTTPError as error:
            raise UserError(
                "request",
                f"{self.target.url}{path}",
                f"was not answered ({error!r})",
                "check that the server runs and read its log",
            ) from error


def ask_all(
    target: Target,
    title: str,
    prompts: Sequence[P],
    ask: Callable[[OpenAIClient, P], Awaitable[R]],
    *,
    unit: str = "prompts",
    concurrency: int = 8,
    on_result: Callable[[P, R], None] | None = None,
) -> list[R]:
    """Ask every prompt with at most `concurrency` requests in flight; results come in the order of the prompts.

    `on_result` is called as soon as a result arrives, in order of arrival. The first error ends the run and is raised.
    """

    async def run(tick: Callable[[float], None]) -> list[R]:
        results: dict[int, R] = {}
        slots = asyncio.Semaphore(concurrency)
        # One connection per request: nothing is timed here, and a server may close an idle one as it is reused.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=target.url, headers=auth_headers(), timeout=_REQUEST_TIMEOUT_S, limits=limits
        ) as http:
            client = OpenAIClient(target, http)

            async def answer(number: int, prompt: P) -> None:
                async with slots:
                    results[number] = await ask(client, prompt)
                if on_result is not None:
                    on_result(prompt, results[number])
                tick(len(results))

            async with asyncio.TaskGroup() as group:
                for number, prompt in enumerate(prompts):
                    group.create_task(answer(number, prompt))
        return [results[number] for number in range(len(prompts))]

    with progress(title, len(prompts), unit) as tick:
        try:
            return asyncio.run(run(tick))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
