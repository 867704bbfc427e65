"""Tests of scoring without an engine: tokens of the joined text, labels in context, closed-form probabilities."""

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from slimserve.core.score_calibration import Fit, ScoreCalibration
from slimserve.serve.engine.prompt_tokenizer import PromptTexts, PromptTokenizer
from slimserve.serve.engine.score_request import RequestError, ScoreRequest
from slimserve.serve.engine.scoring import (
    LabelRead,
    ScoringPlan,
    ScoringTask,
    choose_calibration,
    common_prefix,
    compares_labels,
    label_logprobs,
    label_reads,
    num_cached_prompt_tokens,
    plan_scoring,
    probabilities,
    score_response,
    usage,
)

GPT2 = None
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
PIECES = (
    *("the", "capital", " of", " France", " is", " don", "'", "t", "re", "ve", "ll", "A", "b C", "x", " y"),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u200b"),
    *(".", ",", ":", "!!", "-", "_", "(", ")", "1", "23", "1995", " 7"),
    *("é", "e\u0301", "naïve", " 日本", "語", "🙂", "👩\u200d🚀", "\ufb01", "<|end|>", "<|", "end", "|>"),
)


WORDS = ("the", "capital", "of", "France", "don't", "we'll", "they've", "1995", "yes:", "no\n")


