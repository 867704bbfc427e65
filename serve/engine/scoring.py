"""Scoring: the probability of each label as the next token after query + item, for hundreds of items at once.

The request is SGLang's `POST /v1/score` with a few fields more. This file turns it into token lists and
the engine's log-probabilities into scores; it knows no engine (serve/engine/plugin.py does).

Prompt and item are tokenized as if they were one text, because a merge may cross the seam: "The capital is" +
"n't" is not the tokens of the one followed by those of the other. To tokenize a long history once and not once
an item, the joined text is cut where no tokenizer of this kind can merge: between an ASCII letter and a single
space that a letter follows ("…the | capital…"). Every byte-level BPE splits words there before it merges, and
ends no word anywhere else because of what follows. Left of the last such cut of the query and right of the first
such cut of what comes after the item the tokens are shared. A tokenizer of another kind, or a query
without such a place, is tokenized jointly, item by item.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
_SHOWN_CHARACTERS = 40
_NEAR_END_CHARACTERS = 200

TokenIds = Sequence[int]
Labels = tuple[tuple[int, ...], ...]
"""Each label's tokens; one token each but where sequences are scored."""


class ScoreRequest(BaseModel):
    """Body of `POST /v1/score`: SGLang's fields, then ours."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    query: str | list[int]
    """What all items have in common: text or token ids."""
    items: str | list[str] | list[list[int]]
    """What is scored: one text, texts, or lists of token ids."""
    label_token_ids: list[int] | None = Field(default=None, min_length=1)
    """Tokens whose probability after query + item is asked for."""
    apply_softmax: bool = False
    """True: the labels' probabilities sum to one. False: probabilities over the whole vocabulary."""
    item_first: bool = False
    """Item + query instead of query + item (nothing is shared at the front then)."""
    model: str | None = None
    labels: list[str] | None = Field(default=None, min_length=1)
    """Labels as texts in place of `label_token_ids`, each tokenized as the text that follows its prompt."""
    label_scoring: Literal["token", "sequence"] = "token"
    """`token` refuses a label of several tokens; `sequence` scores it as the product of its tokens' probabilities."""
    apply_chat_template: bool = False
    """Query + item (texts) become one user message, and the labels the start of the answer to it."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, such as {"enable_thinking": false}."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds its special tokens to texts; unset: as it does by itself, not with a template."""
    return_logprobs: bool = False
    """Answer with `logprobs` too: the labels' natural log-probabilities over the whole vocabulary."""
    timeout_s: StrictFloat | StrictInt | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds until this request is given up and answered 504."""
    cache_salt: str | None = Field(default=None, min_length=1)
    """Requests of different salts do not share cached prefixes."""
    priority: int = Field(default=0, ge=-(2**63), lt=2**63)
    """vLLM's priority, where its scheduler goes by one."""
    user: str | None = None
    """Who asks; the gateway's canary goes by it."""


class RequestError(Exception):
    """What is wrong with a request, for the one who sent it: answered as `status` with the name of the field."""

    def __init__(self, param: str, problem: str, status: int = 400) -> None:
        self.param = param
        self.problem = problem
        self.status = status
        super().__init__(f"{param}: {problem}")

    def of(self, name: str, other: str) -> RequestError:
        """The same error for a request in which the field `name` is called `other`."""
        return RequestError(self.param.replace(name, other), self.problem, self.status)


@dataclass(frozen=True)
class Texts:
    """The texts of a request's prompts, each `head + item + tail`."""

    head: str
    items: tuple[str, ...]
    tail: str
    add_special_tokens: bool

    def whole(self, index: int) -> str:
        return self.head + self.items[index] + self.tail


@dataclass(frozen=True)
class Job:
    """One distinct prompt and the labels to be scored after it."""

    prompt: tuple[int, ...]
    labels: Labels


