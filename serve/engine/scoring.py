"""Scoring: the probability of each label as the next token after query + item, for hundreds of items at once.

The request is SGLang's `POST /v1/score` with a few more fields. This module turns a request into prompts for the
engine, and the engine's log-probabilities into scores. It does not use the engine itself (serve/engine/plugin.py).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimserve.core.score_calibration import ScoreCalibration
from slimserve.serve.engine.prompt_tokenizer import PromptTexts, PromptTokenizer
from slimserve.serve.engine.score_request import RequestError, ScoreRequest

TokenIds = Sequence[int]
Labels = tuple[tuple[int, ...], ...]
"""Tokens of each label; several per label only if sequences are scored."""


@dataclass(frozen=True)
class ScoringTask:
    """One distinct prompt and the labels to score after it."""

    prompt: tuple[int, ...]
    labels: Labels


@dataclass(frozen=True)
class LabelRead:
    """One request to the engine: the log-probability of each of `next_tokens` after `prompt`."""

    prompt: list[int]
    next_tokens: tuple[int, ...]


@dataclass(frozen=True)
class ScoringPlan:
    """The tasks of the engine for one score request."""

    tasks: tuple[ScoringTask, ...]
    """Distinct prompts in the order of their first item."""
    task_of_item: tuple[int, ...]
    """Index of the task that scores each item."""
    num_prefix_tokens: int
    """Number of leading tokens that all prompts share, fewer than the shortest has; 0 for a single task."""

    @property
    def num_prompt_tokens(self) -> int:
        """Number of tokens of all items' prompts; duplicates and shared prefixes count each time."""
        return sum(len(self.tasks[task].prompt) for task in self.task_of_item)


def plan_scoring(
    request: ScoreRequest,
    tokenizer: PromptTokenizer,
    vocabulary: int,
    max_prompt_tokens: int,
    max_items: int,
    render: Callable[[str, dict[str, Any]], str],
) -> ScoringPlan:
    """Turn a request into tasks for the engine; raises RequestError for what cannot be scored.

    `render(content, kwargs)` applies the chat template to one user message. `max_prompt_tokens` is the model's
    maximum length minus one. Texts stand for the items of the catalogue already (serve/engine/item_ids.py).
    """
    items = [request.items] if isinstance(request.items, str) else request.items or []
    if not items:
        raise RequestError("items", "is empty; give at least one item")
    if len(items) > max_items:
        raise RequestError("items", f"has {len(items)} items, and this server takes {max_items} in one request")
    if (request.labels is None) == (request.label_token_ids is None):
        raise RequestError("label_token_ids", "give either label_token_ids or labels (texts)")
    _check_options(request, len(items))
    texts = _texts(request, items, render)
    prompts = tokenizer.prompts(texts) if texts else _joined_ids(request, items, tokenizer)
    _check_prompts(request, prompts, items, vocabulary, max_prompt_tokens)
    labels_of = _labels_by_prompt(request, tokenizer, texts, vocabulary)
    tasks: dict[tuple[TokenIds, Labels], int] = {}
    task_of_item = []
    for index, prompt in enumerate(prompts):
        key = tuple(prompt), labels_of(index)
        task_of_item.append(tasks.setdefault(key, len(tasks)))
    distinct = tuple(ScoringTask(tuple(prompt), labels) for prompt, labels in tasks)
    for task in distinct:
        longest = max(len(label) for label in task.labels) - 1
        if len(task.prompt) + longest > max_prompt_tokens:
            raise RequestError(
                "labels",
                f"a label of {longest + 1} tokens does not fit after a prompt of {len(task.prompt)}; "
                f"both together must not have more than {max_prompt_tokens + 1}",
            )
    return ScoringPlan(distinct, tuple(task_of_item), common_prefix([task.prompt for task in distinct]))


