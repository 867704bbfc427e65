"""Tests of the connector that shares the last block of a prefix: its decisions for fake requests, and real scores."""

from __future__ import annotations

import random
import urllib.request
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.conftest import BLOCK


@dataclass
class Request:
    """The fields of a vLLM request that the connector reads; the hash of a full block is its tokens."""

    request_id: str
    prompt_token_ids: list[int]
    shared: int | None = None
    num_computed_tokens: int = 0
    lora_request: None = None
    cache_salt: str | None = None

    @property
    def kv_transfer_params(self) -> dict[str, int] | None:
        return None if self.shared is None else {"shared_prefix_tokens": self.shared}

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def block_hashes(self) -> list[tuple[int, ...]]:
        ends = range(BLOCK, len(self.prompt_token_ids) + 1, BLOCK)
        return [tuple(self.prompt_token_ids[:end]) for end in ends]


@dataclass
class Scheduler:
    """The part of vLLM's scheduler that drives a connector, without a cache."""

    connector: Any
    blocks: dict[str, list[int]] = field(default_factory=dict)

    def get_block_ids(self, request_id: str) -> tuple[list[int]]:
        return (self.blocks[request_id],)

    def ask(self, request: Request, cached: int = 0) -> int | None:
        tokens, later = self.connector.get_num_new_matched_tokens(request, cached)
        assert later is False
        return None if tokens is None else int(tokens)

    def schedule(self, request: Request, blocks: list[int], external: int = 0) -> None:
        self.blocks[request.request_id] = blocks
        allocated = SimpleNamespace(blocks=([SimpleNamespace(block_id=block) for block in blocks],))
        self.connector.update_state_after_alloc(request, allocated, external)

    def step(self, **num_tokens: int) -> Any:
        return self.connector.build_connector_meta(SimpleNamespace(num_scheduled_tokens=num_tokens))


def make_connector(role: str = "SCHEDULER", num_blocks: int = 9, groups: int = 1) -> Any:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from slimserve.serve.engine.partial_prefix import PartialPrefixConnector

    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=BLOCK, enable_prefix_caching=True), kv_transfer_config=object()
    )
    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(page_size_bytes=BLOCK_BYTES), layer_names=["a", "b"])
    caches = SimpleNamespace(kv_cache_groups=[group] * groups, num_blocks=num_blocks)
    return PartialPrefixConnector(config, KVConnectorRole[role], caches)


def make_scheduler() -> Scheduler:
    scheduler = Scheduler(make_connector())
    scheduler.connector._kv_cache_manager = scheduler
    return scheduler


@pytest.fixture
def scheduler() -> Scheduler:
    return make_scheduler()


PREFIX = list(range(40))
BLOCK_BYTES = 1000
"""Bytes of a block in one layer."""


def item(name: str, *tokens: int, prefix: list[int] = PREFIX) -> Request:
    return Request(name, [*prefix, *tokens], shared=len(prefix))


def test_the_first_request_computes_the_prefix_and_the_others_wait_and_load_its_last_block(
    scheduler: Scheduler,
) -> None:
    first, second = item("a", 7, 8), item("b", 9)
    assert scheduler.ask(first) == 0
    scheduler.schedule(first, [3, 4])
    assert scheduler.ask(second, cached=32) is None
    step = scheduler.step(a=42)
    assert list(step.save.values()) == [4], "token 39 is in the second block"
    assert not step.load
    assert scheduler.ask(second, cached=32) == 8
    scheduler.schedule(second, [3, 6], external=8)
    step = scheduler.step(b=1)
    assert step.load == {0: [6]}
    assert not step.save


def test_a_prefix_computed_in_chunks_is_saved_when_its_end_is_reached(scheduler: Scheduler) -> None:
    first = item("a", 7)
    assert scheduler.ask(first) == 0
    scheduler.schedule(first, [3, 4])
    assert not scheduler.step(a=39).save
    first.num_computed_tokens = 39
    assert list(scheduler.step(a=2).save.values()) == [4]


def test_another_request_computes_the_prefix_if_the_first_ends_early(scheduler: Scheduler) -> None:
    first, second = item("a", 7), item("b", 9)
    assert scheduler.ask(first) == 0
    assert scheduler.ask(second, cached=32) is None
    assert scheduler.connector.request_finished(first, []) == (False, None)
    assert scheduler.ask(second, cached=32) == 0


def test_no_request_reads_the_block_of_another_prefix(scheduler: Scheduler) -> None:
    first = item("a", 7)
    scheduler.ask(first)
    scheduler.schedule(first, [3, 4])
    scheduler.step(a=41)
    other_tail = item("b", 9, prefix=[*PREFIX[:-1], 99])
    other_start = item("c", 9, prefix=[99, *PREFIX[1:]])
    salted = item("d", 9)
    assert scheduler.ask(other_tail, cached=32) == 0
    assert scheduler.ask(other_start, cached=32) == 0
    assert scheduler.ask(salted, cached=32) == 8, "a prefix with the same content is reused"