def small_bpe(pattern: str | None, *, bos_eos: bool = False, nfc: bool = False) -> Tokenizer:
    """Return a byte-level BPE of 600 tokens that splits words by `pattern`, as a model family does."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level]) if split else byte_level
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    corpus = ["the capital of France is the capital, don't we'll they've 1995 (1995): yes no"] * 20 + list(PIECES) * 5
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    if bos_eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return tokenizer


def wrapped(backend: Tokenizer) -> PromptTokenizer:
    own = Tokenizer.from_str(backend.to_str())
    return PromptTokenizer(lambda text, special: backend.encode(text, add_special_tokens=special).ids, own)


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: small_bpe(GPT2),
    "llama3": lambda: small_bpe(LLAMA3, bos_eos=True),
    "qwen2": lambda: small_bpe(QWEN2, nfc=True),
}


def random_text(rng: random.Random, length: int) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(length)))


def random_prompt(rng: random.Random) -> tuple[str, str, str]:
    """Return head, item and tail: unusual pieces, or words and pieces cut at random characters."""
    if rng.random() < 0.5:
        return random_text(rng, 30), random_text(rng, 6), random_text(rng, 12)
    words = " ".join(rng.choice([*WORDS, rng.choice(PIECES)]) for _ in range(rng.randrange(2, 20)))
    first, second = sorted(rng.randrange(len(words) + 1) for _ in range(2))
    return words[:first], words[first:second], words[second:]


@pytest.mark.parametrize("family", ["smollm2", *FAMILIES])
def test_tokens_are_those_of_the_joined_text(family: str, smol: Tokenizer) -> None:
    backend = smol if family == "smollm2" else FAMILIES[family]()
    tokenizer = wrapped(backend)
    assert tokenizer.can_share
    rng = random.Random(family)
    cut = merged = 0
    for _ in range(500):
        head, item, tail = random_prompt(rng)
        items = (item, random_text(rng, 6))
        for special in (True, False):
            joined = [backend.encode(head + each + tail, add_special_tokens=special).ids for each in items]
            assert tokenizer.prompts(PromptTexts(head, items, tail, special)) == joined, (head, items, tail)
        apart = [token for part in (head, item, tail) for token in backend.encode(part, add_special_tokens=False).ids]
        merged += apart != joined[0]
        cut += bool(re.search("[A-Za-z] [A-Za-z]", head))
    assert merged > 150, "many texts must be such that joining the tokens of their parts is wrong"
    assert cut > 150, "many texts must be such that tokens are shared"


def test_the_shared_query_is_tokenized_once(smol: Tokenizer) -> None:
    tokenizer = wrapped(smol)
    seen: list[str] = []
    plain = tokenizer.encode_all
    tokenizer.encode_all = lambda texts, special=False: seen.extend(texts) or plain(texts, special)  # type: ignore
    query = "a long history of items " * 100 + "and so: yes\n"
    tokenizer.prompts(PromptTexts(query, ("Heat (1995):", "Seven (1995):"), "", True))
    assert [len(text) < 40 for text in seen] == [True, True]


def test_a_tokenizer_that_merges_over_spaces_is_not_cut() -> None:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False)
    backend.train_from_iterator(["the capital of the capital of", "of the of the"] * 50, trainer)
    tokenizer = wrapped(backend)
    assert not tokenizer.can_share
    texts = PromptTexts("the capital of", (" the capital", " of the", "f"), "", True)
    assert tokenizer.prompts(texts) == [backend.encode(texts.prompt(index)).ids for index in range(3)]


def test_added_tokens_that_swallow_spaces_prevent_cuts() -> None:
    from tokenizers import AddedToken

    backend = small_bpe(GPT2)
    backend.add_tokens([AddedToken("wide", lstrip=True, rstrip=True)])
    assert not wrapped(backend).can_share


def plan_of(tokenizer: PromptTokenizer, limit: int = 100, **fields: Any) -> Any:
    request = ScoreRequest.model_validate_json(json.dumps(fields))
    return plan_scoring(request, tokenizer, 600, limit, 8, lambda content, kwargs: f"<user>{content.strip()}</user>\n")


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return wrapped(small_bpe(GPT2))


def test_equal_items_are_one_task_and_answers_keep_the_order(tokenizer: PromptTokenizer) -> None:
    plan = plan_of(tokenizer, query=[5, 6, 7], items=[[9], [8, 8], [9], [8, 8]], label_token_ids=[3, 4])
    assert [task.prompt for task in plan.tasks] == [(5, 6, 7, 9), (5, 6, 7, 8, 8)]
    assert plan.task_of_item == (0, 1, 0, 1)
    assert plan.num_prefix_tokens == 3
    request = ScoreRequest(query=[5], items=[[9]], label_token_ids=[3, 4])
    answer = score_response(request, plan, [[-1.0, -2.0], [-3.0, -4.0]], "m", [0, 3])
    first, second = [[math.exp(-1), math.exp(-2)], [math.exp(-3), math.exp(-4)]]
    assert answer["scores"] == [first, second, first, second]
    assert answer["usage"]["prompt_tokens"] == 4 + 5 + 4 + 5
    assert answer["object"] == "scoring"


def test_cached_tokens_are_those_that_no_engine_request_computed(tokenizer: PromptTokenizer) -> None:
    """Compare with a model engine that caches single tokens and counts those that it computes."""
    rng = random.Random(1)
    for _ in range(200):
        items = [[rng.randrange(20, 23) for _ in range(rng.randrange(1, 4))] for _ in range(rng.randrange(1, 8))]
        query = [5, 6, 7, 8]
        labels = [[" the"], [" the", " capital"], [" zebra", " no"]][rng.randrange(3)]
        plan = plan_of(tokenizer, query=query, items=items, labels=labels, label_scoring="sequence")
        known: set[tuple[int, ...]] = {()}
        computed_positions: set[tuple[int, ...]] = set()
        cached: list[int] = []
        for task in plan.tasks:
            num_cached = []
            for read in label_reads(task):
                # The last token is always computed, because its logits are needed.
                hits = max(end for end in range(len(read.prompt)) if tuple(read.prompt[:end]) in known)
                num_cached.append(hits)
                ends = [tuple(read.prompt[: end + 1]) for end in range(hits, len(read.prompt))]
                computed_positions |= {(*end, -1 - len(cached)) for end in ends if len(end) <= len(task.prompt)}
                known |= set(ends)
            cached.append(num_cached_prompt_tokens(task, num_cached))
        counts = usage(plan, cached)
        assert counts["prompt_tokens"] == sum(len(query) + len(item) for item in items)
        num_cached_tokens = counts["prompt_tokens_details"]["cached_tokens"]
        assert num_cached_tokens == counts["prompt_tokens"] - len(computed_positions)
        assert 0 <= num_cached_tokens < counts["prompt_tokens"]


def test_an_item_that_repeats_counts_as_cached_in_full(tokenizer: PromptTokenizer) -> None:
    plan = plan_of(tokenizer, query=[5, 6, 7], items=[[9], [8, 8], [9], [9]], label_token_ids=[3])
    assert usage(plan, [0, 3])["prompt_tokens_details"] == {"cached_tokens": 3 + 4 + 4}
    assert usage(plan, [0, 0])["prompt_tokens_details"] == {"cached_tokens": 8}


def test_items_that_give_the_same_prompt_are_computed_once(tokenizer: PromptTokenizer) -> None:
    items = [" capital", " capital ", " capital\n"]  # the template trims them
    plan = plan_of(tokenizer, query="the", items=items, label_token_ids=[3], apply_chat_template=True)
    assert plan.task_of_item == (0, 0, 0)
    num_tokens = len(plan.tasks[0].prompt)
    assert usage(plan, [1])["prompt_tokens_details"] == {"cached_tokens": 1 + 2 * num_tokens}


def test_the_reads_of_further_label_tokens_do_not_count_as_cached_prompts() -> None:
    task = ScoringTask((1, 2, 3), ((7, 8), (7, 9), (5, 6)))
    assert len(label_reads(task)) == 3
    assert num_cached_prompt_tokens(task, [1, 3, 3]) == 1
    assert num_cached_prompt_tokens(ScoringTask((1, 2, 3), ((7, 8),)), [3, 4]) == 3


def test_the_common_prefix_leaves_each_prompt_a_token_to_compute() -> None:
    assert common_prefix([(1, 2, 3), (1, 2, 4, 5), (1, 2, 3, 9)]) == 2
    assert common_prefix([(1, 2), (1, 2, 3)]) == 1
    assert common_prefix([(1,), (2,)]) == 0
    assert common_prefix([(1, 2, 3)]) == 0


def test_item_first_puts_the_item_before_the_query(tokenizer: PromptTokenizer) -> None:
    plan = plan_of(tokenizer, query=[5, 6], items=[[9]], label_token_ids=[3], item_first=True)
    assert plan.tasks[0].prompt == (9, 5, 6)


def test_one_text_is_one_item(tokenizer: PromptTokenizer) -> None:
    assert plan_of(tokenizer, query="the", items=" capital", label_token_ids=[3]).task_of_item == (0,)


def test_labels_are_tokenized_as_continuations_of_their_prompt(tokenizer: PromptTokenizer) -> None:
    backend = small_bpe(GPT2)
    plan = plan_of(tokenizer, query="is", items=[" the", " capital"], labels=[" yes", " no"], label_scoring="sequence")
    for task, text in zip(plan.tasks, ("is the", "is capital"), strict=True):
        for tokens, label in zip(task.labels, (" yes", " no"), strict=True):
            assert [*task.prompt, *tokens] == backend.encode(text + label).ids


def test_a_label_that_merges_with_the_prompt_is_rejected(tokenizer: PromptTokenizer) -> None:
    with pytest.raises(RequestError, match=r"'yes' is not a continuation of 'is '.*front of the label"):
        plan_of(tokenizer, query="is", items=[" "], labels=["yes"])


def test_a_label_of_several_tokens_is_rejected_by_name_or_scored_in_steps(tokenizer: PromptTokenizer) -> None:
    long: dict[str, Any] = {"query": "the", "items": [" capital"], "labels": [" zebra", " no"]}
    with pytest.raises(RequestError, match=r"' zebra' is \d tokens here, \[.*label_scoring"):
        plan_of(tokenizer, **long)
    (task,) = plan_of(tokenizer, **long, label_scoring="sequence").tasks
    assert len(task.labels[0]) > 1


def test_reads_share_label_prefixes_and_their_sum_is_the_logprob_of_the_sequence() -> None:
    task = ScoringTask((1, 2), ((7, 8), (7, 9), (5,)))
    assert label_reads(task) == [LabelRead([1, 2], (7, 5)), LabelRead([1, 2, 7], (8, 9))]
    values = label_logprobs(task, [{7: -1.0, 5: -2.0}, {8: -0.25, 9: -0.5}])
    assert values == [-1.25, -1.5, -2.0]


def test_probabilities_are_over_the_vocabulary_or_over_the_labels() -> None:
    logits = [2.0, -1.0, 0.5, 3.0, -2.0]
    total = sum(math.exp(logit) for logit in logits)
    logprobs = [math.log(math.exp(logits[token]) / total) for token in (3, 0)]
    assert probabilities(logprobs, False) == pytest.approx([math.exp(3) / total, math.exp(2) / total])
    over_labels = math.exp(3) + math.exp(2)
    assert probabilities(logprobs, True) == pytest.approx([math.exp(3) / over_labels, math.exp(2) / over_labels])
    assert probabilities([-2000.0, -2001.0], True) == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])
    assert probabilities([-math.inf, -math.inf], True) == [0.5, 0.5]
    assert probabilities([-math.inf, 0.0], False) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("fields", "labels", "expected"),
    [
        ({"apply_softmax": True}, ((3,), (4,)), True),
        ({"apply_softmax": True, "temperature": 2.0}, ((3,), (4,)), True),
        ({}, ((3,), (4,)), False),
        ({"apply_softmax": True, "return_logprobs": True}, ((3,), (4,)), False),
        ({"apply_softmax": True, "return_token_logprobs": True}, ((3,), (4,)), False),
        ({"apply_softmax": True}, ((3,), (4, 5)), False),
    ],
)
def test_labels_are_only_compared_if_nothing_over_the_vocabulary_is_asked_for(
    fields: dict[str, Any], labels: tuple[tuple[int, ...], ...], expected: bool
) -> None:
    request = ScoreRequest(query=[5], items=[[9]], label_token_ids=[3, 4], **fields)
    assert compares_labels(request, ScoringPlan((ScoringTask((5, 9), labels),), (0,), 0)) is expected


def test_logprobs_are_returned_on_request_and_are_json(tokenizer: PromptTokenizer) -> None:
    request = ScoreRequest(query=[5], items=[[9]], label_token_ids=[3], return_logprobs=True)
    plan = plan_of(tokenizer, query=[5], items=[[9], [9]], label_token_ids=[3])
    body = score_response(request, plan, [[-math.inf]], "m", [0])
    assert json.loads(json.dumps(body, allow_nan=False))["logprobs"] == [[-1e30], [-1e30]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"items": []}, "items: is empty"),
        ({"items": ["x"] * 9}, "items: has 9 items, and this server takes 8"),
        ({"query": "", "items": [""]}, r"items\[0\]: query and item have no tokens"),
        ({"query": [600], "items": [[1]]}, r"query: token id 600 is outside the vocabulary of 600"),
        ({"query": [1], "items": [[2], [-1]]}, r"items\[1\]: token id -1 is outside"),
        ({"query": [1] * 90, "items": [[2], [2] * 11]}, r"items\[1\]: query and item 1 have 101 tokens.* takes 100 "),
        ({"label_token_ids": [600]}, "label_token_ids: 600 is outside the vocabulary"),
        ({"label_token_ids": [-1]}, "label_token_ids: -1 is outside the vocabulary"),
        ({"labels": [" yes"]}, "give either label_token_ids or labels"),
        ({"label_token_ids": None}, "give either label_token_ids or labels"),
        ({"label_token_ids": None, "labels": [""]}, "an empty text has no probability"),
        ({"query": [1], "items": [[2]], "apply_chat_template": True}, "needs the query and the items as texts"),
        (
            {
                "query": [1] * 98,
                "items": [[2]],
                "label_token_ids": None,
                "labels": ["the zebra crossing"],
                "label_scoring": "sequence",
            },
            "label of .* tokens does not fit after a prompt of 99",
        ),
    ],
)
def test_a_request_that_cannot_be_scored_is_rejected_with_its_field(
    tokenizer: PromptTokenizer, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        plan_of(tokenizer, **({"query": "the", "items": [" capital"], "label_token_ids": [3]} | fields))


@pytest.mark.parametrize(
    "body",
    [
        '{"query": "a"}',
        '{"query": "a", "items": ["b"], "label_token_ids": [3], "apply_sofmax": true}',
        '{"query": "a", "items": ["b"], "label_token_ids": [3], "timeout_s": 0}',
        '{"query": "a", "items": ["b"], "label_token_ids": [3], "timeout_s": NaN}',
        '{"query": "a", "items": ["b"], "label_token_ids": ["3"]}',
        '{"query": "a", "items": ["b"], "label_token_ids": []}',
        '{"query": "a", "items": ["b", [3]], "label_token_ids": [3]}',
        r'{"query": "\ud800", "items": ["b"], "label_token_ids": [3]}',
        "[]",
        "",
    ],
)
def test_a_body_that_is_not_a_score_request_is_invalid(body: str) -> None:
    with pytest.raises(ValidationError):
        ScoreRequest.model_validate_json(body)


@pytest.mark.parametrize("items", [[" capital", " of"], [" capital ", "x <|end|>", ""], ["", "the"]])
def test_a_chat_template_gives_each_item_the_tokens_of_its_own_message(
    tokenizer: PromptTokenizer, items: list[str]
) -> None:
    """Check with a template that trims messages, as many templates do."""
    backend = small_bpe(GPT2)
    for item_first in (False, True):
        plan = plan_of(
            tokenizer, query="the", items=items, label_token_ids=[3], apply_chat_template=True, item_first=item_first
        )
        for item, task in zip(items, plan.task_of_item, strict=True):
            content = item + "the" if item_first else "the" + item
            assert list(plan.tasks[task].prompt) == backend.encode(f"<user>{content.strip()}</user>\n").ids


def test_a_template_that_repeats_the_message_is_rendered_for_every_item(tokenizer: PromptTokenizer) -> None:
    request = ScoreRequest(query="the", items=[" of", " is"], label_token_ids=[3], apply_chat_template=True)
    plan = plan_scoring(request, tokenizer, 600, 100, 8, lambda content, kwargs: f"{content}|{content}")
    assert [list(task.prompt) for task in plan.tasks] == [
        tokenizer.encode("the of|the of", False),
        tokenizer.encode("the is|the is", False),
    ]


def planned(**fields: Any) -> tuple[ScoreRequest, Any]:
    request = ScoreRequest(query=[5], items=[[6], [7]], apply_softmax=True, **fields)
    tokenizer = PromptTokenizer(lambda text, _: [len(text) + 10])
    return request, plan_scoring(request, tokenizer, 100, 50, 10, lambda text, _: text)


def test_each_item_may_have_labels_of_its_own() -> None:
    request, plan = planned(label_token_ids=[[1, 2, 3], [4]])
    assert [task.labels for task in plan.tasks] == [((1,), (2,), (3,)), ((4,),)]
    body = score_response(request, plan, [[-1.0, -2.0, -3.0], [-9.0]], "m", [0, 0])
    assert [len(row) for row in body["scores"]] == [3, 1]
    _, texts = planned(labels=[["a", "bc"], ["def"]])
    assert [task.labels for task in texts.tasks] == [((11,), (12,)), ((13,),)]


def test_per_item_labels_of_texts_follow_each_items_own_text() -> None:
    request = ScoreRequest(query="the capital", items=[" of", " is"], labels=[[" France"], [" the", " of"]])
    tokenizer = wrapped(small_bpe(GPT2))
    plan = plan_scoring(request, tokenizer, 600, 50, 10, lambda text, _: text)
    for task, item, labels in zip(plan.tasks, (" of", " is"), ([" France"], [" the", " of"]), strict=True):
        for label, tokens in zip(labels, task.labels, strict=True):
            assert [*task.prompt, *tokens] == tokenizer.encode(f"the capital{item}{label}", True)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"label_token_ids": [[1], [2], [3]]}, "label_token_ids"),
        ({"labels": [["a"]]}, "labels"),
        ({"label_token_ids": [[1], []]}, "label_token_ids"),
        ({"label_token_ids": [[1], [500]]}, "label_token_ids"),
        ({"label_token_ids": [1], "temperature": 2.0, "calibrated": True}, "calibrated"),
    ],
)
def test_labels_and_options_that_do_not_fit_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        planned(**fields)
    assert caught.value.param == param


def test_a_temperature_without_a_softmax_is_refused_as_by_sglang() -> None:
    request = ScoreRequest(query=[5], items=[[6]], label_token_ids=[1], temperature=2.0)
    with pytest.raises(RequestError, match="apply_softmax"):
        plan_scoring(request, PromptTokenizer(lambda text, _: [1]), 100, 50, 10, lambda text, _: text)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_a_temperature_divides_the_log_probabilities(temperature: float) -> None:
    logprobs = [-0.5, -1.25, -4.0]
    weights = [math.exp(value / temperature) for value in logprobs]
    expected = [weight / sum(weights) for weight in weights]
    assert probabilities(logprobs, True, temperature) == pytest.approx(expected)
    request, plan = planned(label_token_ids=[1, 2, 3], temperature=temperature, return_token_logprobs=True)
    body = score_response(request, plan, [logprobs, logprobs], "m", [0, 0])
    assert body["scores"][0] == pytest.approx(expected)
    assert body["token_logprobs"] == [logprobs, logprobs]
    assert "logprobs" not in body


FIT = Fit(calibration_error=0.1, brier=0.2)
CALIBRATION = ScoreCalibration(
    workload="w",
    labels=["a", "bc"],
    method="logistic",
    logits=[-1.0, 1.0],
    calibrated_logits=[0.0, 1.0],
    outer_slope=0.5,
    num_items=100,
    num_groups=10,
    before=FIT,
    after=FIT,
)
"""The calibrated logit is half the logit plus a half."""


@pytest.mark.parametrize("labels", [{"labels": ["a", "bc"]}, {"label_token_ids": [11, 12]}])
@pytest.mark.parametrize("is_reversed", [False, True])
def test_calibrated_scores_are_mapped_by_label_in_the_order_of_the_request(
    labels: dict[str, list[Any]], is_reversed: bool
) -> None:
    ordered = {name: values[::-1] if is_reversed else values for name, values in labels.items()}
    request, plan = planned(**ordered, calibrated=True)
    calibrate = choose_calibration(request, {"w": CALIBRATION}, lambda label: [len(label) + 10])
    assert calibrate is not None
    logprobs = [math.log(0.2), math.log(0.8)]
    row = score_response(request, plan, [logprobs[::-1] if is_reversed else logprobs] * 2, "m", [0, 0], calibrate)
    expected = 1 / (1 + math.exp(-(0.5 * math.log(0.25) + 0.5)))
    assert row["scores"][0] == pytest.approx([1 - expected, expected] if is_reversed else [expected, 1 - expected])


def test_a_request_without_a_fitting_calibration_is_refused_with_those_that_exist() -> None:
    def encode(label: str) -> list[int]:
        return [len(label) + 10]

    request, _ = planned(labels=["a", "bc"])
    assert choose_calibration(request, {"w": CALIBRATION}, encode) is None
    request, _ = planned(labels=["a", "bc"], calibrated=True)
    both = {"w": CALIBRATION, "v": CALIBRATION}
    with pytest.raises(RequestError, match=r"name one of \['v', 'w'\]"):
        choose_calibration(request, both, encode)
    named, _ = planned(labels=["a", "bc"], calibrated="v")
    assert choose_calibration(named, both, encode) is not None
    for calibrated, known, text in (
        ("x", both, "none fits; it has w for"),
        (True, {}, "none fits; fit one with slimserve calibrate"),
    ):
        request, _ = planned(labels=["a", "bc"], calibrated=calibrated)
        with pytest.raises(RequestError, match=re.escape(text)):
            choose_calibration(request, known, encode)
    other, _ = planned(labels=["a", "wrong"], calibrated=True)
    with pytest.raises(RequestError, match="none fits"):
        choose_calibration(other, both, encode)