def _check_options(request: ScoreRequest, num_items: int) -> None:
    """Raise RequestError for fields that do not go together."""
    for name, labels in (("label_token_ids", request.label_token_ids), ("labels", request.labels)):
        if labels is None or not isinstance(labels[0], list):
            continue
        if len(labels) != num_items:
            raise RequestError(name, f"has {len(labels)} lists for {num_items} items; give one list for each item")
        if not all(labels):
            raise RequestError(name, "has an empty list; each item needs a label")
    if request.temperature != 1 and not request.apply_softmax:
        raise RequestError("temperature", 'needs "apply_softmax": true')
    if request.calibrated and (not request.apply_softmax or request.temperature != 1):
        raise RequestError("calibrated", 'needs "apply_softmax": true and no temperature')


def common_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """Return the number of leading tokens that all prompts share; 0 for a single prompt.

    It is less than the length of the shortest prompt, because the logits of each last token must be computed.
    """
    if len(prompts) < 2:
        return 0
    # All prompts share the tokens that the first and the last in sorted order share.
    low, high = min(prompts), max(prompts)
    shared = next(
        (position for position, (one, other) in enumerate(zip(low, high, strict=False)) if one != other), len(low)
    )
    return min(shared, min(map(len, prompts)) - 1)


def label_reads(task: ScoringTask) -> list[LabelRead]:
    """Return the engine requests for all labels: one for labels of one token, otherwise one per label prefix."""
    next_tokens: dict[tuple[int, ...], dict[int, None]] = {}
    for label in task.labels:
        for position, token in enumerate(label):
            next_tokens.setdefault(label[:position], {})[token] = None
    return [LabelRead([*task.prompt, *given], tuple(tokens)) for given, tokens in next_tokens.items()]


def compares_labels(request: ScoreRequest, plan: ScoringPlan) -> bool:
    """Tell whether the answer needs the labels' probabilities relative to each other, and not over the vocabulary."""
    is_one_token = all(len(label) == 1 for task in plan.tasks for label in task.labels)
    return request.apply_softmax and is_one_token and not (request.return_logprobs or request.return_token_logprobs)


def label_logprobs(task: ScoringTask, answers: Sequence[dict[int, float]]) -> list[float]:
    """Return the log-probability of each label, the sum over its tokens, from the answers to `label_reads(task)`."""
    given = list(dict.fromkeys(label[:position] for label in task.labels for position in range(len(label))))
    answer_after = dict(zip(given, answers, strict=True))
    return [
        math.fsum(answer_after[label[:position]][token] for position, token in enumerate(label))
        for label in task.labels
    ]


def probabilities(logprobs: Sequence[float], apply_softmax: bool, temperature: float = 1.0) -> list[float]:
    """Return SGLang's scores: exp(logprob) over the full vocabulary, or the softmax over the labels alone.

    The softmax divides the log-probabilities by `temperature` first.
    """
    if not apply_softmax:
        return [math.exp(logprob) for logprob in logprobs]
    highest = max(logprobs)
    if highest == -math.inf:
        return [1 / len(logprobs)] * len(logprobs)
    weights = [math.exp((logprob - highest) / temperature) for logprob in logprobs]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def score_response(
    request: ScoreRequest,
    plan: ScoringPlan,
    logprobs: Sequence[Sequence[float]],
    model: str,
    cached_tokens: Sequence[int],
    calibrate: Callable[[Sequence[float]], list[float]] | None = None,
) -> dict[str, Any]:
    """Return SGLang's answer; `logprobs` has one list per task, and `cached_tokens` one number, as `usage` says.

    `calibrate` maps the labels' probabilities of one item, in the order of the request's labels.
    """
    per_task = [probabilities(values, request.apply_softmax, request.temperature) for values in logprobs]
    if calibrate is not None:
        per_task = [calibrate(shares) for shares in per_task]
    body = {
        "scores": [per_task[task] for task in plan.task_of_item],
        "model": model,
        "usage": usage(plan, cached_tokens),
        "object": "scoring",
    }
    for key, is_wanted in (("logprobs", request.return_logprobs), ("token_logprobs", request.return_token_logprobs)):
        if is_wanted:
            # JSON has no infinity. No float32 log-probability is below this value.
            finite = [[max(value, -1e30) for value in values] for values in logprobs]
            body[key] = [finite[task] for task in plan.task_of_item]
    return body


