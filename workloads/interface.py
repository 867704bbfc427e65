"""The workload interface: one object that says what a model is asked and how its answers are evaluated.

Calibration, distillation, quality and load all use the same object, on separate splits of its data. A new workload is
one file with a subclass of `Workload`; every other part of the project asks the object and knows no workload by name.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from slimserve.core.errors import UserError
from slimserve.core.messages import THINK_CLOSE as THINK_CLOSE
from slimserve.core.messages import THINK_OPEN as THINK_OPEN
from slimserve.core.messages import join_reply as join_reply
from slimserve.core.text import split_lines

Split = Literal["calibration", "quality", "load"]
"""Disjoint parts of a workload's data: for recipes and training, for quality, and for load tests."""
LaunchProfile = Literal["prefill", "decode", "balanced"]
"""Phase of inference that takes most of a workload's time; the launch of an engine is planned for it."""

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_CHOICE = re.compile(r"\d+(,\d+)*")


def split_of(key: str) -> Split:
    """Assign a user or a question to a split by a hash of its text: 40% calibration, 20% quality, 40% load."""
    tenth = hash_number(key) % 10
    return "calibration" if tenth < 4 else "quality" if tenth < 6 else "load"


def hash_number(key: str) -> int:
    """Return a 48-bit number that depends on the text alone and is the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")


@dataclass(frozen=True)
class ScoringPrompt:
    """A shared prefix and its candidate items; the model gives each item the probability of a label."""

    query: str
    items: tuple[str, ...]
    labels: tuple[str, ...]
    """Label texts, each one token of the model; the score is the first label's share of their probability."""
    truth: tuple[bool, ...]
    """Per item, whether the first label is the true one."""
    group: int
    """Number of the user; prompts of one group are not independent samples."""
    gains: tuple[float, ...] = ()
    """Grade of each item, 0 for irrelevant ones; without grades, 1 for each true first label."""
    soft: tuple[float, ...] = ()
    """Probability of the first label that a student learns for each item; without soft labels, 1 or 0."""
    item_ids: tuple[str, ...] = ()
    """Id of each item in catalogues; empty if the workload has none."""
    line_ids: tuple[str, ...] = ()
    """Id of the item on each line of the query; empty if the query is no history of items."""

    def __post_init__(self) -> None:
        hard = tuple(map(float, self.truth))
        for name in ("gains", "soft"):
            if not getattr(self, name):
                object.__setattr__(self, name, hard)

    @property
    def lines(self) -> list[str]:
        """The lines of the query, with their line feeds."""
        return split_lines(self.query, keepends=True)

    def with_texts(self, texts: Mapping[str, str]) -> ScoringPrompt:
        """Return the prompt with the text of each item replaced by that of its id; items without one keep theirs.

        A line of the query is an item and its label. With the texts of a catalogue, the model reads item tokens.
        """

        def rewritten(line: str, item: str) -> str:
            label = next((label for label in self.labels if line.rstrip("\n").endswith(label)), None)
            return f"{texts[item]}{label}\n" if item in texts and label is not None else line

        lines = self.lines
        if self.line_ids:
            lines = [rewritten(line, item) for line, item in zip(lines, self.line_ids, strict=True)]
        ids = self.item_ids or ("",) * len(self.items)
        items = tuple(texts.get(item, text) for item, text in zip(ids, self.items, strict=True))
        return replace(self, query="".join(lines), items=items)

    def only_items(self, ids: Collection[str]) -> ScoringPrompt:
        """Return the prompt without the lines and items whose ids are not among `ids`; a query without ids stays."""
        own, lines = self.lines, [place for place, item in enumerate(self.line_ids) if item in ids]
        kept = [place for place, item in enumerate(self.item_ids) if item in ids]
        return replace(
            self.with_candidates(kept),
            query="".join(own[place] for place in lines) if self.line_ids else self.query,
            line_ids=tuple(self.line_ids[place] for place in lines),
        )

    def with_candidates(self, places: Iterable[int]) -> ScoringPrompt:
        """Return the prompt with the items at `places` as its candidates."""
        kept = list(places)
        return replace(
            self,
            items=tuple(self.items[place] for place in kept),
            truth=tuple(self.truth[place] for place in kept),
            gains=tuple(self.gains[place] for place in kept),
            soft=tuple(self.soft[place] for place in kept),
            item_ids=tuple(self.item_ids[place] for place in kept) if self.item_ids else (),
        )

    @property
    def solved(self) -> str:
        """The prompt with the true label after each item, one line each, as in the history."""
        answers = [self.labels[0] if true else self.labels[1] for true in self.truth]
        return self.query + "".join(f"{item}{answer}\n" for item, answer in zip(self.items, answers, strict=True))


