"""The endpoint plugin on stock vLLM with the real SmolLM2: scores against transformers, clients, limits, aborts."""

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import cohere
import openai
import pytest
import requests
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimserve.workloads.interface import ScoringPrompt
from slimserve.workloads.recommendation import Recommendation
from tests.conftest import measures_time
from tests.serve.conftest import BLOCK, MAX_LEN, NAME

pytestmark = [pytest.mark.engine, measures_time]


@pytest.fixture
def url(scoring_url: str) -> str:
    return scoring_url


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


class Reference:
    """The same model in transformers, in float32."""

    def __init__(self, directory: Path, tokenizer: Any) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def next_logprobs(self, texts: list[str]) -> torch.Tensor:
        """Return log-probabilities of the next token, shape [text, vocabulary]; the common prefix is computed once."""
        ids = [self.tokenizer(text)["input_ids"] for text in texts]
        columns = enumerate(zip(*(row[:-1] for row in ids), strict=False))
        shared = next((position for position, column in columns if len(set(column)) > 1), min(map(len, ids)) - 1)
        cache = self.model(torch.tensor([ids[0][:shared]]), use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(ids))
        rest = [row[shared:] for row in ids]
        longest = max(len(row) for row in rest)
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rest])
        mask = torch.tensor([[1] * (shared + len(row)) + [0] * (longest - len(row)) for row in rest])
        positions = torch.arange(shared, shared + longest).expand(len(ids), -1)
        given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        states = self.model.model(padded, **given).last_hidden_state
        last = torch.tensor([len(row) - 1 for row in rest])
        return cast("torch.Tensor", self.model.lm_head(states[torch.arange(len(ids)), last]).log_softmax(-1))


@pytest.fixture(scope="module")
def reference(smollm2: Path, tokenizer: Any) -> Reference:
    return Reference(smollm2, tokenizer)