def choose_calibration(
    request: ScoreRequest,
    calibrations: Mapping[str, ScoreCalibration],
    encode: Callable[[str], list[int]],
) -> Callable[[Sequence[float]], list[float]] | None:
    """Return the map of one item's probabilities that a request asks for; None if it asks for none.

    `encode` gives the tokens of a label's text, for requests with token ids. Raises RequestError if the variant has no
    calibration for these labels, or several.
    """
    if not request.calibrated:
        return None
    rows: Sequence[Any] = request.labels or request.label_token_ids or ()
    distinct = {tuple(row) for row in rows} if rows and isinstance(rows[0], list) else {tuple(rows)}
    if len(distinct) != 1:
        raise RequestError("calibrated", "needs the same labels for all items")
    labels = distinct.pop()
    fitting = {}
    for name, calibration in calibrations.items():
        known = [label if request.labels else tuple(encode(label)) for label in calibration.labels]
        wanted = [label if request.labels else (label,) for label in labels]
        if sorted(map(str, known)) == sorted(map(str, wanted)) and request.calibrated in {True, name}:
            fitting[name] = calibration, [known.index(label) for label in wanted]
    if len(fitting) != 1:
        kept = "; ".join(f"{name} for {list(one.labels)}" for name, one in calibrations.items())
        remedy = f"it has {kept}" if kept else "fit one with slimserve calibrate"
        problem = f"several fit these labels; name one of {sorted(fitting)}" if fitting else f"none fits; {remedy}"
        raise RequestError("calibrated", f"the variant's calibrations: {problem}")
    calibration, order = next(iter(fitting.values()))

    def calibrate(shares: Sequence[float]) -> list[float]:
        mapped = calibration.apply([shares[order.index(place)] for place in range(len(order))])
        return [mapped[place] for place in order]

    return calibrate


def num_cached_prompt_tokens(task: ScoringTask, num_cached: Sequence[int]) -> int:
    """Return the number of tokens of a task's prompt that none of its engine requests computed.

    `num_cached` has the number of leading tokens that the engine took from its cache, for each of `label_reads(task)`.
    Later label prefixes find the prompt in the cache because the first one has just computed it, so the least counts.
    """
    return min(len(task.prompt), *num_cached)


def usage(plan: ScoringPlan, cached_tokens: Sequence[int]) -> dict[str, Any]:
    """Return OpenAI's usage object; each item counts with its full prompt.

    `cached_tokens` has for each task the number of its prompt's tokens that were not computed. An item that repeats an
    earlier one is not computed at all, so all tokens of its prompt count as cached.
    """
    num_computed = sum(len(task.prompt) - cached for task, cached in zip(plan.tasks, cached_tokens, strict=True))
    return {
        "prompt_tokens": plan.num_prompt_tokens,
        "total_tokens": plan.num_prompt_tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": plan.num_prompt_tokens - num_computed},
    }


def _texts(
    request: ScoreRequest, items: Sequence[str | list[int]], render: Callable[[str, dict[str, Any]], str]
) -> PromptTexts | None:
    """Return the prompts as texts; None if the query or an item is a list of token ids."""
    query, texts = request.query, tuple(item for item in items if isinstance(item, str))
    if not isinstance(query, str) or len(texts) < len(items):
        if request.apply_chat_template:
            raise RequestError("apply_chat_template", "needs the query and the items as texts, not as token ids")
        return None
    head, tail = ("", query) if request.item_first else (query, "")
    if not request.apply_chat_template:
        return PromptTexts(head, texts, tail, request.add_special_tokens is not False)

    def message(item: str) -> str:
        return render(head + item + tail, request.chat_template_kwargs)

    return _in_template(texts, message, bool(request.add_special_tokens))


def _in_template(items: Sequence[str], message: Callable[[str], str], add_special_tokens: bool) -> PromptTexts:
    """Return the rendered messages with the common text before and after the items split off.

    Templates trim a message, and some search it for tags. An item with a space at an end or a "<" is therefore
    rendered alone; the other items replace a mark in a single rendered message.
    """
    mark = secrets.token_hex(16)
    before, *between, after = message(mark).split(mark)
    if between:
        return PromptTexts("", tuple(message(item) for item in items), "", add_special_tokens)
    plain = [bool(item) and item == item.strip() and "<" not in item for item in items]
    full = [before + item + after if same else message(item) for item, same in zip(items, plain, strict=True)]
    framed = all(
        text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after) for text in full
    )
    if not framed:
        return PromptTexts("", tuple(full), "", add_special_tokens)
    return PromptTexts(
        before, tuple(text[len(before) : len(text) - len(after)] for text in full), after, add_special_tokens
    )


