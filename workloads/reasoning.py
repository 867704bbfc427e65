"""Reasoning: a problem, a chain of thought between think tags, and an answer that a verifier checks.

Problems are sums of the procedural generator `chain_sum` of `reasoning-gym`: short ones of two or three numbers of one
or two digits, and long ones of four to six. The derivation has one step per number. The built-in model
`smollm2-135m-tuned`, which was trained on the calibration split, solved half of the short and a fifth of the long ones.

The generator seeds problem i with `seed + i`, so the streams of nearby seeds overlap. Splits are therefore drawn from
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
    split_of,
)

KINDS: dict[str, dict[str, int]] = {
    "short_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "long_sum": {"min_terms": 4, "max_terms": 6, "min_digits": 1, "max_digits": 2},
}
"""Settings of reasoning-gym's `chain_sum` for each kind of problems."""
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
    preset_prompts: ClassVar[Mapping[str, int]] = {"quick": 192, "full": 256}
    kinds: ClassVar[tuple[str, ...]] = tuple(KINDS)

    def problems(self, kind: str, split: Split) -> Iterator[dict[str, Any]]:
        """Yield the distinct problems of a kind and a split, without end; each has a question and an answer."""
        return _entries(kind, split)

    def chain_of_thought(self, problem: Mapping[str, Any]) -> str:
        """Return the derivation of a problem."""
        return chain_of_thought(problem)

    def make_prompts(self, split: Split, num_prompts: int, seed: int = 0) -> list[Prompt]:
        """Return prompts of a split, the kinds in turn, in the order of `seed`."""
        per_kind = -(-num_prompts // len(self.kinds))
        of_kinds = [self._prompts_of(kind, split, per_kind, seed) for kind in self.kinds]
        return [prompt for turn in zip(*of_kinds, strict=True) for prompt in turn][:num_prompts]

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
        number = _last_number(text)
        return number is not None and float(_dataset(prompt.kind).score_answer(number, prompt.entry)) >= 1.0

    def load_prompts(self, options: LoadOptions, num_prompts: int) -> list[Prompt]:
        """Return problems of the load split with answer lengths drawn from `max_tokens`."""
        # The text seeds the draws, so a different text would change every recorded load test.
        numbers = random.Random(f"problems {options.prompt_seed}")
        sizes = SizeDistribution("--max-tokens", options.max_tokens)
        problems = cast("list[ChatPrompt]", self.make_prompts("load", num_prompts, options.prompt_seed))
        return [replace(problem, max_tokens=sizes.draw(numbers)) for problem in problems]

    def _prompts_of(self, kind: str, split: Split, num_prompts: int, seed: int) -> list[ChatPrompt]:
        unseen = self.problems(kind, split)
        drawn: list[dict[str, Any]] = []
        # Windows of one size, so that asking for more prompts does not change the first ones.
        while len(drawn) < num_prompts:
            window = list(itertools.islice(unseen, _SHUFFLE_WINDOW))
            random.Random(f"{seed} {len(drawn)}").shuffle(window)
            drawn += window
        return [
            ChatPrompt(
                messages=({"role": "user", "content": entry["question"]},),
                max_tokens=self.max_tokens,
                kind=kind,
                chain_of_thought=self.chain_of_thought(entry),
                answer=entry["answer"],
                entry=entry,
            )
            for entry in drawn[:num_prompts]
        ]


def chain_of_thought(entry: Mapping[str, Any]) -> str:
    """Return the derivation of a sum, one step per number after the first."""
    first, *rest = entry["metadata"]["expression"].split()
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total} {sign} {term} = {after}.")
        total = after
    return " ".join(steps)


def last_number(text: str) -> float | None:
    """Return the last number after the think tags; None if there is none."""
    number = _last_number(text)
    return None if number is None else float(number)


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text.rsplit(THINK_CLOSE, 1)[-1].replace(",", ""))
    return numbers[-1] if numbers else None


@cache
def _dataset(kind: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset("chain_sum", size=1_000_000, seed=_STREAM_SEED, **KINDS[kind])


def _entries(kind: str, split: Split) -> Iterator[dict[str, Any]]:
    """Yield the distinct problems of a split."""
    seen = set()
    for index in itertools.count():
        entry = _dataset(kind)[index]
        question = entry["question"]
        if question not in seen:
            seen.add(question)
            if split_of(question) == split:
                yield entry


WORKLOAD = Reasoning()