class Interaction(NamedTuple):
    """One grade that a user gave to an item."""

    group: int
    item: str
    is_positive: bool


@dataclass(frozen=True)
class ChoicePrompt:
    """A text and the continuations among which the model chooses by their probability."""

    query: str
    choices: tuple[str, ...]
    """Texts that may follow the query, each of any number of tokens."""
    gains: tuple[float, ...]
    """Grade of each choice; with one true choice, 1 for it and 0 for the others."""
    group: int
    """Number of the user or query; prompts of one group are not independent samples."""
    is_normalized: bool = False
    """Divide each log-probability by the choice's number of characters, so that long choices are not unlikely."""

    @property
    def truth(self) -> int:
        """Number of the best choice."""
        return max(range(len(self.gains)), key=lambda number: self.gains[number])

    @property
    def solved(self) -> str:
        """The text with its best continuation."""
        return self.query + self.choices[self.truth]

    def probabilities(self, logprobs: Sequence[float]) -> tuple[float, ...]:
        """Return the share of each choice in the probability of all, from their log-probabilities in nats."""
        lengths = [max(1, len(choice)) if self.is_normalized else 1 for choice in self.choices]
        values = [logprob / length for logprob, length in zip(logprobs, lengths, strict=True)]
        largest = max(values)
        weights = [math.exp(value - largest) for value in values]
        return tuple(weight / sum(weights) for weight in weights)


@dataclass(frozen=True)
class TextPrompt:
    """A text whose own tokens the model predicts."""

    text: str
    num_tokens: int
    """Number of tokens that are read at most; under load, the largest number of tokens that continue it."""
    group: int

    @property
    def solved(self) -> str:
        """The text."""
        return self.text


@dataclass(frozen=True)
class HarnessPrompt:
    """A document of a task that lm-eval itself asks and evaluates."""

    task: str
    document: int
    """Number of the document in the task."""
    context: str
    """Text of the document's first request."""
    choices: tuple[str, ...]
    """Continuations that are compared; empty if the model writes the answer."""
    group: int

    @property
    def solved(self) -> str:
        """The text of the first request; only the harness knows its answer."""
        return self.context


@dataclass(frozen=True)
class SampleMetrics:
    """The values of each metric for one document, as lm-eval computed them."""

    values: dict[str, float]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    temperature: float = 0.0
    """0 takes the most likely token."""
    num_samples: int = 1


GREEDY = Sampling()


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation that the model continues with a chain of thought and an answer."""

    messages: tuple[dict[str, Any], ...]
    """Messages as OpenAI's API takes them; workloads with reference answers have texts as contents."""
    max_tokens: int
    kind: str
    chain_of_thought: str
    """A worked derivation, as the workload's generator wrote it."""
    answer: str
    entry: dict[str, Any]
    """Data that the workload's own verifier needs."""
    sampling: Sampling = GREEDY
    group: int | None = None
    """Number of the group, if prompts of one group are not independent samples."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the request, such as `tools`."""

    @property
    def question(self) -> str:
        """The text of the last message."""
        return str(self.messages[-1]["content"] or "")

    @property
    def solution(self) -> str:
        """The reply that a model should give: the derivation between think tags, then the answer."""
        return join_reply(self.chain_of_thought, self.answer)


