"""A variant with item tokens on stock vLLM: scores against transformers, warm calls, unknown items, generated text."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimserve.compare.check import check_variant
from slimserve.core.catalogue import CATALOGUE_FILE, Catalogue, write_catalogue
from slimserve.core.errors import UserError
from slimserve.core.model import resolve_model
from slimserve.distill.item_checkpoint import grow_vocabulary, write_item_tokens
from slimserve.serve.launch.plan import Choice, LaunchPlan
from slimserve.serve.launch.process import STOCK_COMMAND, Engine, EngineSpec, free_port
from tests.serve.conftest import BLOCK, NAME

NUM_ITEMS = 40
HISTORY = [part for item in range(36) for part in ({"item_id": f"i{item}"}, " no\n" if item % 3 else " yes\n")]


@pytest.fixture(scope="module")
def variant(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model with 40 items, whose rows are as large as those of words."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    first = model.config.vocab_size
    catalogue = Catalogue(first, 48, 1, {}).with_items(f"i{item}" for item in range(NUM_ITEMS))
    rows = 0.02 * torch.randn(NUM_ITEMS, model.config.hidden_size, generator=torch.Generator().manual_seed(7))
    grow_vocabulary(model, rows, first, catalogue.num_tokens)
    directory = tmp_path_factory.mktemp("items") / "variant"
    model.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model / file, directory / file)
    write_item_tokens(directory, catalogue.num_tokens)
    write_catalogue(directory, catalogue)
    return directory


@pytest.fixture(scope="module")
def url(variant: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    plan = LaunchPlan(
        environment=(Choice("VLLM_PLUGINS", "slimserve", "for the test"), Choice("SLIMSERVE_VARIANT", "one", "a label"))
    )
    extra = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--block-size", str(BLOCK)]
    extra += ["--max-num-seqs", "64", "--kv-cache-memory-bytes", str(2**28)]
    log = tmp_path_factory.mktemp("items-log") / "engine.log"
    spec = EngineSpec(variant, NAME, plan, log, free_port(), extra=tuple(extra), command=STOCK_COMMAND)
    with Engine(spec) as engine:
        yield engine.spec.url


def post(url: str, path: str, **body: Any) -> dict[str, Any]:
    response = requests.post(f"{url}{path}", json=body, timeout=120)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.engine
def test_scores_of_items_are_those_of_transformers_in_ours_and_in_stock_endpoints(url: str, variant: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(variant)
    model = AutoModelForCausalLM.from_pretrained(variant, dtype=torch.float32)
    query = "".join(part if isinstance(part, str) else f"<|item_{part['item_id'][1:]}|>" for part in HISTORY)
    labels = [tokenizer(label)["input_ids"][0] for label in (" yes", " no")]
    prompts = [query + f"<|item_{item}|>" for item in (3, 39)] + [query + "Heat (1995):"]
    expected = torch.stack(
        [model(torch.tensor([tokenizer(one)["input_ids"]])).logits[0, -1].log_softmax(-1)[labels] for one in prompts]
    )
    answer = post(
        url,
        "/v1/score",
        history=HISTORY,
        item_ids=["i3", "i39", "unknown"],
        items=["Three", "Nine", "Heat (1995):"],
        unknown_items="text",
        labels=[" yes", " no"],
        return_logprobs=True,
    )
    torch.testing.assert_close(torch.tensor(answer["logprobs"]), expected.detach(), atol=2e-3, rtol=0)
    # vLLM's own endpoint reads the same tokens as texts.
    stock = post(url, "/generative_scoring", query=query, items=["<|item_3|>", "<|item_39|>"], label_token_ids=labels)
    shares = expected[:2].softmax(-1)[:, 0].tolist()
    assert [row["score"] for row in stock["data"]] == pytest.approx(shares, abs=1e-3)
    ranked = post(url, "/v1/rerank", query="a", item_ids=["i3", "i39"])
    assert {one["item_id"] for one in ranked["results"]} == {"i3", "i39"}


@pytest.mark.engine
def test_a_warm_call_puts_the_prefix_of_the_next_request_into_the_cache(url: str) -> None:
    body = {"cache_salt": "w", "history": HISTORY}
    score = {"item_ids": ["i1", "i2"], "labels": [" yes", " no"]}
    cold = post(url, "/v1/score", **{**body, "cache_salt": "c"}, **score)["usage"]
    warm = post(url, "/v1/warm", **body)["usage"]
    assert warm["prompt_tokens"] == 3 * 36
    assert warm["prompt_tokens_details"]["cached_tokens"] == 0
    after = post(url, "/v1/score", **body, **score)["usage"]
    # Three full blocks of 32 tokens; without the warm call only the second item finds them.
    assert after["prompt_tokens_details"]["cached_tokens"] == 2 * 96
    assert cold["prompt_tokens_details"]["cached_tokens"] == 96
    assert post(url, "/v1/warm", **body)["usage"]["prompt_tokens_details"]["cached_tokens"] == 96
    long = {"query": [token % 50 + 100 for token in range(400)], "cache_salt": "l"}
    usages = [post(url, "/v1/warm", **long)["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)]
    assert usages == [0, 384]
    longer = long | {"query": [*long["query"][:320], *range(200, 280)]}
    assert post(url, "/v1/warm", **longer)["usage"]["prompt_tokens_details"]["cached_tokens"] == 320
    too_long = requests.post(f"{url}/v1/warm", json={"query": "no " * 600}, timeout=60)
    assert (too_long.status_code, too_long.json()["error"]["param"]) == (400, "query")


@pytest.mark.engine
def test_unknown_items_are_counted_and_named(url: str) -> None:
    answer = requests.post(f"{url}/v1/score", json={"item_ids": ["i1", "x"], "labels": [" a", " b"]}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "item_ids[1]")
    text = requests.get(f"{url}/metrics", timeout=10).text
    lines = [line for line in text.splitlines() if line.startswith("slimserve_score_unknown_items_total")]
    counts = {line.split('outcome="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
    assert counts["error"] >= 1


@pytest.mark.engine
def test_no_item_is_ever_written(url: str) -> None:
    """At temperature 1 a random model gives every token about the same probability; greedily it writes no item."""
    body = {"model": NAME, "prompt": "<|item_3|> yes\n<|item_5|>", "max_tokens": 64, "ignore_eos": True}
    answer = post(url, "/v1/completions", **body, temperature=0, logprobs=1, return_token_ids=True)
    assert max(answer["choices"][0]["token_ids"]) < 49_152
    assert all(map(math.isfinite, answer["choices"][0]["logprobs"]["token_logprobs"]))


def test_check_and_every_command_refuse_a_catalogue_of_another_checkpoint(variant: Path, tmp_path: Path) -> None:
    findings = check_variant(variant)
    assert next(findings).name == "shapes"
    good = next(findings)
    assert (good.name, good.passed) == ("catalogue", True), good
    broken = shutil.copytree(variant, tmp_path / "broken")
    lines = (broken / CATALOGUE_FILE).read_text().splitlines()
    (broken / CATALOGUE_FILE).write_text("\n".join([*lines, json.dumps({"id": "new", "token": 49_152 + 45})]) + "\n")
    findings = check_variant(broken)
    next(findings)
    bad = next(findings)
    assert not bad.passed
    assert "has the item 'new', whose row in the embedding is empty" in bad.detail
    (broken / CATALOGUE_FILE).write_text(lines[0].replace('"num_slots": 48', '"num_slots": 480') + "\n")
    with pytest.raises(UserError, match="has tokens up to 49631, but the vocabulary of config.json has 49216"):
        resolve_model(str(broken))
