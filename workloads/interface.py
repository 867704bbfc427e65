"""The types between a workload and whoever asks a model for answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Split = Literal["calibration", "quality", "load"]
"""Disjoint shares of a workload's data: what recipes look at, what quality is judged on, what load sends."""


def split_of(key: str) -> Split:
    """The split that a member or a question belongs to, by a hash of its text: 40%, 20% and 40%."""
    tenth = hash_number(key) % 10
    return "calibration" if tenth < 4 else "quality" if tenth < 6 else "load"


def hash_number(key: str) -> int:
    """A 48-bit number that depends on the text alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")


@dataclass(frozen=True)
class ScoringPrompt:
    """One shared prefix and its candidates; the model gives each candidate the probability of a label."""

    query: str
    items: tuple[str, ...]
    labels: tuple[str, ...]
    """Label texts, each a single token of the model; the score is the first one's share of their probability."""
    truth: tuple[bool, ...]
    """Per candidate, whether the first label is the true one."""
    group: int
    """Whose prompt it is: prompts of one group are not independent samples."""

    @property
    def solved(self) -> str:
        """The prompt with the true label behind each candidate, a line each as in the history."""
        answers = [self.labels[0] if true else self.labels[1] for true in self.truth]
        return self.query + "".join(f"{item}{answer}\n" for item, answer in zip(self.items, answers, strict=True))


@dataclass(frozen=True)
class ChatPrompt:
    """One conversation that the model answers with a chain of thought and an answer."""

    messages: tuple[dict[str, str], ...]
    max_tokens: int
    kind: str
    chain_of_thought: str
    """A worked derivation, as the workload's generator wrote it."""
    answer: str
    entry: dict[str, Any]
    """What the workload's own verifier needs."""

    @property
    def solution(self) -> str:
        """The reply that a model should give: the derivation between think tags, then the answer."""
        return f"<think>\n{self.chain_of_thought}\n</think>\n{self.answer}"


@dataclass(frozen=True)
class ChatAnswer:
    """What came back for a ChatPrompt."""

    text: str
    num_tokens: int


Prompt = ScoringPrompt | ChatPrompt
Answer = Sequence[float] | ChatAnswer
"""Per ScoringPrompt one score in [0, 1] per item; per ChatPrompt a ChatAnswer."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% confidence interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    n: int


class Workload(Protocol):
    """Makes prompts and judges answers."""

    @property
    def name(self) -> str: ...

    @property
    def primary_metric(self) -> str:
        """The figure of `judge` that stands for quality in one number; more is better."""
        ...

    def make_prompts(self, split: Split, num_prompts: int, seed: int = 0) -> list[Prompt]:
        """The first `num_prompts` of a split in the order of `seed`; fewer where the split has no more."""
        ...

    def evaluate(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, Estimate]:
        """Quality figures by name, for answers in the order of their prompts."""
        ...