@dataclass(frozen=True)
class ChatAnswer:
    """A model's reply to a ChatPrompt."""

    text: str
    num_tokens: float
    """Number of tokens of the text; with several samples their mean."""
    further_texts: tuple[str, ...] = ()
    """Further samples."""

    @property
    def texts(self) -> tuple[str, ...]:
        """All samples."""
        return (self.text, *self.further_texts)


@dataclass(frozen=True)
class TextReading:
    """A model's log-probabilities of one text, from its second token on."""

    tokens: tuple[int, ...]
    """All tokens of the text, including the first."""
    logprobs: tuple[float, ...]
    """Log-probability of each token after the first, in nats."""
    top: tuple[dict[int, float], ...]
    """Log-probabilities of the most likely tokens at each of these positions, by token."""


Prompt = ScoringPrompt | ChoicePrompt | ChatPrompt | TextPrompt | HarnessPrompt
Answer = Sequence[float] | ChatAnswer | TextReading | SampleMetrics
"""For a ScoringPrompt one score in [0, 1] per item; for a ChoicePrompt one log-probability in nats per choice; for a
ChatPrompt a ChatAnswer; for a TextPrompt a TextReading; for a HarnessPrompt its SampleMetrics."""


@dataclass(frozen=True)
class Estimate:
    """The value of a metric with its 95% confidence interval and the number of samples."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class MetricData:
    """A metric as a statistic of rows, so that intervals and paired tests can resample the rows."""

    statistic: Callable[[list[int]], float]
    """Maps row numbers, which may repeat, to the value; NaN where it is undefined."""
    groups: Sequence[int]
    """Group of each row; rows of one group are not independent and are resampled together."""
    n: int
    """Number of samples, in the metric's own unit."""
    successes: tuple[bool, ...] | None = None
    """Success of each row, if the metric is the share of successes."""
    values: tuple[float, ...] | None = None
    """Value of each row, if the metric is their mean; rows with NaN are left out. Makes resampling fast."""
    floor: float | None = None
    """Value for a model that knows nothing, such as 0.5 for an AUC; None if there is no such value."""
    ceiling: float | None = None
    """Best possible value; None if there is none."""
    higher_is_better: bool = True

    @cached_property
    def value(self) -> float:
        """The metric over all rows."""
        if self.values is not None:
            known = [one for one in self.values if not math.isnan(one)]
            return math.fsum(known) / len(known) if known else math.nan
        return self.statistic(list(range(len(self.groups))))


@dataclass(frozen=True)
class ReportView:
    """How reports name a workload's quality, speed and latency. Field names refer to `loadtest.summary.LoadSummary`."""

    quality_label: str
    speed: str
    """Field that holds the throughput, such as `items_per_s`."""
    speed_label: str
    latencies: Mapping[str, str]
    """Fields that hold latencies, by label; the first is plotted over the request rate."""
    distribution: str
    """Latency whose distribution is plotted: `ttft`, `itl`, `tpot` or `e2e`."""
    distribution_label: str
    cost: str
    """Key of the cost that compares variants, such as `per_million_items`."""


CHAT_VIEW = ReportView(
    quality_label="correct answers (fraction)",
    speed="output_tokens_per_s",
    speed_label="output tokens/s",
    latencies={"first token": "ttft_s", "between tokens": "itl_s"},
    distribution="itl",
    distribution_label="time between tokens (ms)",
    cost="per_thousand_answers",
)
SCORING_VIEW = ReportView(
    quality_label="ranking quality (AUC)",
    speed="items_per_s",
    speed_label="scored items/s",
    latencies={"request latency": "e2e_s"},
    distribution="e2e",
    distribution_label="latency of a scoring request (ms)",
    cost="per_million_items",
)


class SizeDistribution:
    """A distribution of whole numbers: `16`, `8..32` (uniform) or `8,16,32` (one of these)."""

    def __init__(self, option: str, text: str) -> None:
        """Parse `text`; UserError names `option` if it is none of the three forms."""
        self._choices: Sequence[int] = ()
        if span := _RANGE.fullmatch(text):
            self._choices = range(int(span[1]), int(span[2]) + 1)
        elif _CHOICE.fullmatch(text):
            self._choices = [int(part) for part in text.split(",")]
        if not self._choices or min(self._choices) < 1:
            raise UserError(option, text, "is not a size", "write 16, 8..32 (uniform) or 8,16,32 (one of these)")

    @property
    def largest(self) -> int:
        return max(self._choices)

    def draw(self, numbers: random.Random) -> int:
        return numbers.choice(self._choices)