def _joined_ids(request: ScoreRequest, items: Sequence[str | list[int]], tokenizer: PromptTokenizer) -> list[list[int]]:
    """Return the prompts of a request with token ids; a text among them is tokenized alone."""
    special = request.add_special_tokens is not False
    query = request.query if isinstance(request.query, list) else tokenizer.encode(request.query, special)
    parts = [item if isinstance(item, list) else tokenizer.encode(item, False) for item in items]
    return [part + query if request.item_first else query + part for part in parts]


def _check_prompts(
    request: ScoreRequest,
    prompts: Sequence[TokenIds],
    items: Sequence[str | list[int]],
    vocabulary: int,
    max_prompt_tokens: int,
) -> None:
    given = [("query", request.query)] + [(f"items[{index}]", item) for index, item in enumerate(items)]
    for name, ids in given:
        if isinstance(ids, list) and ids and not (min(ids) >= 0 and max(ids) < vocabulary):
            outside = next(token for token in ids if not 0 <= token < vocabulary)
            raise RequestError(name, f"token id {outside} is outside the vocabulary of {vocabulary} tokens")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise RequestError(f"items[{index}]", "query and item have no tokens")
        if len(prompt) > max_prompt_tokens:
            long = sum(len(prompt) > max_prompt_tokens for prompt in prompts)
            raise RequestError(
                f"items[{index}]",
                f"query and item {index} have {len(prompt)} tokens together, and the model takes {max_prompt_tokens} "
                f"before the label ({long} of {len(prompts)} items are too long); nothing is cut, so shorten them",
            )


def _labels_by_prompt(
    request: ScoreRequest, tokenizer: PromptTokenizer, texts: PromptTexts | None, vocabulary: int
) -> Callable[[int], Labels]:
    """Return a function from an item's index to its labels' tokens, which may depend on the text before them."""
    count = len(texts.items) if texts else 1
    if request.label_token_ids is not None:
        rows_of_ids = _per_item(request.label_token_ids)
        for token in (token for row in rows_of_ids for token in row):
            if not 0 <= token < vocabulary:
                raise RequestError(
                    "label_token_ids",
                    f"{token} is outside the vocabulary of {vocabulary} tokens",
                )
        ids: list[Labels] = [tuple((token,) for token in row) for row in rows_of_ids]
        return lambda index: ids[index if len(ids) > 1 else 0]
    assert request.labels is not None
    rows_of_labels: list[list[str]] = _per_item(request.labels)
    if any(not label for row in rows_of_labels for label in row):
        raise RequestError("labels", "an empty text has no probability; remove it")
    is_per_item = isinstance(request.labels[0], list)
    if texts is None:
        tokens_of_labels = [[tuple(tokens) for tokens in tokenizer.encode_all(row)] for row in rows_of_labels]
    elif is_per_item:
        tokens_of_labels = [
            tokenizer.continuations([texts.prompt(index)], row)[0] for index, row in enumerate(rows_of_labels)
        ]
    else:
        tokens_of_labels = tokenizer.continuations([texts.prompt(index) for index in range(count)], rows_of_labels[0])
    if request.label_scoring == "token":
        for number, row in enumerate(tokens_of_labels):
            for label, tokens in zip(rows_of_labels[number if is_per_item else 0], row, strict=True):
                if len(tokens) > 1:
                    raise RequestError(
                        "labels",
                        f"{label!r} is {len(tokens)} tokens here, {list(tokens)}, but a label must be one token; "
                        'choose another label, or set "label_scoring": "sequence"',
                    )
    rows: list[Labels] = [tuple(row) for row in tokens_of_labels]
    return lambda index: rows[index if len(rows) > 1 else 0]


def _per_item(labels: list[Any]) -> list[Any]:
    """Return one list of labels for each item, or a single one that all items share."""
    return labels if isinstance(labels[0], list) else [labels]
