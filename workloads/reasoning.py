"""Reasoning: a problem, a chain of thought between think tags, and an answer that a verifier checks.

Problems come from the procedural generators of `reasoning-gym`. Three of four are sums of two or three numbers of one
digit. After four worked examples SmolLM2-135M solves most sums of two numbers and few of three. Every fourth problem is
a word problem of `gsm_symbolic` with its worked derivation, which makes the model write a long chain; that model solves
almost none. Each prompt first shows worked examples of its kind from the calibration split, short and long in turn.

The generators seed problem i with `seed + i`, so the streams of nearby seeds overlap. Splits are therefore drawn from
one stream and divided by a hash of the question.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, cast

from slimserve.workloads import metrics
from slimserve.workloads.interface import (
    THINK_CLOSE,
    Answer,
    ChatAnswer,
    ChatPrompt,
    LaunchProfile,
    LoadOptions,
    MetricData,
    Prompt,
    SizeDistribution,
    Split,
    Workload,
    join_reply,
    split_of,
)


@dataclass(frozen=True)
class Kind:
    """One kind of problems."""

    settings: Mapping[str, int]
    """Settings of the data set in reasoning-gym."""
    num_examples: int
    """Number of worked examples in a prompt."""
    weight: int
    """Number of problems of this kind in each round through the kinds."""


KINDS = {
    "chain_sum": Kind({"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}, num_examples=4, weight=3),
    "gsm_symbolic": Kind({}, num_examples=2, weight=1),
}
"""Kinds of problems by the name of their data set in reasoning-gym."""
_MAX_REPEATS = 2000
"""Number of known problems in a row after which a generator counts as exhausted."""
_SHUFFLE_WINDOW = 256
"""Number of problems of a kind that are shuffled together."""
_STREAM_SEED = 20_000_000
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Reasoning(Workload):
    """Problems of all kinds in turn, to be answered within `max_tokens` tokens."""

    max_tokens: int = 160

    name: ClassVar[str] = "reasoning"
    primary_metric: ClassVar[str] = "accuracy"
    launch_profile: ClassVar[LaunchProfile] = "decode"
    preset_prompts: ClassVar[Mapping[str, int]] = {"quick": 64, "full": 256}

    def make_prompts(self, split: Split, num_prompts: int, seed: int = 0) -> list[Prompt]:
        """Return prompts of a split, the kinds in turn, in the order of `seed`; fewer if one kind runs out."""
        streams = {name: iter(self._prompts_of(name, split, num_prompts, seed)) for name in KINDS}
        turns = itertools.cycle([name for name, kind in KINDS.items() for _ in range(kind.weight)])
        prompts: list[Prompt] = []
        while len(prompts) < num_prompts and (prompt := next(streams[next(turns)], None)):
            prompts.append(prompt)
        return prompts

    def metric_data(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, MetricData]:
        """Return the accuracy over all problems and by kind, and the mean number of tokens per answer."""
        problems = cast("Sequence[ChatPrompt]", prompts)
        replies = cast("Sequence[ChatAnswer]", answers)
        correct = [self.is_correct(problem, reply.text) for problem, reply in zip(problems, replies, strict=True)]
        kinds = [problem.kind for problem in problems]
        return metrics.answer_metrics(correct, kinds, [reply.num_tokens for reply in replies])

    def is_correct(self, prompt: ChatPrompt, text: str) -> bool:
        """Tell whether reasoning-gym's verifier gives full marks to the last number after the think tags.

        Without a closing tag the last number of the text counts, so an unfinished chain is evaluated at its end.
        """
        numbers = _NUMBER.findall(text.rsplit(THINK_CLOSE, 1)[-1].replace(",", ""))
        return bool(numbers) and float(_dataset(prompt.kind).score_answer(numbers[-1], prompt.entry)) >= 1.0

    def load_prompts(self, options: LoadOptions, num_prompts: int) -> list[Prompt]:
        """Return problems of the load split with answer lengths drawn from `max_tokens`."""
        # The text seeds the draws, so a different text would change every recorded load test.
        numbers = random.Random(f"problems {options.prompt_seed}")
        sizes = SizeDistribution("--max-tokens", options.max_tokens)
        problems = cast("list[ChatPrompt]", self.make_prompts("load", num_prompts, options.prompt_seed))
        return [replace(problem, max_tokens=sizes.draw(numbers)) for problem in problems]

    def _prompts_of(self, kind: str, split: Split, num_prompts: int, seed: int) -> list[ChatPrompt]:
        examples = _examples(kind)
        shown = [message for example in examples for message in _worked(kind, example)]
        unseen = (entry for entry in _entries(kind, split) if entry not in examples)
        drawn: list[dict[str, Any]] = []
        # Windows of one size, so that asking for more prompts does not change the first ones.
        while len(drawn) < num_prompts and (window := list(itertools.islice(unseen, _SHUFFLE_WINDOW))):
            random.Random(f"{seed} {len(drawn)}").shuffle(window)
            drawn += window
        return [
            ChatPrompt(
                messages=(*shown, {"role": "user", "content": entry["question"]}),
                max_tokens=self.max_tokens,
                kind=kind,
                chain_of_thought=chain_of_thought(kind, entry),
                answer=entry["answer"],
                entry=entry,
            )
            for entry in drawn[:num_prompts]
        ]


@cache
def _examples(kind: str) -> tuple[dict[str, Any], ...]:
    """Return the first calibration problems of which no two neighbours have the same number of steps."""
    runs = itertools.groupby(_entries(kind, "calibration"), lambda entry: chain_of_thought(kind, entry).count("="))
    return tuple(next(run) for _, run in itertools.islice(runs, KINDS[kind].num_examples))


def _worked(kind: str, entry: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    solution = join_reply(chain_of_thought(kind, entry), str(entry["answer"]))
    return {"role": "user", "content": entry["question"]}, {"role": "assistant", "content": solution}


def chain_of_thought(kind: str, entry: dict[str, Any]) -> str:
    """Return the worked derivation of a reasoning-gym problem of one of `KINDS`."""
    if kind == "gsm_symbolic":
        return str(entry["metadata"]["answer_cot"])
    first, *rest = entry["metadata"]["expression"].split()
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total} {sign} {term} = {after}.")
        total = after
    return " ".join(steps)


@cache
def _dataset(kind: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(kind, size=1_000_000, seed=_STREAM_SEED, **KINDS[kind].settings)


def _entries(kind: str, split: Split) -> Iterator[dict[str, Any]]:
    """Yield the distinct problems of a split until the generator is exhausted; there are few small sums."""
    seen = set()
    repeats = 0
    for index in itertools.count():
        entry = _dataset(kind)[index]
        question = entry["question"]
        repeats = repeats + 1 if question in seen else 0
        if repeats == _MAX_REPEATS:
            return
        if question not in seen:
            seen.add(question)
            if split_of(question) == split:
                yield entry


WORKLOAD = Reasoning()
