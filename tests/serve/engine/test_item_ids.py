"""Tests of item ids in score, rerank and warm requests, without an engine."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from tokenizers import AddedToken, Tokenizer

from slimserve.core.catalogue import Catalogue, token_text
from slimserve.serve.engine.item_ids import NO_ITEMS, ItemTexts
from slimserve.serve.engine.prompt_tokenizer import PromptTokenizer
from slimserve.serve.engine.rerank import RerankRequest, as_score_request, rerank_body
from slimserve.serve.engine.score_request import RequestError, ScoreRequest, WarmRequest, validation_problem
from slimserve.serve.engine.scoring import plan_scoring
from slimserve.serve.engine.warm import warm_prompt
from slimserve.serve.policy.rerank_templates import RerankTemplate

CATALOGUE = Catalogue(49_152, 4, 1, {}).with_items(["50", "7", "nine"])
LABELS = {"labels": [" yes", " no"], "apply_softmax": True}


@pytest.fixture
def unknown() -> Counter[str]:
    return Counter()


@pytest.fixture
def items(unknown: Counter[str]) -> ItemTexts:
    return ItemTexts(CATALOGUE, lambda outcome: unknown.update([outcome]))


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> PromptTokenizer:
    backend = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    backend.add_tokens([AddedToken(token_text(number), normalized=False, special=False) for number in range(4)])
    return PromptTokenizer(lambda text, special: backend.encode(text, add_special_tokens=special).ids, backend)


def render(content: str, kwargs: dict[str, Any]) -> str:
    return f"<user>{content.strip()}</user>{kwargs.get('end', '')}"


def test_items_and_histories_are_read_as_tokens(items: ItemTexts, tokenizer: PromptTokenizer) -> None:
    body = {"history": [{"item_id": "7"}, " yes\nHeat: no\n", {"item_id": "50"}, " no\n"], "item_ids": ["nine", "50"]}
    request = ScoreRequest.model_validate({**body, **LABELS})
    plan = plan_scoring(items.in_score_request(request), tokenizer, 49_216, 100, 10, render)
    history = "<|item_1|> yes\nHeat: no\n<|item_0|> no\n"
    for task, item in zip(plan.tasks, ("<|item_2|>", "<|item_0|>"), strict=True):
        assert list(task.prompt) == tokenizer.encode(history + item, True)
        assert task.labels == tuple((tokenizer.encode(label, False)[0],) for label in (" yes", " no"))
    assert plan.num_prefix_tokens == len(tokenizer.encode(history, True))


def test_the_same_item_twice_is_computed_once(items: ItemTexts, tokenizer: PromptTokenizer) -> None:
    request = ScoreRequest.model_validate({"item_ids": ["7", "50", "7"], **LABELS})
    plan = plan_scoring(items.in_score_request(request), tokenizer, 49_216, 100, 10, render)
    assert (len(plan.tasks), plan.task_of_item) == (2, (0, 1, 0))


def test_an_unknown_item_is_an_error_or_gives_way_to_its_text(items: ItemTexts, unknown: Counter[str]) -> None:
    body = {"item_ids": ["7", "new"], "items": ["Seven:", "New:"], **LABELS}
    with pytest.raises(RequestError, match=r"item_ids\[1\]: 'new' is not in the catalogue"):
        items.in_score_request(ScoreRequest.model_validate(body))
    request = items.in_score_request(ScoreRequest.model_validate({**body, "unknown_items": "text"}))
    assert request.items == ["<|item_1|>", "New:"]
    history = [{"item_id": "new", "text": "New:"}, " yes\n"]
    request = ScoreRequest.model_validate({"history": history, "query": "?", "items": ["a"], "unknown_items": "text"})
    assert items.in_score_request(request).query == "New: yes\n?"
    assert unknown == {"error": 1, "text": 2}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"item_ids": ["new"], "unknown_items": "text"}, r"item_ids\[0\]: 'new' .*give its text too"),
        ({"item_ids": ["7"], "items": ["a", "b"]}, "has 1 ids for 2 items"),
        ({"item_ids": ["7"], "items": [[1, 2]]}, "needs items that are texts"),
        ({"history": [{"item_id": "new"}], "items": ["a"]}, r"history\[0\]: 'new'"),
        ({"history": [{"item_id": "7"}], "query": [1], "items": ["a"]}, "needs a query that is a text"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(items: ItemTexts, body: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        items.in_score_request(ScoreRequest.model_validate({**body, **LABELS}))


def test_no_items_and_a_model_without_items_are_errors(tokenizer: PromptTokenizer) -> None:
    empty = NO_ITEMS.in_score_request(ScoreRequest.model_validate({"item_ids": [], **LABELS}))
    with pytest.raises(RequestError, match="items: is empty"):
        plan_scoring(empty, tokenizer, 49_216, 100, 10, render)
    with pytest.raises(RequestError, match="this model has no item tokens"):
        NO_ITEMS.in_score_request(ScoreRequest.model_validate({"item_ids": ["7"], **LABELS}))


@pytest.mark.parametrize(
    ("kind", "body", "name"),
    [
        (ScoreRequest, {"item_ids": [7]}, "item_ids[0]"),
        (ScoreRequest, {"query": "a"}, "items"),
        (ScoreRequest, {"items": ["a"], "unknown_items": "guess"}, "unknown_items"),
        (ScoreRequest, {"items": ["a"], "history": [{"item_id": 7}]}, "history[0].item_id"),
        (RerankRequest, {"query": "a", "item_ids": ["b", None]}, "item_ids[1]"),
        (WarmRequest, {"query": "a", "items": ["b"]}, "items"),
    ],
)
def test_an_error_names_the_field_as_the_body_has_it(kind: type[BaseModel], body: Any, name: str) -> None:
    text = json.dumps(body).encode()
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(text)
    assert validation_problem(caught.value, text)[0] == name


def test_rerank_takes_item_ids_and_names_them_in_its_answer(items: ItemTexts) -> None:
    template = RerankTemplate(template="Q {query} D {document} A", labels=[" ja", " nein"])
    request = RerankRequest.model_validate({"query": "q", "item_ids": ["nine", "7"]})
    assert as_score_request(request, template, lambda *_: 0, items).items == ["<|item_2|> A", "<|item_1|> A"]
    usage = {"prompt_tokens": 1}
    body = rerank_body(request, [(0, 0.1), (1, 0.9)], model="m", request_id="r", api_version=1, usage=usage)
    assert [(one["index"], one["item_id"]) for one in body["results"]] == [(1, "7"), (0, "nine")]
    beside = RerankRequest.model_validate(
        {"query": "q", "item_ids": ["x", "7"], "documents": ["X", {"text": "Y"}], "unknown_items": "text"}
    )
    assert as_score_request(beside, template, lambda *_: 0, items).items == ["X A", "<|item_1|> A"]
    with pytest.raises(RequestError, match="is empty"):
        as_score_request(RerankRequest(query="q", item_ids=[]), template, lambda *_: 0, items)


def test_prompts_are_cut_before_item_tokens_and_give_the_tokens_of_the_joined_text(
    tokenizer: PromptTokenizer, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long history of items is tokenized once; a model without item tokens does not take the text for one."""
    from slimserve.serve.engine.prompt_tokenizer import PromptTexts

    head = "".join(f"<|item_{number % 4}|> {'no' if number % 3 else 'yes'}\n" for number in range(50))
    texts = PromptTexts(head, ("<|item_3|>", "Heat (1995):", "<|item_0|><|item_1|>", "", "<|item_"), "", True)
    longest: list[int] = []
    real = tokenizer.encode_all

    def encode_all(rows: list[str]) -> list[list[int]]:
        longest.append(max(map(len, rows)))
        return real(rows)

    monkeypatch.setattr(tokenizer, "encode_all", encode_all)
    assert tokenizer.prompts(texts) == [tokenizer.encode(texts.prompt(index), True) for index in range(5)]
    assert longest[0] < 50
    plain = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    other = PromptTokenizer(lambda text, special: plain.encode(text, add_special_tokens=special).ids, plain)
    assert other.prompts(texts) == [other.encode(texts.prompt(index), True) for index in range(5)]


