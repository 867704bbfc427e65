"""An engine's server without vLLM: the real middleware and metrics around an application with fixed answers.

It replaces `python -m slimserve.serve.engine.entry ARGS`. It exits at once if the file named by STAND_IN_BROKEN
contains the variant's name.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import uvicorn
from prometheus_client import Counter, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from slimserve.serve.engine.middleware import RequestMiddleware
from slimserve.serve.policy.exposition import label_series
from slimserve.serve.policy.metrics import score_metrics

VARIANT = os.environ.get("SLIMSERVE_VARIANT", "")
GENERATED = Counter("vllm:generation_tokens", "Generated tokens, as vLLM counts them", ["model_name", "engine"])


async def score(request: Request) -> Response:
    items = (await request.json())["items"]
    score_metrics().items.inc(len(items))
    GENERATED.labels(VARIANT, "0").inc(len(items))
    return JSONResponse({"scores": [[1.0] for _ in items], "model": VARIANT})


async def metrics(_request: Request) -> Response:
    return PlainTextResponse(label_series(generate_latest().decode(), VARIANT))


async def health(_request: Request) -> Response:
    return Response()


def main() -> None:
    if "slimserve.serve.engine.entry" not in sys.argv or VARIANT in Path(os.environ["STAND_IN_BROKEN"]).read_text(
        encoding="utf-8"
    ):
        sys.exit("broken, as requested")
    routes = [
        Route("/v1/score", score, methods=["POST"]),
        Route("/metrics", metrics),
        Route("/health", health),
    ]
    port = int(sys.argv[sys.argv.index("--port") + 1])
    uvicorn.run(RequestMiddleware(Starlette(routes=routes)), host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
