"""One real engine that the tests of scoring share: stock vLLM, into which only our plugin and connector are let."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.engine import STOCK_COMMAND, Engine, EngineSpec, free_port
from serve.plan import PREFIX_CONNECTOR, Choice, LaunchPlan

NAME = "smol"
MAX_LEN = 2048
BLOCK = 32


@pytest.fixture(scope="session")
def scoring_url(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's own module and launch with /v1/score and /v1/rerank.

    In float32, so that what is compared with transformers is our work and not the rounding of bf16: at this size that
    moves probabilities by up to 0.05 (transformers' own by as much), and a mistake could hide behind it.
    """
    plan = LaunchPlan(
        environment=(Choice("VLLM_PLUGINS", "slimserve", "asked for"), Choice("SLIMSERVE_VARIANT", "one", "a label"))
    )
    extra = ["--enforce-eager", "--dtype", "float32", "--max-model-len", str(MAX_LEN), "--block-size", str(BLOCK)]
    # Short steps, as vLLM's gauges change once a step.
    extra += ["--max-num-batched-tokens", "256", "--max-num-seqs", "64", "--kv-cache-memory-bytes", str(2**29)]
    extra += ["--kv-transfer-config", json.dumps(PREFIX_CONNECTOR)]
    log = tmp_path_factory.mktemp("scoring") / "engine.log"
    spec = EngineSpec(smollm2, NAME, plan, log, free_port(), extra=tuple(extra), command=STOCK_COMMAND)
    with Engine(spec) as engine:
        yield engine.spec.url