@dataclass(frozen=True)
class Read:
    """One read of the engine: the log-probability of each of `next_tokens` after `prompt`."""

    prompt: list[int]
    next_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What the engine has to compute for one request."""

    jobs: tuple[Job, ...]
    """Distinct prompts in the order of their first item."""
    job_of_item: tuple[int, ...]
    num_prefix_tokens: int
    """Leading tokens that all jobs' prompts share, fewer than the shortest has; 0 where there is one job."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all items' prompts, duplicates and shared prefixes counted each time."""
        return sum(len(self.jobs[job].prompt) for job in self.job_of_item)


class PromptTokenizer:
    """Tokenizes joined texts, sharing the work of what they have in common.

    `encode(text, add_special_tokens)` is the tokenizer itself. `backend`, where there is one, is a
    `tokenizers.Tokenizer` that gives the same tokens; this object alone must use it.
    """

    def __init__(self, encode: Callable[[str, bool], list[int]], backend: Tokenizer | None = None) -> None:
        self._encode_one = encode
        self._backend = backend
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
        self.can_share = backend is not None and _cuts_are_safe(json.loads(backend.to_str()))
        """Whether joined texts may be cut; else each is tokenized whole."""
        around = _added_around(self.encode("a", True), self.encode("a", False))
        self.can_share = self.can_share and around is not None
        self._before, self._after = around or ([], [])

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Tokens of one text, as the model's tokenizer gives them."""
        if self._backend is None:
            return self._encode_one(text, add_special_tokens)
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """Tokens of each text, equal texts tokenized once."""
        distinct = list(dict.fromkeys(texts))
        if self._backend is None:
            encoded = [self._encode_one(text, add_special_tokens) for text in distinct]
        else:
            batch = self._backend.encode_batch_fast(distinct, add_special_tokens=add_special_tokens)
            encoded = [encoding.ids for encoding in batch]
        by_text = dict(zip(distinct, encoded, strict=True))
        return [by_text[text] for text in texts]

    def prompts(self, texts: Texts) -> list[list[int]]:
        """Tokens of `head + item + tail` for each item, equal to tokenizing each joined text."""
        left = self._last_cut(texts.head)
        tail_cut = _CUT.search(texts.tail) if self.can_share else None
        if not left and tail_cut is None:
            return self.encode_all([texts.whole(index) for index in range(len(texts.items))], texts.add_special_tokens)
        right = tail_cut.start() if tail_cut else len(texts.tail)
        before = (self._before if texts.add_special_tokens else []) + self.encode(texts.head[:left], False)
        after = self.encode(texts.tail[right:], False) + (self._after if texts.add_special_tokens else [])
        middles = self.encode_all([texts.head[left:] + item + texts.tail[:right] for item in texts.items])
        return [before + middle + after for middle in middles]

    def continuations(self, texts: Sequence[str], labels: Sequence[str]) -> list[list[tuple[int, ...]]]:
        """Per text and label the tokens that follow those of `text` in `text + label`.

        Raises RequestError where a label merges with the text's last token, so that it has no tokens of its own.
        """
        endings = [text[self._last_cut(text) :] for text in texts]
        joined = [ending + label for ending in endings for label in ("", *labels)]
        tokens_of = dict(zip(joined, self.encode_all(joined), strict=True))
        found = []
        for text, ending in zip(texts, endings, strict=True):
            plain = tokens_of[ending]
            for label in labels:
                tokens = tokens_of[ending + label]
                if tokens[: len(plain)] != plain or len(tokens) == len(plain):
                    raise RequestError(
                        "labels",
                        f"{label!r} is not a continuation of {text[-_SHOWN_CHARACTERS:]!r} in tokens: "
                        f"{plain[-4:]} become {tokens[max(len(plain) - 4, 0) :]} when it follows; move the space that "
                        "ends the prompt to the front of the label, or give label_token_ids",
                    )
            found.append([tuple(tokens_of[ending + label][len(plain) :]) for label in labels])
        return found

    def _last_cut(self, text: str) -> int:
        """The last place of `text` where it may be cut, whatever follows it; 0 where there is none."""
        if not self.can_share:
            return 0
        for start in (max(len(text) - _NEAR_END_CHARACTERS, 0), 0):
            if cuts := [match.start() for match in _CUT.finditer(text, start)]:
                return cuts[-1]
        return 0

    def first_tokens_end(self, text: str, num_tokens: int) -> int:
        """How many characters of `text` its first `num_tokens` tokens cover; the whole text where it has no more."""
        if self._backend is None:
            tokens = self._encode_one(text, False)
            return len(text) if len(tokens) <= num_tokens else len(text) * num_tokens // len(tokens)
        offsets = self._backend.encode(text, add_special_tokens=False).offsets
        return len(text) if len(offsets) <= num_tokens else int(offsets[num_tokens][0])


