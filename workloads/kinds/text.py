"""`kind = "text"`: how well a model predicts the user's own texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal, cast

from pydantic import Field

from slimserve.workloads.interface import (
    CHAT_VIEW,
    Answer,
    LaunchProfile,
    MetricData,
    Prompt,
    ReportView,
    TextPrompt,
    TextReading,
)
from slimserve.workloads.kinds.base import FileSpec, FileWorkload, UnusableRowError, fill
from slimserve.workloads.kinds.rows import Row
from slimserve.workloads.text import text_metrics


class TextSpec(FileSpec):
    """Keys of a workload file with `kind = "text"`."""

    kind: Literal["text"]
    text: str = Field("{text}", description="Template of a text, with columns in braces.")
    num_tokens: int = Field(512, ge=2, description="Number of tokens that are read of each text.")


class Text(FileWorkload):
    """Texts without a question."""

    spec: ClassVar[TextSpec]
    default_metric: ClassVar[str] = "top1_accuracy"
    default_profile: ClassVar[LaunchProfile] = "prefill"
    metric_names: ClassVar[tuple[str, ...]] = ("top1_accuracy",)
    evaluates_load: ClassVar[bool] = False
    view: ClassVar[ReportView] = replace(CHAT_VIEW, quality_label="tokens predicted as most likely (fraction)")

    def make_prompt(self, row: Row, group: int) -> Prompt:
        """Return the text of a row; UnusableRowError for an empty one."""
        text = fill(self.spec.text, row)
        if not text.strip():
            raise UnusableRowError("has an empty text")
        return TextPrompt(text, self.spec.num_tokens, group)

    def question(self, prompt: Prompt) -> str:
        """Return the text."""
        return cast("TextPrompt", prompt).text

    def metric_data(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, MetricData]:
        """Return perplexity and the share of tokens that the model held most likely."""
        return text_metrics(cast("Sequence[TextReading]", answers), groups=[self._group(one) for one in prompts])

    def reference_metrics(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer], reference: Sequence[Answer]
    ) -> dict[str, MetricData]:
        """Return KL divergence and top-1 agreement with the reference's predictions as well."""
        readings = cast("Sequence[TextReading]", answers)
        theirs = cast("Sequence[TextReading]", reference)
        return text_metrics(readings, theirs, groups=[self._group(one) for one in prompts])

    @staticmethod
    def _group(prompt: Prompt) -> int:
        return cast("TextPrompt", prompt).group