def test_short_prefixes_are_distinguished_by_cache_salt(scheduler: Scheduler) -> None:
    first, salted = item("a", 7, prefix=[1, 2, 3]), item("b", 9, prefix=[1, 2, 3])
    salted.cache_salt = "secret"
    scheduler.ask(first)
    scheduler.schedule(first, [3])
    scheduler.step(a=4)
    assert scheduler.ask(item("c", 9, prefix=[1, 2, 3])) == 3
    assert scheduler.ask(salted) == 0


@pytest.mark.parametrize("shared", [None, 0, -5, 64, 42, 10_000, "8", 3.5])
def test_requests_without_a_usable_shared_prefix_are_left_alone(scheduler: Scheduler, shared: Any) -> None:
    prompt = Request("a", [*PREFIX, 7, 8], shared)
    assert scheduler.ask(prompt) == 0
    scheduler.schedule(prompt, [3, 4])
    assert not scheduler.step(a=42).save


def test_models_with_several_kinds_of_cache_are_left_alone() -> None:
    scheduler = Scheduler(make_connector(groups=2))
    assert scheduler.ask(item("a", 7)) == 0
    assert scheduler.ask(item("b", 7)) == 0


@pytest.mark.parametrize("limit", [("_MAX_SAVED_BLOCKS", 2), ("_MAX_SAVED_BYTES", 5 * BLOCK_BYTES)])
def test_the_least_recently_used_block_is_replaced(limit: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from slimserve.serve.engine import partial_prefix

    monkeypatch.setattr(partial_prefix, *limit)
    scheduler = make_scheduler()

    def save(start: int) -> int:
        request = item(f"r{start}", 7, prefix=[start, *PREFIX[1:]])
        scheduler.ask(request)
        scheduler.schedule(request, [3, 4])
        return int(next(iter(scheduler.step(**{request.request_id: 41}).save)))

    def is_saved(start: int) -> bool:
        request = item("x", 9, prefix=[start, *PREFIX[1:]])
        tokens = scheduler.ask(request, cached=32)
        if tokens:
            scheduler.schedule(request, [3, 6], external=tokens)
            scheduler.step(x=1)
        else:
            scheduler.connector.request_finished(request, [])
        return bool(tokens)

    slots = [save(100), save(101)]
    assert is_saved(100)
    assert save(102) == slots[1], "101 was used least recently"
    assert [is_saved(start) for start in (100, 101, 102)] == [True, False, True]
    assert scheduler.connector.reset_cache()
    assert not is_saved(100)


def test_the_worker_copies_full_blocks_in_any_layout() -> None:
    import torch

    from slimserve.serve.engine.partial_prefix import _StepCopies

    connector = make_connector("WORKER", num_blocks=5)
    blocks_first, blocks_second = torch.randn(5, 3, 32, 7), torch.randn(2, 5, 4)
    before = [blocks_first.clone(), blocks_second.clone()]
    connector.register_kv_caches({"a": blocks_first, "b": blocks_second})
    connector.bind_connector_metadata(_StepCopies(save={1: 2}))
    connector.wait_for_save()
    blocks_first[2] = 0
    connector.bind_connector_metadata(_StepCopies(load={1: [0, 4]}))
    connector.start_load_kv(None)
    for block in (0, 4):
        assert torch.equal(blocks_first[block], before[0][2])
        assert torch.equal(blocks_second[:, block], before[1][:, 2])
    assert torch.equal(blocks_first[[1, 3]], before[0][[1, 3]])


def hits(url: str) -> float:
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == "vllm:external_prefix_cache_hits_total")


@pytest.mark.engine
@pytest.mark.parametrize("prefix_tokens", [10, 95, 303])
def test_scores_are_those_of_prompts_computed_alone(scoring_url: str, prefix_tokens: int) -> None:
    url, rng = scoring_url, random.Random(prefix_tokens)

    def tokens(count: int) -> list[int]:
        return rng.choices(range(100, 49_000), k=count)

    query, items = tokens(prefix_tokens), [tokens(rng.randrange(1, 30)) for _ in range(6)]
    labels = tokens(6)
    before = hits(url)
    body = {"query": query, "items": items, "label_token_ids": labels, "apply_softmax": True}
    scores = httpx.post(f"{url}/v1/score", json=body, timeout=60).raise_for_status().json()["scores"]
    assert hits(url) - before == 5 * (prefix_tokens % BLOCK), "all but the first load the last block from the copy"
    alone = []
    for item_tokens in items:
        one = body | {"items": [item_tokens], "cache_salt": str(rng.random())}
        alone += httpx.post(f"{url}/v1/score", json=one, timeout=60).raise_for_status().json()["scores"]
    for shared, reference in zip(scores, alone, strict=True):
        assert shared == pytest.approx(reference, abs=1e-3)
