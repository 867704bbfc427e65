"""`kind = "lm-eval"`: a task of EleutherAI's lm-evaluation-harness, by name or by a local YAML file.

The harness itself asks the served model and computes the values of each document; these are paired between variants.
Its other prompts serve the other uses: requests of the evaluation documents make load, training documents calibrate.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from pydantic import Field

from slimserve.core.errors import UserError
from slimserve.core.openai_client import Target
from slimserve.core.storage import cache_dir, sha256_of_files, write_atomically
from slimserve.workloads.harness import run_harness
from slimserve.workloads.interface import (
    CHAT_VIEW,
    Answer,
    ChoicePrompt,
    HarnessPrompt,
    LoadOptions,
    MetricData,
    Prompt,
    ReportView,
    SampleMetrics,
    SizeDistribution,
    Split,
    TextPrompt,
)
from slimserve.workloads.kinds.base import FileSpec, FileWorkload
from slimserve.workloads.kinds.rows import Row, Table
from slimserve.workloads.metrics import mean_metric

_CONCURRENCY = 8
_EVAL = 'run: pip install "slimserve[eval]"'


class LmEvalSpec(FileSpec):
    """Keys of a workload file with `kind = "lm-eval"`."""

    kind: Literal["lm-eval"]
    task: str = Field(description="Name of a task of the harness, or path of its YAML file.")
    num_fewshot: int | None = Field(None, ge=0, description="Number of worked examples (default: the task's own).")
    limit: int | None = Field(None, ge=1, description="Largest number of documents of each task.")
    apply_chat_template: bool = Field(False, description="Ask in the model's chat format.")


class LmEval(FileWorkload):
    """Documents of a task of the harness."""

    spec: ClassVar[LmEvalSpec]
    default_metric: ClassVar[str] = ""
    evaluates_load: ClassVar[bool] = False
    view: ClassVar[ReportView] = CHAT_VIEW

    @classmethod
    def from_spec(cls, spec: FileSpec, file: Path) -> FileWorkload:
        """Return the workload; its metrics are the task's own, and the first one is primary if none is named."""
        from importlib.util import find_spec

        if find_spec("lm_eval") is None:
            raise UserError("kind", "lm-eval", "needs the package `lm-eval`", _EVAL)
        workload = cast("LmEval", cls._make(spec, file, ""))
        names = list(workload.description["metrics"])
        primary = spec.primary_metric or next(iter(names), "")
        if primary not in names:
            remedy = f"choose from {', '.join(names)}"
            raise UserError("primary_metric", primary, "is not a metric of this task", remedy)
        type(workload).primary_metric = primary
        return workload

    @cached_property
    def description(self) -> dict[str, Any]:
        """The task's documents and metrics, as the harness lists them.

        They are kept in the cache, because listing takes seconds and the load generator cannot start child processes.
        """
        content = [sha256_of_files([file]) for file in self.files if file.is_file()]
        if self.further_files():  # the YAML file names its data files in its own folder
            task = self.folder / self.spec.task
            text = task.read_text(encoding="utf-8")
            named = [file for file in sorted(task.parent.iterdir()) if file.is_file() and file.name in text]
            content += [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in named]
        key = hashlib.sha256(json.dumps([self._job(), content]).encode()).hexdigest()
        file = cache_dir("harness") / f"{key[:24]}.json"
        if not file.is_file():
            write_atomically(file, json.dumps(run_harness(self._job())))
        return cast("dict[str, Any]", json.loads(file.read_text(encoding="utf-8")))

    def _job(self) -> dict[str, Any]:
        spec, task = self.spec, self.spec.task
        if task.endswith((".yaml", ".yml")):
            file = (self.folder / task).resolve()
            if not file.is_file():
                raise UserError("task", file, "does not exist", "give the path of a task's YAML file")
            task = str(file)
        return {
            "task": task,
            "num_fewshot": spec.num_fewshot,
            "limit": spec.limit,
            "apply_chat_template": spec.apply_chat_template,
        }

    def further_files(self) -> list[str]:
        """Return the YAML file of the task."""
        return [self.spec.task] if self.spec.task.endswith((".yaml", ".yml")) else []

    def read_rows(self) -> Table:
        """Return one row per document."""
        documents = self.description["documents"]
        return Table([Row(f"{one['task']}, document {one['id']}", one) for one in documents])

    def make_prompt(self, row: Row, group: int) -> Prompt:
        """Return the document's first request; training documents are texts."""
        values = row.values
        if values["split"] == "calibration":
            return TextPrompt(values["context"], 0, group)
        return HarnessPrompt(values["task"], values["id"], values["context"], tuple(values["choices"]), group)

    def question(self, prompt: Prompt) -> str:
        """Return the text before the answer."""
        return prompt.text if isinstance(prompt, TextPrompt) else cast("HarnessPrompt", prompt).context

    def _split_of(self, row: Row, key: str) -> Split:  # noqa: ARG002
        return cast("Split", row.values["split"])

    def ask(self, target: Target, prompts: Sequence[HarnessPrompt]) -> list[SampleMetrics]:
        """Let the harness evaluate these documents against a served model; UserError if it fails."""
        documents: dict[str, list[int]] = {}
        for prompt in prompts:
            documents.setdefault(prompt.task, []).append(prompt.document)
        job = {
            **self._job(),
            "url": target.url,
            "model": target.model,
            "tokenizer": target.tokenizer,
            "concurrency": _CONCURRENCY,
            "documents": {name: sorted(numbers) for name, numbers in documents.items()},
        }
        samples = run_harness(job)["samples"]
        values = {(name, row["id"]): row["values"] for name, rows in samples.items() for row in rows}
        return [SampleMetrics(_numbers(values[prompt.task, prompt.document])) for prompt in prompts]

    def metric_data(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, MetricData]:
        """Return the mean of each metric over documents, which is how the harness aggregates nearly all of them."""
        documents, rows = cast("Sequence[HarnessPrompt]", prompts), cast("Sequence[SampleMetrics]", answers)
        groups = [one.group for one in documents]
        chances = [1 / len(one.choices) if one.choices else 0.0 for one in documents]
        results = {}
        for name, is_higher in self.description["metrics"].items():
            values = [row.values.get(name, float("nan")) for row in rows]
            floor = sum(chances) / len(chances) if chances and is_higher else None
            made = mean_metric(values, groups, floor=floor, ceiling=1.0 if is_higher else None)
            outcomes = set(values)
            is_share = outcomes <= {0.0, 1.0} and len(set(groups)) == len(groups)
            successes = tuple(map(bool, values)) if is_share else None
            results[name] = MetricData(
                made.statistic, made.groups, made.n, successes, made.values, floor, made.ceiling, is_higher
            )
        return results

    def load_prompts(self, options: LoadOptions, num_prompts: int) -> list[Prompt]:
        """Return the documents' requests: choices for a task of choices, texts to continue otherwise."""
        sizes = SizeDistribution("--max-tokens", options.max_tokens)
        draw = random.Random(f"documents {options.prompt_seed}")
        prompts = cast("list[HarnessPrompt]", self.make_prompts("quality", num_prompts, options.prompt_seed))
        return [
            ChoicePrompt(one.context, one.choices, (1.0,) * len(one.choices), one.group)
            if one.choices
            else TextPrompt(one.context, sizes.draw(draw), one.group)
            for one in prompts
        ]


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
