"""Quality through the served endpoint, so that the deployed system is what is evaluated.

The raw answers are kept, one JSON line per prompt. Metrics, intervals and paired tests are computed from them, now and
when a later run compares itself with this one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import TypeAdapter

from slimserve.compare.results import TEXT
from slimserve.core.errors import UserError
from slimserve.core.messages import read_answer
from slimserve.core.openai_client import CONCURRENCY, OpenAIClient, Target, ask_all, count_of
from slimserve.core.progress import print_status, progress
from slimserve.core.score_calibration import ScoreCalibration
from slimserve.core.storage import write_atomically
from slimserve.core.text import read_jsonl
from slimserve.loadtest.choices import CHOICE_PATH, choice_body, choice_logprobs
from slimserve.loadtest.client import SCORING
from slimserve.workloads import load_workload
from slimserve.workloads.interface import (
    Answer,
    ChatAnswer,
    ChatPrompt,
    ChoicePrompt,
    HarnessPrompt,
    MetricData,
    Prompt,
    SampleMetrics,
    ScoringPrompt,
    TextPrompt,
    TextReading,
    hash_number,
)
from slimserve.workloads.item_tokens import item_tokens_of
from slimserve.workloads.text import make_documents, text_metrics

if TYPE_CHECKING:
    from slimserve.workloads.kinds.lm_eval import LmEval

_CHAT_PATH = "/v1/chat/completions"
_NUM_LOGPROBS = 20
"""Log-probabilities per position; vLLM gives at most 20 by default."""
_CHARACTERS_PER_TOKEN = 6
"""More than any tokenizer needs for these texts; the excess is cut off by tokens."""
_STOCK_SCORING = "generative_scoring"

KeptAnswer = tuple[float, ...] | ChatAnswer | TextReading | SampleMetrics
"""Scores of a candidate list, a chat answer, log-probabilities of a text, or the values that lm-eval computed."""


@dataclass(frozen=True)
class Answers:
    """One model's answers to a workload's quality prompts, in the order of the prompts."""

    prompts_sha256: str
    """Hash of all planned prompts; answers to different prompts cannot be paired."""
    answers: list[KeptAnswer]
    """Answers to the first prompts; fewer than planned if the quality was decided early."""

    def first(self, count: int) -> Answers:
        """Return the answers to the first `count` prompts."""
        return Answers(self.prompts_sha256, self.answers[:count])


def ask_quality(
    target: Target,
    workload: str,
    num_prompts: int,
    seed: int,
    known: Answers | None = None,
    until: int | None = None,
    chat_concurrency: int = CONCURRENCY,
) -> Answers:
    """Ask the served model the first `until` of the workload's quality prompts, by default all `num_prompts`.

    Prompts that `known` answers are not asked again. At most `chat_concurrency` chats are in flight. Raises UserError
    for the first request that fails: a metric over some of the prompts would not be comparable.
    """
    prompts = _prompts(workload, num_prompts, seed)
    sha256 = _sha256_of([asdict(prompt) for prompt in prompts])
    done = known.answers if known and known.prompts_sha256 == sha256 else []
    title, left = f"quality {workload}, {target.model}", prompts[len(done) : until]
    if left and isinstance(left[0], HarnessPrompt):
        task = cast("LmEval", load_workload(workload))
        with progress(f"{title}, by lm-eval", None, "documents"):
            return Answers(sha256, [*done, *task.ask(target, cast("list[HarnessPrompt]", left))])
    concurrency = chat_concurrency if left and isinstance(left[0], ChatPrompt) else CONCURRENCY
    return Answers(sha256, [*done, *ask_prompts(target, title, left, concurrency)])


def ask_prompts(
    target: Target, title: str, prompts: Sequence[Prompt], concurrency: int = CONCURRENCY
) -> list[KeptAnswer]:
    """Return the served model's scores or greedy answers in the order of the prompts; UserError if one fails.

    At most `concurrency` requests are in flight. If the directory of the target is known and has a catalogue, its items
    are sent as item tokens.
    """
    scorer = _Scorer()
    as_read = item_tokens_of(Path(target.tokenizer) if target.tokenizer else None)

    async def ask(client: OpenAIClient, prompt: Prompt) -> KeptAnswer:
        if isinstance(prompt, ScoringPrompt):
            return await scorer.score(client, prompt)
        if isinstance(prompt, ChoicePrompt):
            return await scorer.choose(client, prompt)
        if isinstance(prompt, TextPrompt):
            return await _read_text(client, prompt.text, prompt.num_tokens)
        assert isinstance(prompt, ChatPrompt)
        return await _chat(client, prompt)

    try:
        return ask_all(target, title, list(map(as_read, prompts)), ask, concurrency=concurrency)
    except _UnsupportedError as error:
        problem = f"gives no log-probabilities of prompts ({error})"
        raise UserError("server", target.url, problem, "use vLLM or another server with `prompt_logprobs`") from error


def ask_text(target: Target, num_documents: int, num_tokens: int, seed: int) -> Answers:
    """Return log-probabilities of held-out documents of `num_tokens` tokens; no answers if the server gives none.

    The server must count tokens (`/tokenize`) and support `prompt_logprobs`, as vLLM does.
    """
    documents = _documents(num_documents, num_tokens * _CHARACTERS_PER_TOKEN, seed)

    async def ask(client: OpenAIClient, document: str) -> TextReading:
        return await _read_text(client, document, num_tokens)

    try:
        answers = ask_all(target, f"quality {TEXT}, {target.model}", documents, ask)
    except _UnsupportedError as error:
        print_status(f"{target.model}: skips perplexity and KL, as the server gives no prompt logprobs ({error})")
        return Answers("", [])
    return Answers(_sha256_of([answer.tokens for answer in answers]), list(answers))


def write_answers(file: Path, answers: Answers) -> None:
    """Write a line with the hash of the prompts, then one line per prompt."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompts_sha256": answers.prompts_sha256})]
    for number, answer in enumerate(answers.answers):
        values = {"scores": answer} if isinstance(answer, tuple) else asdict(answer)
        lines.append(json.dumps({"prompt": number, **values}))
    write_atomically(file, "\n".join(lines) + "\n")


