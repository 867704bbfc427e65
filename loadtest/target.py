"""The server under load, seen from outside: is it there, what does it serve, what does it count."""

from __future__ import annotations

import os
from dataclasses import dataclass

import httpx

from contracts.errors import UserError

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


def read_counters(target: Target) -> dict[str, float]:
    """Sums over labels of the server's Prometheus counters; empty where it exports none."""
    from prometheus_client.parser import text_string_to_metric_families

    totals: dict[str, float] = {}
    try:
        response = httpx.get(f"{target.url}/metrics", headers=auth_headers(), timeout=_TIMEOUT_S)
        response.raise_for_status()
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    except (httpx.HTTPError, ValueError):
        return {}
    return totals


def prefix_cache_hit_frac(before: dict[str, float], after: dict[str, float]) -> float | None:
    """Share of prompt tokens between two readings that vLLM took from its prefix cache."""
    asked, found = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
    if asked not in after or after[asked] == before.get(asked, 0.0):
        return None
    return (after[found] - before.get(found, 0.0)) / (after[asked] - before.get(asked, 0.0))
