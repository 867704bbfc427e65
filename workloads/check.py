"""`slimserve workload check`: what a workload file makes of the data, before any model is asked.

It counts usable rows and splits, reports copies of quality prompts in other splits, measures lengths in tokens, shows
three prompts as a model gets them, and evaluates the baselines that use no language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimserve.core.chat_template import render_chat
from slimserve.core.statistics import percentile
from slimserve.core.tokenizer import load_tokenizer
from slimserve.workloads.interface import ChatPrompt, Estimate, HarnessPrompt, Prompt, ScoringPrompt, Split, TextPrompt
from slimserve.workloads.intervals import estimate
from slimserve.workloads.kinds.base import FileWorkload
from slimserve.workloads.kinds.rows import Unusable

_NUM_SHOWN = 3
_NUM_TOKENIZED = 500
_SHOWN_CHARACTERS = 600


@dataclass(frozen=True)
class TokenLengths:
    """Numbers of tokens of prompts, without the answer."""

    p50: float
    p90: float
    largest: float
    n: int


@dataclass(frozen=True)
class WorkloadReport:
    """What is known about a workload file and its data."""

    name: str
    kind: str
    num_rows: int
    unusable: list[Unusable]
    num_groups: int
    num_prompts: dict[Split, int]
    leaks: list[tuple[str, str]]
    """Places of rows in other splits whose prompt is also in the quality split, with the place there."""
    lengths: dict[Split, TokenLengths]
    """Lengths by split; empty without a tokenizer."""
    shown: list[str]
    """Prompts as a model gets them, shortened in the middle."""
    metric: str
    floor: float | None
    """Value of the primary metric for a model that knows nothing."""
    baselines: dict[str, Estimate]
    """Primary metric of each baseline on all quality prompts."""


def check_workload(workload: FileWorkload, model: Path | None = None) -> WorkloadReport:
    """Return the report of a workload file; lengths in tokens need the directory of a model with a tokenizer."""
    splits = workload.splits
    tokenizer = load_tokenizer(model) if model is not None else None
    quality: Sequence[Prompt] = workload.make_prompts("quality", len(splits.rows["quality"]))
    baselines = workload.baselines(quality) if quality else {}
    values = {name: workload.metric_data(quality, answers) for name, answers in baselines.items()}
    primary = {name: data[workload.primary_metric] for name, data in values.items()}
    return WorkloadReport(
        name=workload.name,
        kind=getattr(workload.spec, "kind", ""),
        num_rows=splits.num_rows,
        unusable=splits.unusable,
        num_groups=splits.num_groups,
        num_prompts={split: len(rows) for split, rows in splits.rows.items()},
        leaks=splits.leaks,
        lengths={split: _lengths(tokenizer, rows) for split, rows in splits.rows.items() if rows and tokenizer},
        shown=[_shortened(_rendered(prompt, tokenizer)) for prompt in quality[:_NUM_SHOWN]],
        metric=workload.primary_metric,
        floor=next((metric.floor for metric in primary.values()), None),
        baselines={name: estimate(metric) for name, metric in primary.items()},
    )


def _lengths(tokenizer: Any, prompts: Sequence[Prompt]) -> TokenLengths:
    counts = sorted(
        float(len(tokenizer(_rendered(prompt, tokenizer))["input_ids"])) for prompt in prompts[:_NUM_TOKENIZED]
    )
    return TokenLengths(percentile(counts, 0.5), percentile(counts, 0.9), max(counts), len(counts))


def _rendered(prompt: Prompt, tokenizer: Any) -> str:
    """Return the text that a model gets: the query with its first item or choice, or the chat in its template."""
    if isinstance(prompt, TextPrompt):
        return prompt.text
    if isinstance(prompt, ScoringPrompt):
        return prompt.query + prompt.items[0]
    if isinstance(prompt, HarnessPrompt):
        return prompt.context
    if not isinstance(prompt, ChatPrompt):
        return prompt.query
    if tokenizer is not None and tokenizer.chat_template is not None:
        tools, options = prompt.request.get("tools") or (), prompt.request.get("chat_template_kwargs")
        name = f"a prompt of {prompt.kind}"
        return render_chat(tokenizer, prompt.messages, name, tools=tools, options=options, add_generation_prompt=True)
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)


def _shortened(text: str) -> str:
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]} [… {len(text) - 2 * half:,} characters …] {text[-half:]}"