def score(url: str, **body: Any) -> dict[str, Any]:
    response = requests.post(f"{url}/v1/score", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return cast("dict[str, Any]", response.json())


def counters(url: str) -> dict[str, float]:
    """Return metric values by name and part, and check that all have the variant label."""
    text = requests.get(f"{url}/metrics", timeout=10).text
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(("vllm:", "slimserve_")):
                assert sample.labels["variant"] == "one"
            values[sample.name + sample.labels.get("part", "")] = sample.value
    return values


def busy(url: str) -> float:
    values = counters(url)
    return values["vllm:num_requests_running"] + values["vllm:num_requests_waiting"]


def long_request(num_items: int = 128) -> dict[str, Any]:
    """Return a request that takes the engine about a minute; one step of it may take 2 s."""
    rng = random.Random()
    items = [[rng.randrange(100, 49000) for _ in range(1500)] for _ in range(num_items)]
    return {"query": [5], "items": items, "label_token_ids": [1]}


def test_scores_of_100_movielens_prompts_are_those_of_transformers(url: str, reference: Reference) -> None:
    prompts = cast("list[ScoringPrompt]", Recommendation(num_candidates=25).make_prompts("quality", 4))
    worst, agreed, pairs = 0.0, 0, 0
    for prompt in prompts:
        expected = reference.next_logprobs([prompt.query + item for item in prompt.items])
        ids = [reference.tokenizer(label)["input_ids"][0] for label in prompt.labels]
        answer = score(url, query=prompt.query, items=prompt.items, labels=prompt.labels)
        expected_scores, scores = expected[:, ids].exp(), torch.tensor(answer["scores"])
        worst = max(worst, float((scores - expected_scores).abs().max()))
        for one, other in combinations(range(len(prompt.items)), 2):
            agreed += bool(
                (expected_scores[one, 0] - expected_scores[other, 0]) * (scores[one, 0] - scores[other, 0]) > 0
            )
            pairs += 1
    assert sum(len(prompt.items) for prompt in prompts) == 100
    assert worst <= 0.0005
    assert agreed / pairs > 0.99


def test_a_softmax_over_the_labels_makes_them_sum_to_one(url: str) -> None:
    body = {"query": "Is the sky blue?", "items": [" Answer:", " Say"], "label_token_ids": [9575, 2030, 260]}
    absolute, relative = score(url, **body)["scores"], score(url, **body, apply_softmax=True)["scores"]
    for row, shares in zip(absolute, relative, strict=True):
        assert shares == pytest.approx([value / sum(row) for value in row], rel=1e-4)


def test_a_label_of_several_tokens_is_rejected_or_scored_as_the_sum_of_its_tokens(
    url: str, reference: Reference
) -> None:
    query, items, labels = "The film was", [" quite", " by no means"], [" unquestionably good", " dull"]
    body: dict[str, Any] = {"query": query, "items": items, "labels": labels}
    rejected = requests.post(f"{url}/v1/score", json=body, timeout=60)
    assert rejected.status_code == 400
    assert "' unquestionably good' is" in rejected.json()["error"]["message"]
    answer = score(url, **body, label_scoring="sequence", return_logprobs=True)
    for item, values in zip(items, answer["logprobs"], strict=True):
        for label, value in zip(labels, values, strict=True):
            prompt = reference.tokenizer(query + item)["input_ids"]
            ids = reference.tokenizer(query + item + label)["input_ids"]
            assert ids[: len(prompt)] == prompt
            total = 0.0
            for end in range(len(prompt), len(ids)):
                text = reference.tokenizer.decode(ids[:end])
                assert reference.tokenizer(text)["input_ids"] == ids[:end]
                total += float(reference.next_logprobs([text])[0, ids[end]])
            assert value == pytest.approx(total, abs=0.005)


def test_a_chat_template_is_applied_as_transformers_does(url: str, reference: Reference) -> None:
    items = [" Is Paris in France?", " Is Rome in France? "]
    answer = score(url, query="Say Yes or No.", items=items, labels=["Yes", "No"], apply_chat_template=True)
    texts = [
        reference.tokenizer.apply_chat_template(
            [{"role": "user", "content": "Say Yes or No." + item}], tokenize=False, add_generation_prompt=True
        )
        for item in items
    ]
    ids = [reference.tokenizer(label)["input_ids"][0] for label in ("Yes", "No")]
    assert torch.allclose(torch.tensor(answer["scores"]), reference.next_logprobs(texts)[:, ids].exp(), atol=0.0005)


def test_the_shared_prefix_is_computed_once_and_duplicates_too(url: str) -> None:
    rng = random.Random(7)
    query = [rng.randrange(100, 49000) for _ in range(1000)]
    items = [[rng.randrange(100, 49000) for _ in range(24)] for _ in range(16)]
    before = counters(url)
    answer = score(url, query=query, items=items + items, label_token_ids=[260, 300])
    after = counters(url)
    assert answer["scores"][:16] == answer["scores"][16:]
    assert len({tuple(row) for row in answer["scores"]}) == 16
    assert after["slimserve_score_items_total"] - before.get("slimserve_score_items_total", 0) == 32
    computed = "slimserve_score_computed_items_total"
    assert after[computed] - before.get(computed, 0) == 16
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == 15 * 1000 + 16 * 1024, "including the last block, which is not full, and all of each duplicate"
    full_blocks = after["vllm:prefix_cache_hits_total"] - before["vllm:prefix_cache_hits_total"]
    partial = after["vllm:external_prefix_cache_hits_total"] - before["vllm:external_prefix_cache_hits_total"]
    assert (full_blocks, partial) == (15 * (1000 // BLOCK * BLOCK), 15 * (1000 % BLOCK))
    assert answer["usage"]["prompt_tokens"] == 32 * 1024


def test_a_prompt_that_is_too_long_is_rejected_with_its_length_and_one_that_just_fits_is_not(url: str) -> None:
    fits = score(url, query=[100] * (MAX_LEN - 2), items=[[5]], label_token_ids=[1])
    assert len(fits["scores"][0]) == 1
    body: dict[str, Any] = {"query": [100] * (MAX_LEN - 2), "items": [[5], [5, 6]], "label_token_ids": [1]}
    rejected = requests.post(f"{url}/v1/score", json=body, timeout=60)
    assert rejected.status_code == 400
    error = rejected.json()["error"]
    assert error["param"] == "items[1]"
    assert f"{MAX_LEN} tokens" in error["message"]
    assert str(MAX_LEN - 1) in error["message"]


def test_a_request_ends_at_its_deadline_and_leaves_nothing_running(url: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        start = time.monotonic()
        answer = pool.submit(requests.post, f"{url}/v1/score", json=long_request() | {"timeout_s": 4}, timeout=60)
        wait_until(lambda: busy(url) > 0, 4)
        late = answer.result()
    assert 3.5 < time.monotonic() - start < 10
    assert late.status_code == 504
    assert late.json()["error"]["param"] == "timeout_s"
    wait_until(lambda: busy(url) == 0, 10)


def test_a_client_that_disconnects_leaves_nothing_running(url: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        disconnected = pool.submit(requests.post, f"{url}/v1/score", json=long_request(), timeout=4)
        wait_until(lambda: busy(url) > 0, 4)
        assert isinstance(disconnected.exception(), requests.ReadTimeout)
    wait_until(lambda: busy(url) == 0, 10)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_example_in_sglangs_documentation_works(url: str) -> None:
    query = "The capital of France is"
    items = ["Paris", "London", "Berlin"]
    data: dict[str, Any] = {
        "model": NAME,
        "query": query,
        "items": items,
        "label_token_ids": [9454, 2753],
        "apply_softmax": True,
    }
    response_json = requests.post(f"{url}/v1/score", json=data, timeout=60).json()
    for scores in response_json["scores"]:
        assert sum(scores) == pytest.approx(1)
    assert len(response_json["scores"]) == 3
    assert response_json["object"] == "scoring"
    assert response_json["model"] == NAME


DOCUMENTS = [
    "Carson City is the capital city of the American state of Nevada.",
    "The Northern Mariana Islands is a group of islands in the Pacific Ocean. Its capital is Saipan.",
    "Capitalization or capitalisation in English grammar is the use of a capital letter at the start of a word.",
    "Washington, D.C. (also known as simply Washington or D.C.) is the capital of the United States.",
]
QUERY = "What is the capital of the United States?"


def test_coheres_clients_of_both_versions_rerank(url: str) -> None:
    second = cohere.ClientV2(api_key="none", base_url=url)
    answer = second.rerank(model=NAME, query=QUERY, documents=DOCUMENTS, top_n=3)
    assert len(answer.results) == 3
    scores = [result.relevance_score for result in answer.results]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= value <= 1 for value in scores)
    first = cohere.Client(api_key="none", base_url=url)
    texts = [{"text": text} for text in DOCUMENTS]
    old = first.rerank(model=NAME, query=QUERY, documents=texts, return_documents=True)
    assert [result.index for result in old.results][:3] == [result.index for result in answer.results]
    assert all(result.document and result.document.text == DOCUMENTS[result.index] for result in old.results)
    assert old.meta
    assert old.meta.api_version
    assert old.meta.api_version.version == "1"


def test_a_jina_request_is_answered_with_its_documents(url: str) -> None:
    data: dict[str, Any] = {"model": NAME, "query": QUERY, "documents": DOCUMENTS, "top_n": 2, "truncation": True}
    answer = requests.post(f"{url}/v1/rerank", json=data, headers={"Authorization": "Bearer none"}, timeout=60).json()
    assert [DOCUMENTS[result["index"]] for result in answer["results"]] == [
        result["document"]["text"] for result in answer["results"]
    ]
    assert answer["usage"]["total_tokens"] > 100
    assert len(answer["results"]) == 2
    plain = requests.post(f"{url}/rerank", json=data | {"return_documents": False}, timeout=60).json()
    assert "document" not in plain["results"][0]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/score", {"query": "a", "items": [], "label_token_ids": [1]}, 400, "items"),
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [10**30]}, 400, "label_token_ids"),
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [49152]}, 400, "label_token_ids"),
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": list(range(129))}, 400, "labels"),
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [1], "model": "other"}, 404, "model"),
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [1], "nonsense": 1}, 400, "nonsense"),
        (
            "/v1/score",
            {
                "query": "a",
                "items": ["b"],
                "label_token_ids": [1],
                "apply_chat_template": True,
                "chat_template_kwargs": {"tokenize": True},
            },
            400,
            "chat_template_kwargs",
        ),
        ("/v1/rerank", {"query": "a", "documents": []}, 400, "documents"),
        ("/v2/rerank", {"query": "a", "documents": ["b" * 10000]}, 400, "documents[0]"),
        ("/v1/rerank", {"query": "a", "documents": ["b", 3]}, 400, "documents[1]"),
        ("/v1/rerank", {"query": "a", "documents": ["b", {"title": "c"}]}, 400, "documents[1]"),
    ],
)
def test_errors_have_openais_form(url: str, path: str, body: dict[str, Any], status: int, param: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    with pytest.raises(openai.APIStatusError) as caught:
        client.post(path, cast_to=object, body=body)
    assert caught.value.status_code == status
    assert caught.value.param == param
    assert caught.value.code == str(status)
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/score", 405)])
def test_unknown_routes_and_methods_have_openais_form(url: str, method: str, path: str, status: int) -> None:
    answer = requests.request(method, url + path, timeout=10)
    assert answer.status_code == status
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert (answer.headers.get("allow") == "POST") is (status == 405)


def test_bodies_that_are_not_json_are_rejected(url: str) -> None:
    json_type = {"Content-Type": "application/json"}
    for content, headers in (
        (b"{", json_type),
        (b'{"query": "\\ud800"}', json_type),
        (b"\xff\x00", json_type),
        (b"{}", {}),
    ):
        answer = requests.post(f"{url}/v1/score", data=content, headers=headers, timeout=10)
        assert answer.status_code == 400, content
        assert answer.json()["error"]["message"]


def test_vllms_own_api_is_untouched(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    completion = client.completions.create(model=NAME, prompt="The capital of France is", max_tokens=1, temperature=0)
    assert completion.choices[0].text == " Paris"
    routes = requests.get(f"{url}/openapi.json", timeout=10).json()["paths"]
    assert {"/v1/score", "/v1/rerank", "/v2/rerank", "/rerank", "/v1/chat/completions"} <= set(routes)
    assert "label_token_ids" in str(routes["/v1/score"]["post"]["requestBody"])