def test_a_warm_prompt_is_what_score_requests_begin_with(items: ItemTexts, tokenizer: PromptTokenizer) -> None:
    history = [{"item_id": "7"}, " yes\n", {"item_id": "50"}, " no\n"]
    request = ScoreRequest.model_validate({"history": history, "item_ids": ["nine", "50"], **LABELS})
    plan = plan_scoring(items.in_score_request(request), tokenizer, 49_216, 100, 10, render)
    warming = items.in_warm_request(WarmRequest.model_validate({"history": history}))
    warm = warm_prompt(warming, tokenizer, 49_216, 100, render)
    assert all(list(task.prompt[: len(warm)]) == warm for task in plan.tasks)
    assert len(warm) == plan.num_prefix_tokens
    chat = WarmRequest(query="Is it so: ", apply_chat_template=True)
    assert warm_prompt(chat, tokenizer, 49_216, 100, render) == tokenizer.encode("<user>Is it so: ", False)
    assert warm_prompt(WarmRequest(query=[5, 6]), tokenizer, 49_216, 100, render) == [5, 6]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "nothing to compute"),
        ({"query": [49_216]}, "outside the vocabulary"),
        ({"query": list(range(101))}, "has 101 tokens, and the model takes 100"),
        ({"query": [1], "apply_chat_template": True}, "needs the query as a text"),
    ],
)
def test_a_prefix_that_cannot_be_scored_is_not_warmed(
    tokenizer: PromptTokenizer, body: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        warm_prompt(WarmRequest.model_validate(body), tokenizer, 49_216, 100, render)


def test_the_schemas_of_requests_have_no_references() -> None:
    """They stand inside an OpenAPI document, where `#/$defs` is another place."""
    for kind in (ScoreRequest, WarmRequest, RerankRequest):
        assert "$ref" not in json.dumps(kind.model_json_schema())
