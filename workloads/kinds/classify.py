"""`kind = "classify"`: one of several labels for a text, chosen by the labels' probabilities after the prompt."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal, cast

from pydantic import Field

from slimserve.workloads import metrics
from slimserve.workloads.interface import (
    SCORING_VIEW,
    Answer,
    ChoicePrompt,
    LaunchProfile,
    MetricData,
    Prompt,
    ReportView,
)
from slimserve.workloads.kinds.base import FileSpec, FileWorkload, UnusableRowError, fill, text_column
from slimserve.workloads.kinds.rows import Row


class ClassifySpec(FileSpec):
    """Keys of a workload file with `kind = "classify"`."""

    kind: Literal["classify"]
    prompt: str = Field("{text}", description="Template of the prompt, with columns in braces.")
    label: str = Field("label", description="Column of the true label: its text, or its number from 0.")
    labels: list[str] = Field(min_length=2, description="Names of the labels, as in the data.")
    label_texts: list[str] | None = Field(
        None, description="Text that follows the prompt for each label (default: a space and the name)."
    )
    normalize: bool = Field(False, description="Divide a label's log-probability by its number of characters.")


class Classify(FileWorkload):
    """Texts with one true label each."""

    spec: ClassVar[ClassifySpec]
    default_metric: ClassVar[str] = "accuracy"
    default_profile: ClassVar[LaunchProfile] = "prefill"
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1")
    view: ClassVar[ReportView] = replace(SCORING_VIEW, quality_label="right labels (fraction)")

    def make_prompt(self, row: Row, group: int) -> Prompt:
        """Return the prompt of a row; UnusableRowError for an unknown label."""
        name = text_column(row, self.spec.label)
        if name in self.spec.labels:
            truth = self.spec.labels.index(name)
        elif name.isdigit() and int(name) < len(self.spec.labels):
            truth = int(name)
        else:
            raise UnusableRowError(f"has the label {name!r}; the labels are {', '.join(self.spec.labels)}")
        texts = self.spec.label_texts or [f" {label}" for label in self.spec.labels]
        grades = tuple(float(number == truth) for number in range(len(texts)))
        return ChoicePrompt(fill(self.spec.prompt, row), tuple(texts), grades, group, self.spec.normalize)

    def question(self, prompt: Prompt) -> str:
        """Return the prompt's text."""
        return cast("ChoicePrompt", prompt).query

    def metric_data(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, MetricData]:
        """Return accuracy, macro F1 and calibration error."""
        rows = cast("Sequence[ChoicePrompt]", prompts)
        probabilities = [
            prompt.probabilities(cast("Sequence[float]", answer)) for prompt, answer in zip(rows, answers, strict=True)
        ]
        return metrics.choice_metrics([one.truth for one in rows], probabilities, [one.group for one in rows])

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, list[Answer]]:
        """Return the majority label of the calibration split, with the labels' frequencies as probabilities."""
        known = cast("list[ChoicePrompt]", self.splits.rows["calibration"])
        counts = Counter(prompt.truth for prompt in known)
        rows = cast("Sequence[ChoicePrompt]", prompts)
        num_labels = len(self.spec.labels)
        logs = [math.log((counts[label] + 1) / (len(known) + num_labels)) for label in range(num_labels)]
        return {"majority_label": [tuple(logs)] * len(rows)} if known else {}
