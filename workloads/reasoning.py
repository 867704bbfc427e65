"""Reasoning: a problem, a chain of thought between think tags, an answer that a verifier checks.

Problems come from the procedural generators of `reasoning-gym`; half are sums of two or
three digits, which a model of 0.1B parameters sometimes gets right, half are the word
problems of `gsm_symbolic` with their worked derivations, which make it write long chains.
Each prompt shows two worked examples of its kind, of different length, from the calibration
split, then asks.

The generators seed problem i with `seed + i`, so streams of near seeds overlap; splits
are therefore drawn from one stream and divided by a hash of the question.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from slimserve.workloads import metrics
from slimserve.workloads.interface import Answer, ChatAnswer, ChatPrompt, Estimate, Prompt, Split, split_of

KINDS: dict[str, dict[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "gsm_symbolic": {},
}
"""reasoning-gym data sets and their settings."""
_MOST_REPEATS = 2000
"""So many known problems in a row end a generator."""
_NUM_EXAMPLES = 2
_LOT = 256
"""Problems of a kind that are shuffled together."""
_STREAM_SEED = 20_000_000
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Reasoning:
    """Problems of all kinds in turn, answered within `max_tokens` tokens."""

    max_tokens: int = 160
    name: str = "reasoning"
    primary_metric: str = "accuracy"

    def make_prompts(self, split: Split, num_prompts: int, seed: int = 0) -> list[Prompt]:
        """Prompts of a split, the kinds taking turns, in the order of `seed`; fewer where one kind runs out."""
        streams = [self._prompts_of(kind, split, num_prompts, seed) for kind in KINDS]
        return list(itertools.islice(itertools.chain.from_iterable(zip(*streams, strict=False)), num_prompts))

    def evaluate(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, Estimate]:
        """Accuracy over all and by kind (Wilson intervals), and tokens per answer (bootstrap)."""
        problems = cast("Sequence[ChatPrompt]", prompts)
        given = cast("Sequence[ChatAnswer]", answers)
        right = [is_right(problem, answer.text) for problem, answer in zip(problems, given, strict=True)]
        kinds = [problem.kind for problem in problems]
        figures = metrics.answer_metrics(right, kinds, [answer.num_tokens for answer in given])
        return {name: metrics.estimate(figure) for name, figure in figures.items()}

    def _prompts_of(self, kind: str, split: Split, num_prompts: int, seed: int) -> list[ChatPrompt]:
        examples = _examples(kind)
        shown = [message for example in examples for message in _worked(kind, example)]
        unseen = (entry for entry in _entries(kind, split) if entry not in examples)
        drawn: list[dict[str, Any]] = []
        # Shuffled in lots of one size, so that asking for more prompts does not change the first ones.
        while len(drawn) < num_prompts and (lot := list(itertools.islice(unseen, _LOT))):
            random.Random(f"{seed} {len(drawn)}").shuffle(lot)
            drawn += lot
        drawn = drawn[:num_prompts]
        return [
            ChatPrompt(
                messages=(*shown, {"role": "user", "content": entry["question"]}),
                max_tokens=self.max_tokens,
                kind=kind,
                chain_of_thought=chain_of_thought(kind, entry),
                answer=entry["answer"],
                entry=entry,
            )
            for entry in drawn
        ]


def is_right(problem: ChatPrompt, text: str) -> bool:
    """Whether reasoning-gym's verifier gives full marks to the last number after the think tags.

    Without a closing tag the last number of the whole text counts: a model that never
    finishes its chain is judged on where it got.
    """
    numbers = _NUMBER.findall(text.rsplit("</think>", 1)[-1].replace(",", ""))
    return bool(numbers) and float(_dataset(problem.kind).score_answer(numbers[-1], problem.entry)) >= 1.0


@cache
def _examples(kind: str) -> tuple[dict[str, Any], ...]:
    """The first calibration problems whose worked chains differ in their number of steps."""
    by_length: dict[int, dict[str, Any]] = {}
    for entry in _entries(kind, "calibration"):
        by_length.setdefault(len(re.findall(r"=", chain_of_thought(kind, entry))), entry)
        if len(by_length) == _NUM_EXAMPLES:
            break
    return tuple(by_length.values())


def _worked(kind: str, entry: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    solution = f"<think>\n{chain_of_thought(kind, entry)}\n</think>\n{entry['answer']}"
    return {"role": "user", "content": entry["question"]}, {"role": "assistant", "content": solution}


def chain_of_thought(kind: str, entry: dict[str, Any]) -> str:
    """The worked derivation of a reasoning-gym problem of one of `KINDS`."""
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

    return reasoning_gym.create_dataset(kind, size=1_000_000, seed=_STREAM_SEED, **KINDS[kind])


def _entries(kind: str, split: Split) -> Iterator[dict[str, Any]]:
    """Different problems of a split; ends where the generator brings nothing new, as small sums are few."""
    seen = set()
    repeats = 0
    for index in itertools.count():
        entry = _dataset(kind)[index]
        question = entry["question"]
        repeats = repeats + 1 if question in seen else 0
        if repeats == _MOST_REPEATS:
            return
        if question not in seen:
            seen.add(question)
            if split_of(question) == split:
                yield entry
