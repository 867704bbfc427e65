"""`kind = "generate"`: a text that the model writes, checked by a verifier.

With several samples per prompt, `accuracy` is the mean over samples and `pass_at_k` the share of prompts that at least
one of k samples solves, estimated without bias from all samples (Chen et al. 2021, section 2.1).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from pydantic import Field

from slimserve.core.errors import UserError
from slimserve.core.progress import print_once
from slimserve.core.text import parse_json
from slimserve.workloads import metrics
from slimserve.workloads.conversations import (
    NUM_TOKENS_FIELDS,
    SAMPLING_FIELDS,
    SHAPING_FIELDS,
    check_sendable,
    read_conversation,
    unread_line,
)
from slimserve.workloads.interface import (
    CHAT_VIEW,
    Answer,
    ChatAnswer,
    ChatPrompt,
    LaunchProfile,
    MetricData,
    Prompt,
    ReportView,
    Sampling,
)
from slimserve.workloads.kinds.base import FileSpec, FileWorkload, UnusableRowError, column, fill, text_column
from slimserve.workloads.kinds.rows import Row, Table
from slimserve.workloads.verifiers import Verifier, make_verifier


class GenerateSpec(FileSpec):
    """Keys of a workload file with `kind = "generate"`."""

    kind: Literal["generate"]
    prompt: str | None = Field(None, description="Template of the user's message, with columns in braces.")
    system: str | None = Field(None, description="Template of a system message before it.")
    messages: str | None = Field(None, description="Column of complete chat messages, in place of `prompt`.")
    answer: str = Field("answer", description="Column of the reference answer.")
    chain_of_thought: str | None = Field(None, description="Column of a worked derivation, for training.")
    verifier: str = Field(
        "exact",
        description="How an answer is checked: exact, number, choice, regex, json_schema, maths or "
        "python:MODULE:FUNCTION.",
    )
    pattern: str | None = Field(None, description="Regular expression of the verifier `regex`; {answer} is the answer.")
    json_schema: str | None = Field(None, description="File of the JSON schema of the verifier `json_schema`.")
    max_tokens: int = Field(256, ge=1, description="Largest number of tokens of an answer.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature; 0 takes the most likely token.")
    samples: int = Field(1, ge=1, le=64, description="Number of answers to each prompt.")


class Generate(FileWorkload):
    """Prompts with reference answers."""

    spec: ClassVar[GenerateSpec]
    default_metric: ClassVar[str] = "accuracy"
    default_profile: ClassVar[LaunchProfile] = "decode"
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy",)
    view: ClassVar[ReportView] = CHAT_VIEW
    verifier: ClassVar[Verifier]

    @classmethod
    def facts_of(cls, spec: GenerateSpec, folder: Path) -> dict[str, Any]:
        """Return the verifier; UserError if it is unknown, or if the file names no prompt."""
        if (spec.prompt is None) == (spec.messages is None):
            raise UserError("prompt", spec.prompt, "needs either `prompt` or `messages`", "keep one of the keys")
        verifier = make_verifier(spec.verifier, folder, pattern=spec.pattern, schema=spec.json_schema)
        return {"verifier": verifier}

    def further_files(self) -> list[str]:
        """Return the file of the JSON schema."""
        return [self.spec.json_schema] if self.spec.json_schema else []

    def read_rows(self) -> Table:
        """Read all rows, and print which of their columns are ignored because the workload file sets the sampling."""
        table = super().read_rows()
        if self.spec.messages is not None:
            named = {value for value in vars(self.spec).values() if isinstance(value, str)}
            fields = {*SAMPLING_FIELDS, *NUM_TOKENS_FIELDS} - named
            unused = unread_line([[key for key in row.values if key in fields] for row in table.rows])
            if unused:
                print_once(f"{self.file.name}: not used, as the workload file decides for all rows: {unused}")
        return table

    def make_prompt(self, row: Row, group: int) -> Prompt:
        """Return the prompt of a row; UnusableRowError names what it lacks."""
        chain = text_column(row, self.spec.chain_of_thought) if self.spec.chain_of_thought else ""
        messages, request = self._conversation(row)
        return ChatPrompt(
            messages=messages,
            max_tokens=self.spec.max_tokens,
            kind=self.name,
            chain_of_thought=chain,
            answer=_answer_text(row, self.spec.answer, is_needed=self.verifier.needs_answer),
            entry={},
            sampling=Sampling(self.spec.temperature, self.spec.samples),
            group=group,
            request=request,
        )

    def question(self, prompt: Prompt) -> str:
        """Return the last message."""
        return cast("ChatPrompt", prompt).question

    def is_correct(self, prompt: ChatPrompt, text: str) -> bool:
        """Tell whether the verifier accepts a reply, without its chain of thought."""
        return self.verifier(text, prompt.answer)

    def metric_data(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, MetricData]:
        """Return the accuracy, pass@k for several samples, and the mean number of tokens per answer."""
        problems, replies = cast("Sequence[ChatPrompt]", prompts), cast("Sequence[ChatAnswer]", answers)
        counts = [
            (sum(self.is_correct(problem, text) for text in reply.texts), len(reply.texts))
            for problem, reply in zip(problems, replies, strict=True)
        ]
        shares = [right / total for right, total in counts]
        groups = [problem.group for problem in problems]
        results = metrics.answer_metrics(
            shares, [self.name] * len(shares), [reply.num_tokens for reply in replies], groups=groups
        )
        k = max((total for _, total in counts), default=1)
        if k > 1:
            passed = [1 - math.comb(total - right, k) / math.comb(total, k) for right, total in counts]
            results[f"pass_at_{k}"] = metrics.mean_metric(passed, results["accuracy"].groups, floor=0.0, ceiling=1.0)
        return results

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, list[Answer]]:
        """Return the most frequent reference answer of the calibration split as the answer to every prompt."""
        known = Counter(prompt.answer for prompt in cast("list[ChatPrompt]", self.splits.rows["calibration"]))
        if not known or not self.verifier.needs_answer:
            return {}
        return {"most_frequent_answer": [ChatAnswer(known.most_common(1)[0][0], 0)] * len(prompts)}

    def _conversation(self, row: Row) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
        """Return the messages of a row, and the fields of a request that shape them, such as tools."""
        if self.spec.messages is None:
            system = [{"role": "system", "content": fill(self.spec.system, row)}] if self.spec.system else []
            return (*system, {"role": "user", "content": fill(self.spec.prompt or "", row)}), {}
        messages = column(row, self.spec.messages)
        named = {self.spec.group, self.spec.split, self.spec.answer}
        shaping = {key: row.values[key] for key in SHAPING_FIELDS - named if row.values.get(key)}
        try:
            messages = parse_json(messages) if isinstance(messages, str) else messages
            conversation = read_conversation({**shaping, "messages": list(messages)})
            check_sendable(conversation)
            return tuple(message.as_request() for message in conversation.messages), dict(conversation.request)
        except (ValueError, TypeError) as error:
            reason = f"has no chat messages in the column {self.spec.messages}: the row {error}"
            raise UnusableRowError(reason) from error


def _answer_text(row: Row, name: str, *, is_needed: bool) -> str:
    if not is_needed and name not in row.values:
        return ""
    value = column(row, name)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