def make_plan(
    request: ScoreRequest,
    tokenizer: PromptTokenizer,
    vocabulary: int,
    max_prompt_tokens: int,
    max_items: int,
    render: Callable[[str, dict[str, Any]], str],
) -> Plan:
    """Turn a request into jobs for the engine; RequestError says what cannot be scored and why.

    `render(content, kwargs)` is the chat template around one user message.
    """
    items = [request.items] if isinstance(request.items, str) else request.items
    if not items:
        raise RequestError("items", "is empty; give at least one item")
    if len(items) > max_items:
        raise RequestError("items", f"has {len(items)} items, and this server takes {max_items} in one request")
    if (request.labels is None) == (request.label_token_ids is None):
        raise RequestError("label_token_ids", "give either label_token_ids or labels (texts)")
    texts = _texts(request, items, render)
    prompts = tokenizer.prompts(texts) if texts else _joined_ids(request, items, tokenizer)
    _check_prompts(request, prompts, items, vocabulary, max_prompt_tokens)
    labels_of = _labels_by_prompt(request, tokenizer, texts, vocabulary)
    jobs: dict[tuple[TokenIds, Labels], int] = {}
    job_of_item = []
    for index, prompt in enumerate(prompts):
        key = tuple(prompt), labels_of(index)
        job_of_item.append(jobs.setdefault(key, len(jobs)))
    distinct = tuple(Job(tuple(prompt), labels) for prompt, labels in jobs)
    for job in distinct:
        longest = max(len(label) for label in job.labels) - 1
        if len(job.prompt) + longest > max_prompt_tokens:
            raise RequestError(
                "labels",
                f"a label of {longest + 1} tokens does not fit after a prompt of {len(job.prompt)}; "
                f"both together must not have more than {max_prompt_tokens + 1}",
            )
    return Plan(distinct, tuple(job_of_item), common_prefix([job.prompt for job in distinct]))


def common_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many leading tokens all prompts share, less than the shortest has; 0 for a single prompt.

    A prompt's last token is always computed, as its logits are what is asked for.
    """
    if len(prompts) < 2:
        return 0
    # All prompts share what the first and the last in order do.
    low, high = min(prompts), max(prompts)
    shared = next((place for place, (one, other) in enumerate(zip(low, high, strict=False)) if one != other), len(low))
    return min(shared, min(map(len, prompts)) - 1)


def reads(job: Job) -> list[Read]:
    """The engine reads that give all labels' probabilities: one for labels of one token, else one per label prefix."""
    next_tokens: dict[tuple[int, ...], dict[int, None]] = {}
    for label in job.labels:
        for position, token in enumerate(label):
            next_tokens.setdefault(label[:position], {})[token] = None
    return [Read([*job.prompt, *given], tuple(tokens)) for given, tokens in next_tokens.items()]


def label_logprobs(job: Job, answers: Sequence[dict[int, float]]) -> list[float]:
    """The labels' log-probabilities from the answers to `reads(job)`: each the sum of its tokens'."""
    given = list(dict.fromkeys(label[:position] for label in job.labels for position in range(len(label))))
    answer_after = dict(zip(given, answers, strict=True))
    return [
        math.fsum(answer_after[label[:position]][token] for position, token in enumerate(label)) for label in job.labels
    ]


def probabilities(logprobs: Sequence[float], apply_softmax: bool) -> list[float]:
    """SGLang's scores: exp(logprob) over the whole vocabulary, or the softmax over the labels alone."""
    if not apply_softmax:
        return [math.exp(logprob) for logprob in logprobs]
    highest = max(logprobs)
    if highest == -math.inf:
        return [1 / len(logprobs)] * len(logprobs)
    weights = [math.exp(logprob - highest) for logprob in logprobs]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def score_response(
    request: ScoreRequest, plan: Plan, logprobs: Sequence[Sequence[float]], model: str, cached_tokens: int
) -> dict[str, Any]:
    """SGLang's answer; `logprobs` holds one list per job, `cached_tokens` are prompt tokens that were not computed."""
    per_job = [probabilities(values, request.apply_softmax) for values in logprobs]
    body = {
        "scores": [per_job[job] for job in plan.job_of_item],
        "model": model,
        "usage": usage(plan, cached_tokens),
        "object": "scoring",
    }
    if request.return_logprobs:
        # JSON has no infinity; no float32 log-probability lies below this.
        finite = [[max(value, -1e30) for value in values] for values in logprobs]
        body["logprobs"] = [finite[job] for job in plan.job_of_item]
    return body


