"""Measure what a catalogue of a million items costs: load time, memory and items/s against a small catalogue.

    make bench-catalogue-size

Both variants are SmolLM2-135M with random rows for their items, one token each. A request has a history of 24 items
with their labels and 16 candidates, and compares two labels (`apply_softmax`), which needs no logits of other tokens.
The sides are served in turn and then in reverse order. `items_per_s_ratio` is that of the large catalogue over the
small one; the goal is at least 0.9. `tokenizer_s` is the time to read the tokenizer.

The cache keeps the variants, of which the large one takes 2.9 GB. The last line of output is one JSON object. The
benchmark takes about 15 minutes on two cores; `--quick` takes 20,000 items and one round.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import torch

from benches.served import KEEPALIVE_S, MODEL, our_spec
from slimserve.core.catalogue import Catalogue, read_catalogue, write_catalogue
from slimserve.core.model import resolve_model
from slimserve.core.model_files import copy_companions
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.core.storage import atomic_directory, cache_dir
from slimserve.core.tokenizer import load_tokenizer
from slimserve.distill.item_checkpoint import grow_vocabulary, write_item_tokens
from slimserve.distill.models import load_model
from slimserve.serve.launch.process import Engine

SMALL, LARGE, QUICK_LARGE = 1_682, 1_000_000, 20_000
NUM_REQUESTS, CONCURRENCY, HISTORY, CANDIDATES = 480, 8, 24, 16


def main() -> None:
    is_quick = "--quick" in sys.argv[1:]
    sizes = (SMALL, QUICK_LARGE if is_quick else LARGE)
    samples: dict[str, list[float]] = {}
    for number in range(1 if is_quick else 2):
        rates = {}
        for size in sizes if number % 2 == 0 else sizes[::-1]:
            rates[size] = _serve(_variant(size), samples, "small" if size == SMALL else "large")
        samples.setdefault("items_per_s_ratio", []).append(rates[sizes[1]] / rates[SMALL])
    print(bench_line("catalogue-size", samples))


def _variant(num_items: int) -> Path:
    """Return the model with random rows for items, from the cache or made now."""
    target = cache_dir("bench-catalogue-size") / f"{MODEL}-{num_items}"
    if target.exists():
        return target
    source = resolve_model(MODEL)
    model: Any = load_model(source, torch.bfloat16)
    first_token = load_tokenizer(source).backend_tokenizer.get_vocab_size()
    embedding = model.get_input_embeddings().weight
    rows = torch.randn(num_items, embedding.shape[1], dtype=torch.bfloat16) * float(embedding.detach().float().std())
    grow_vocabulary(model, rows, first_token, num_items)
    catalogue = Catalogue(first_token, num_items, 1, {}).with_items(str(number) for number in range(num_items))
    with atomic_directory(target) as output:
        model.save_pretrained(output)
        copy_companions(source, output)
        write_item_tokens(output, num_items)
        write_catalogue(output, catalogue)
    return target


def _serve(directory: Path, samples: dict[str, list[float]], name: str) -> float:
    """Serve a variant, record its load time and memory, and return its items/s."""

    def record(key: str, value: float) -> None:
        samples.setdefault(f"{name}_{key}", []).append(value)

    begun = time.perf_counter()
    load_tokenizer(directory)
    record("tokenizer_s", time.perf_counter() - begun)
    catalogue = read_catalogue(directory)
    assert catalogue is not None
    log = directory.parent / "engine.log"
    with Engine(our_spec(log, directory, "prefill")) as engine:
        begun = time.perf_counter()
        asyncio.run(_score(engine.spec.url, list(catalogue.tokens)))
        rate = NUM_REQUESTS * CANDIDATES / (time.perf_counter() - begun)
        record("ready_s", engine.ready_s)
        record("peak_rss_gib", engine.peak_rss_bytes() / 2**30)
        record("items_per_s", rate)
    print_status(f"{directory.name}: {rate:.0f} items/s, ready after {engine.ready_s:.0f} s")
    return rate


async def _score(url: str, ids: list[str]) -> None:
    """Send requests with random histories and candidates, a fixed number of them at a time."""
    draw, remaining = random.Random(0), iter(range(NUM_REQUESTS))
    limits = httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_S)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def run_user() -> None:
            for _ in remaining:
                history: list[Any] = []
                for item in draw.choices(ids, k=HISTORY):
                    history += [{"item_id": item}, draw.choice((" yes\n", " no\n"))]
                body = {
                    "history": history,
                    "item_ids": draw.choices(ids, k=CANDIDATES),
                    "labels": [" yes", " no"],
                    "apply_softmax": True,
                }
                (await client.post("/v1/score", json=body)).raise_for_status()

        await asyncio.gather(*(run_user() for _ in range(CONCURRENCY)))


if __name__ == "__main__":
    main()