class LoadOptions(Protocol):
    """Options of a load test that shape a workload's requests (loadtest/settings.py)."""

    @property
    def history(self) -> str: ...
    @property
    def candidates(self) -> str: ...
    @property
    def repeat_visits(self) -> float: ...
    @property
    def max_tokens(self) -> str: ...
    @property
    def prompt_seed(self) -> int: ...
    @property
    def data(self) -> str: ...


class Workload(ABC):
    """Makes prompts and evaluates answers, and states everything else that the project needs to know of a task."""

    name: ClassVar[str]
    primary_metric: ClassVar[str]
    """Metric that stands for quality in one number; higher is better."""
    launch_profile: ClassVar[LaunchProfile] = "balanced"
    preset_prompts: ClassVar[Mapping[str, int]] = {"quick": 64, "full": 256}
    """Number of quality prompts in each preset of a comparison."""
    load_users: ClassVar[int] = 8
    """Number of closed-loop users that measure the capacity of a server."""
    view: ClassVar[ReportView] = CHAT_VIEW
    evaluates_load: ClassVar[bool] = True
    """Whether answers under load can be evaluated, because load tests send the same prompts as quality."""

    @property
    def files(self) -> list[Path]:
        """Files that define the workload; if one changes, what was built from the workload is out of date."""
        return []

    @abstractmethod
    def make_prompts(self, split: Split, num_prompts: int, seed: int = 0) -> list[Prompt]:
        """Return the first `num_prompts` prompts of a split in the order of `seed`; fewer if it has no more."""

    def score_calibration_prompts(self, num_prompts: int, seed: int = 0) -> list[Prompt]:
        """Return prompts of the calibration split, drawn as those of the quality split are.

        A calibration of scores holds for prompts that are drawn alike; a recipe's calibration does not depend on it.
        """
        return self.make_prompts("calibration", num_prompts, seed)

    @abstractmethod
    def metric_data(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, MetricData]:
        """Return the quality metrics by name, for answers in the order of their prompts."""

    def reference_metrics(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Answer],
        reference: Sequence[Answer],  # noqa: ARG002
    ) -> dict[str, MetricData]:
        """Return the quality metrics, and those that compare the answers with a reference model's."""
        return self.metric_data(prompts, answers)

    def item_texts(self) -> dict[str, str]:
        """Return the text of each item by its id in catalogues; empty if items have no ids."""
        return {}

    def interactions(self) -> list[Interaction]:
        """Return the grades that users of the calibration split gave to items with an id."""
        return []

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, list[Answer]]:  # noqa: ARG002
        """Return the answers of baselines that use no language model, by name, in the order of the prompts."""
        return {}

    def is_correct(self, prompt: ChatPrompt, text: str) -> bool:
        """Verify a reply to one of this workload's chat prompts; scoring workloads have no correct replies."""
        raise NotImplementedError(f"{self.name} does not verify replies")

    def load_prompts(self, options: LoadOptions, num_prompts: int) -> list[Prompt]:
        """Return at most `num_prompts` prompts of the load split; replies have lengths drawn from `max_tokens`."""
        numbers, sizes = random.Random(f"{self.name} {options.prompt_seed}"), _max_tokens_of(options)
        prompts = self.make_prompts("load", num_prompts, options.prompt_seed)
        return [
            replace(prompt, max_tokens=sizes.draw(numbers))
            if isinstance(prompt, ChatPrompt)
            else replace(prompt, num_tokens=sizes.draw(numbers))
            if isinstance(prompt, TextPrompt)
            else prompt
            for prompt in prompts
        ]


def _max_tokens_of(options: LoadOptions) -> SizeDistribution:
    return SizeDistribution("--max-tokens", options.max_tokens)