def usage(plan: Plan, cached_tokens: int) -> dict[str, Any]:
    """OpenAI's usage object; every item counts with its whole prompt."""
    return {
        "prompt_tokens": plan.num_prompt_tokens,
        "total_tokens": plan.num_prompt_tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def _texts(
    request: ScoreRequest, items: Sequence[str | list[int]], render: Callable[[str, dict[str, Any]], str]
) -> Texts | None:
    """The prompts as texts; None where token ids are given."""
    query, texts = request.query, tuple(item for item in items if isinstance(item, str))
    if not isinstance(query, str) or len(texts) < len(items):
        if request.apply_chat_template:
            raise RequestError("apply_chat_template", "needs the query and the items as texts, not as token ids")
        return None
    head, tail = ("", query) if request.item_first else (query, "")
    if not request.apply_chat_template:
        return Texts(head, texts, tail, request.add_special_tokens is not False)

    def message(item: str) -> str:
        return render(head + item + tail, request.chat_template_kwargs)

    return _in_template(texts, message, bool(request.add_special_tokens))


def _in_template(items: Sequence[str], message: Callable[[str], str], add_special_tokens: bool) -> Texts:
    """The rendered messages with what is the same before and after each item split off.

    Templates trim what a message says, and some look for tags in it: an item with a space at an end or a "<"
    is rendered by itself, the others are put where a mark was.
    """
    mark = secrets.token_hex(16)
    before, *between, after = message(mark).split(mark)
    if between:
        return Texts("", tuple(message(item) for item in items), "", add_special_tokens)
    plain = [bool(item) and item == item.strip() and "<" not in item for item in items]
    whole = [before + item + after if same else message(item) for item, same in zip(items, plain, strict=True)]
    framed = all(
        text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after) for text in whole
    )
    if not framed:
        return Texts("", tuple(whole), "", add_special_tokens)
    return Texts(before, tuple(text[len(before) : len(text) - len(after)] for text in whole), after, add_special_tokens)


def _joined_ids(request: ScoreRequest, items: Sequence[str | list[int]], tokenizer: PromptTokenizer) -> list[list[int]]:
    """Prompts where query or items are token ids: joined as ids, a text among them tokenized alone."""
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
    request: ScoreRequest, tokenizer: PromptTokenizer, texts: Texts | None, vocabulary: int
) -> Callable[[int], Labels]:
    """A function from an item's index to its labels' tokens, which may depend on the text that they follow."""
    if request.label_token_ids is not None:
        for token in request.label_token_ids:
            if not 0 <= token < vocabulary:
                raise RequestError(
                    "label_token_ids",
                    f"{token} is outside the vocabulary of {vocabulary} tokens",
                )
        ids: Labels = tuple((token,) for token in request.label_token_ids)
        return lambda _: ids
    assert request.labels is not None
    labels = request.labels
    if any(not label for label in labels):
        raise RequestError("labels", "an empty text has no probability")

    if texts is None:
        found = [[tuple(tokens) for tokens in tokenizer.encode_all(labels)]]
    else:
        found = tokenizer.continuations([texts.whole(index) for index in range(len(texts.items))], labels)
    if request.label_scoring == "token":
        for label, tokens in ((label, tokens) for row in found for label, tokens in zip(labels, row, strict=True)):
            if len(tokens) > 1:
                raise RequestError(
                    "labels",
                    f"{label!r} is {len(tokens)} tokens here, {list(tokens)}, and a next token is one; choose another "
                    'label, or ask for "label_scoring": "sequence"',
                )
    rows: list[Labels] = [tuple(row) for row in found]
    return lambda index: rows[index if texts else 0]


def _cuts_are_safe(config: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is byte-level BPE that splits words before it merges, and no added token spans a cut."""
    normalizer = config.get("normalizer") or {"type": "NFC"}
    splitter = config.get("pre_tokenizer") or {}
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    splits = [step for step in steps if step.get("type") in {"Split", "Digits"}]
    return (
        config["model"]["type"] == "BPE"
        and normalizer["type"] in {"NFC", "NFD", "NFKC", "NFKD"}
        and [step["type"] for step in steps if step not in splits] == ["ByteLevel"]
        and steps[-1]["type"] == "ByteLevel"
        and bool(steps[-1].get("use_regex") or any(_splits_words(step) for step in splits))
        and not steps[-1].get("add_prefix_space")
        and not any(" " in token["content"] or token["lstrip"] or token["rstrip"] for token in config["added_tokens"])
    )


def _splits_words(step: dict[str, Any]) -> bool:
    """Whether a Split step is one of the known regular expressions, of words that take their leading space along."""
    pattern = step.get("pattern", {}).get("Regex", "")
    return step.get("behavior") == "Isolated" and not step.get("invert") and r"\s+(?!\S)" in pattern


def _added_around(with_special: list[int], without: list[int]) -> tuple[list[int], list[int]] | None:
    """The special tokens that a tokenizer puts before and after a text; None where it does something else."""
    for start in range(len(with_special) - len(without) + 1):
        if with_special[start : start + len(without)] == without:
            return with_special[:start], with_special[start + len(without) :]
    return None