def read_answers(file: Path) -> Answers:
    """Read the file of write_answers; UserError if it is not one."""
    remedy = "measure again in another folder"
    try:
        head, *lines = (row for _, row in read_jsonl(file, "answers", remedy))
        return Answers(head["prompts_sha256"], [_parse_answer(line) for line in lines])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("answers", file, f"does not hold answers ({error})", remedy) from error


def quality_metrics(
    workload: str, num_prompts: int, seed: int, answers: Answers, reference: Answers | None = None
) -> dict[str, MetricData]:
    """Return a workload's quality metrics by name.

    For TEXT, KL divergence and agreement need the reference's answers to the same text.
    """
    if workload == TEXT:
        is_paired = reference is not None and reference.prompts_sha256 == answers.prompts_sha256
        theirs = cast("list[TextReading]", reference.answers) if reference and is_paired else None
        return text_metrics(cast("list[TextReading]", answers.answers), theirs)
    prompts, task = _prompts(workload, num_prompts, seed)[: len(answers.answers)], load_workload(workload)
    ours = cast("list[Answer]", answers.answers)
    if reference is not None and reference.prompts_sha256 == answers.prompts_sha256:
        return task.reference_metrics(prompts, ours, cast("list[Answer]", reference.first(len(ours)).answers))
    return task.metric_data(prompts, ours)


def calibrated_metrics(
    workload: str, num_prompts: int, seed: int, answers: Answers, calibration: ScoreCalibration
) -> dict[str, MetricData]:
    """Return the metrics of probabilities after a calibration: `calibration_error_calibrated`, `brier_calibrated`."""
    if calibration.method == "temperature":  # these answers are log-probabilities
        mapped: list[Any] = [tuple(value / calibration.temperature for value in one) for one in _rows(answers)]
    else:
        mapped = [tuple(calibration.apply_map(one).tolist()) for one in _rows(answers)]
    data = quality_metrics(workload, num_prompts, seed, Answers(answers.prompts_sha256, mapped))
    return {f"{name}_calibrated": data[name] for name in ("calibration_error", "brier") if name in data}


def _rows(answers: Answers) -> list[tuple[float, ...]]:
    return cast("list[tuple[float, ...]]", answers.answers)


def baseline_metrics(workload: str, num_prompts: int, seed: int) -> dict[str, dict[str, MetricData]]:
    """Return the quality metrics of each baseline of a workload that uses no language model, by its name."""
    prompts, task = _prompts(workload, num_prompts, seed), load_workload(workload)
    return {name: task.metric_data(prompts, answers) for name, answers in task.baselines(prompts).items()}


def count_prompts(workload: str, num_prompts: int, seed: int) -> int:
    """Return the number of quality prompts that a workload has, at most `num_prompts`."""
    return len(_prompts(workload, num_prompts, seed))


@cache
def _prompts(workload: str, num_prompts: int, seed: int) -> list[Prompt]:
    """Cached, because every variant gets the same prompts and making them takes a second."""
    return load_workload(workload).make_prompts("quality", num_prompts, seed)


_documents = cache(make_documents)


def _parse_answer(line: dict[str, Any]) -> KeptAnswer:
    if "scores" in line:
        return tuple(line["scores"])
    line.pop("prompt")
    kind: Any = TextReading if "top" in line else SampleMetrics if "values" in line else ChatAnswer
    return cast("KeptAnswer", TypeAdapter(kind).validate_python(line))


def _sha256_of(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()


class _UnsupportedError(Exception):
    """The server lacks an endpoint or an option."""


async def _chat(client: OpenAIClient, prompt: ChatPrompt) -> ChatAnswer:
    sampling = prompt.sampling
    body: dict[str, Any] = {
        "messages": prompt.messages,
        "max_tokens": prompt.max_tokens,
        "temperature": sampling.temperature,
        **prompt.request,
    }
    if sampling.num_samples > 1:
        body["n"] = sampling.num_samples
    if sampling.temperature > 0:
        body["seed"] = hash_number(prompt.question) % 2**31
    answer = await client.post(_CHAT_PATH, body)
    texts = [message.text for message, _ in read_answer(answer, _CHAT_PATH)]
    num_tokens = count_of(answer.get("usage"), "completion_tokens")
    # NaN is left out of means, where the server does not count.
    return ChatAnswer(texts[0], math.nan if num_tokens is None else num_tokens / len(texts), tuple(texts[1:]))


async def _read_text(client: OpenAIClient, document: str, num_tokens: int) -> TextReading:
    """Return the log-probabilities of a document's tokens; _UnsupportedError if the server cannot give them."""
    tokens = (await client.try_post("/tokenize", {"prompt": document, "add_special_tokens": False})).get("tokens")
    if not isinstance(tokens, list) or not tokens:
        raise _UnsupportedError("no /tokenize")
    tokens = tokens[:num_tokens]
    body = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": _NUM_LOGPROBS}
    answer = await client.try_post("/v1/completions", body)
    with _of_foreign_server():
        positions = _prompt_logprobs(answer)[1:]
        if not positions:
            raise _UnsupportedError("no prompt_logprobs")
        tops = [{int(token): round(float(entry["logprob"]), 5) for token, entry in one.items()} for one in positions]
        logprobs = tuple(top[token] for top, token in zip(tops, tokens[1:], strict=True))
        return TextReading(tuple(tokens), logprobs, tuple(tops))


@contextmanager
def _of_foreign_server() -> Iterator[None]:
    """Report values of an answer that are missing or of another type as something that the server lacks."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _UnsupportedError(f"its answer is of another form, {type(error).__name__}: {error}") from error


def _prompt_logprobs(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the log-probabilities of the first choice by position; empty if the server gives none."""
    return ((answer.get("choices") or [{}])[0].get("prompt_logprobs")) or []


class _Scorer:
    """Scores candidate lists; finds once which scoring endpoint the server has, and the token of each label."""

    def __init__(self) -> None:
        self._token_ids: dict[str, int] = {}
        self._scoring = ""
        self._lock = asyncio.Lock()

    async def score(self, client: OpenAIClient, prompt: ScoringPrompt) -> tuple[float, ...]:
        async with self._lock:
            self._scoring = self._scoring or await self._find_scoring(client, prompt)
        is_stock = self._scoring == _STOCK_SCORING
        labels = [await self._token_id(client, label) for label in prompt.labels] if is_stock else []
        scoring = SCORING[self._scoring]
        scores = await client.ask(
            scoring.path,
            scoring.body(prompt, labels),
            lambda answer: tuple(float(score) for score in scoring.scores(answer, prompt.labels)),
        )
        if len(scores) != len(prompt.items) or not all(map(math.isfinite, scores)):
            problem = f"returned {len(scores)} scores for {len(prompt.items)} items, or scores that are not numbers"
            raise UserError("quality request", scoring.path, problem, "read the server's log")
        return scores

    async def choose(self, client: OpenAIClient, prompt: ChoicePrompt) -> tuple[float, ...]:
        """Return the log-probability of each choice after the query, in nats."""
        body = choice_body(prompt)
        answer = await client.try_post(CHOICE_PATH, body)
        try:
            values = choice_logprobs(answer)
        except (LookupError, TypeError, ValueError):
            values = [await self._continuation_logprob(client, prompt.query, text) for text in prompt.choices]
        if len(values) != len(prompt.choices) or not all(map(math.isfinite, values)):
            problem = f"returned {len(values)} log-probabilities for {len(prompt.choices)} choices, or no numbers"
            raise UserError("quality request", CHOICE_PATH, problem, "read the server's log")
        return tuple(values)

    async def _continuation_logprob(self, client: OpenAIClient, query: str, text: str) -> float:
        """Return the log-probability of a text after a query from the log-probabilities of a prompt's tokens."""
        parts = [
            (await client.try_post("/tokenize", {"prompt": whole})).get("tokens") or []
            for whole in (query, query + text)
        ]
        body = {"prompt": parts[1], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        answer = await client.try_post("/v1/completions", body)
        with _of_foreign_server():
            common = next(
                (at for at, pair in enumerate(zip(*parts, strict=False)) if pair[0] != pair[1]), len(parts[0])
            )
            positions = _prompt_logprobs(answer)
            if not parts[1] or len(positions) != len(parts[1]):
                raise _UnsupportedError("neither /v1/score nor /tokenize with prompt_logprobs")
            read = zip(parts[1][common:], positions[common:], strict=True)
            return math.fsum(float(position[str(token)]["logprob"]) for token, position in read)

    async def _find_scoring(self, client: OpenAIClient, prompt: ScoringPrompt) -> str:
        """Choose our /v1/score, else vLLM's own endpoint, else the log-probabilities of completions."""
        probe = ScoringPrompt(prompt.query, prompt.items[:1], prompt.labels, prompt.truth[:1], prompt.group)
        if "scores" in await client.try_post("/v1/score", SCORING["score"].body(probe, [])):
            return "score"
        stock = SCORING[_STOCK_SCORING]
        try:
            labels = [await self._token_id(client, label) for label in prompt.labels]
        except UserError as error:
            if error.field == "label":
                raise
            labels = []
        if labels and "data" in await client.try_post(stock.path, stock.body(probe, labels)):
            return _STOCK_SCORING
        return "completions"

    async def _token_id(self, client: OpenAIClient, label: str) -> int:
        if label not in self._token_ids:
            body = {"prompt": label, "add_special_tokens": False}
            tokens = await client.ask("/tokenize", body, lambda answer: list(answer["tokens"]))
            if len(tokens) != 1:
                problem = f"is {len(tokens)} tokens of {client.target.model}"
                raise UserError("label", label, problem, "choose labels of one token each")
            self._token_ids[label] = tokens[0]
        return self._token_ids[label]
