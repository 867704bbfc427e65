"""Trains students that differ in their supervision, and compares quality and cost over the lead span.

Every point is a run in a folder of its own, so the same command resumes an interrupted sweep. A control reads as many
tokens as full sequences would have, from more examples with the shorter span. It shows what a shorter span gains or
loses at equal cost. All points are validated on the same full sequences.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import field_validator

from slimserve.core.config import validated
from slimserve.core.model_files import model_hash
from slimserve.core.progress import print_status
from slimserve.core.provenance import provenance
from slimserve.core.storage import cached_result, write_atomically
from slimserve.core.variant import read_manifest
from slimserve.distill.recipe import DistillRecipe
from slimserve.distill.run import distill
from slimserve.distill.supervision import Supervision, parse_sections, sections_text

_FORMAT = 3
_MARKERS = {"left": ("o", "s"), "right": ("^", "v"), "middle": ("D", "d")}
"""Markers of each window in the plot: of its students and of their controls."""
_TITLES = {"cross_entropy": "cross-entropy, nats/token", "divergence": "divergence to the teacher, nats/token"}


@dataclass(frozen=True)
class Evaluation:
    """A measurement of further metrics of a student."""

    inputs: object
    """Everything besides the student that determines the metrics, such as the test prompts and the launch; see
    `cached_result`."""
    measure: Callable[[Path], Mapping[str, float]]
    """Returns the metrics of the student in a directory."""

    def of(self, directory: Path, folder: Path) -> dict[str, float]:
        """Return the metrics of a student, which are kept in `folder` and not measured again."""
        inputs = (model_hash(directory), self.inputs)
        return cached_result(folder, f"{directory.name}.evaluation", inputs, lambda: self.measure(directory))


class SweepPoint(Supervision):
    """The supervision of one student of a sweep."""

    is_control: bool = False

    @field_validator("sections")
    @classmethod
    def _check_sections(cls, text: str) -> str:
        return sections_text(parse_sections(text))

    @property
    def name(self) -> str:
        kind = "-matched" if self.is_control else ""
        return f"{self.sections.replace('+', '-')}-{self.window}-{self.lead_span:g}{kind}"

    def apply_to(self, recipe: DistillRecipe) -> DistillRecipe:
        """Return the recipe of this point; a control has more examples and steps in inverse proportion to its span."""
        document = recipe.model_dump(mode="json", exclude_unset=True)
        document["supervision"] = document.get("supervision", {}) | self.model_dump(exclude={"is_control"})
        if self.is_control:
            factor = 1 / self.lead_span
            num_examples = round(recipe.data.num_examples * factor)
            document["data"] = {**document.get("data", {}), "num_examples": num_examples}
            stages = [stage.model_dump(mode="json", exclude_unset=True) for stage in recipe.stages]
            document["stages"] = [
                {**stage, "steps": round(stage["steps"] * factor)} if stage.get("steps") else stage for stage in stages
            ]
        return validated(DistillRecipe, document, "recipe", f"point {self.name}")


def make_points(lead_spans: str, windows: str, sections: str, has_controls: bool) -> list[SweepPoint]:
    """Return the points of a sweep from its options.

    `lead_spans` is a list such as `0.25,0.5,1`; `windows` lists further points such as `right@0.5`. `sections` is a
    list such as `all,cot`: the first entry gets every lead span, the others only full sequences. Raises UserError that
    names an invalid option.
    """

    def point(option: str, **values: Any) -> SweepPoint:
        return validated(SweepPoint, values, "sweep", option)

    first, *others = sections.split(",")
    points = [point("--lead-spans", sections=first, lead_span=span) for span in lead_spans.split(",")]
    for text in filter(None, windows.split(",")):
        window, _, span = text.partition("@")
        points.append(point("--windows", sections=first, lead_span=span, window=window))
    points += [point("--sections", sections=other) for other in others]
    if has_controls:
        points += [one.model_copy(update={"is_control": True}) for one in points if one.lead_span < 1]
    return points


def sweep(
    student: str,
    teacher: str | None,
    recipe: DistillRecipe,
    points: Sequence[SweepPoint],
    folder: Path,
    evaluation: Evaluation | None = None,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Train the student of every point under `folder` and return one row per point.

    The rows are also in `sweep.json`, `sweep.md` and `sweep.png`. `evaluation` adds metrics of a finished student, such
    as its accuracy behind a server; they are kept beside its directory and not measured again.
    """
    rows = []
    for number, point in enumerate(points, start=1):
        print_status(f"point {number} of {len(points)}: {point.name}")
        own = point.apply_to(recipe)
        directory = distill(student, teacher, own, folder / point.name, recipe_name=point.name, device=device)
        manifest = read_manifest(directory)
        assert manifest is not None
        detail = next(step.detail for step in manifest.steps if step.name == "distill")
        row = {**point.model_dump(), "name": point.name, **_results_of(detail)}
        if evaluation is not None:
            row["evaluation"] = evaluation.of(directory, folder)
        rows.append(row)
        document = {
            "command": "distill sweep",
            "format": _FORMAT,
            **provenance(),
            "student": student,
            "teacher": teacher,
            "points": rows,
        }
        write_atomically(folder / "sweep.json", json.dumps(document, indent=2) + "\n")
    write_atomically(folder / "sweep.md", markdown(rows))
    plot(rows, folder / "sweep.png")
    return rows


def _results_of(detail: Mapping[str, Any]) -> dict[str, Any]:
    """Return the costs of a training, and its validation metrics at the kept step and before the first step."""
    history = detail["validation"]
    kept = next((row for row in history if row["step"] == detail["kept_step"]), history[-1] if history else {})
    metrics = {name: value for name, value in kept.items() if name not in {"step", "tokens_read", "train_s"}}
    return {
        **{name: detail[name] for name in ("steps", "tokens_read", "targets", "train_s", "flops", "peak_bytes")},
        **{f"total_{name}": value for name, value in detail["total"].items()},
        "validation": metrics,
        "validation_before": {name: history[0][name] for name in metrics} if history else {},
    }


def _metrics_of(row: Mapping[str, Any]) -> dict[str, float]:
    return {**row["validation"], **row.get("evaluation", {})}


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the cells of a table with one row per point."""
    names = list(dict.fromkeys(name for row in rows for name in _metrics_of(row)))
    head = ["sections", "window", "span", "steps", "tokens", "minutes", "peak GiB", "TFLOP", *names]
    lines = []
    for row in rows:
        metrics = _metrics_of(row)
        cells = [
            row["sections"],
            row["window"] + (", as many tokens" if row["is_control"] else ""),
            f"{row['lead_span']:g}",
            str(row["steps"]),
            f"{row['tokens_read']:,}",
            f"{row['total_seconds'] / 60:.1f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
            f"{row['total_flops'] / 1e12:.0f}",
            *(f"{metrics[name]:.4g}" if name in metrics else "" for name in names),
        ]
        lines.append(cells)
    return head, lines


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of all points as Markdown."""
    head, lines = table(rows)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *lines))


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Plot quality, and costs as fractions of those of full sequences, over the lead span."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    def series(window: str, is_control: bool) -> list[Mapping[str, Any]]:
        kind = (rows[0]["sections"], window, is_control)
        return [row for row in rows if (row["sections"], row["window"], row["is_control"]) == kind]

    quality = [name for name in _TITLES if name in rows[0]["validation"]]
    quality += list(rows[0].get("evaluation", {}))
    figure, axes = pyplot.subplots(1, len(quality) + 1, figsize=(4.2 * (len(quality) + 1), 3.6), layout="constrained")
    for axis, name in zip(axes, quality, strict=False):
        for window, markers in _MARKERS.items():
            for is_control, marker in zip((False, True), markers, strict=True):
                chosen = series(window, is_control)
                if chosen:
                    axis.plot(
                        [row["lead_span"] for row in chosen],
                        [_metrics_of(row).get(name) for row in chosen],
                        marker=marker,
                        label=f"{window}, as many tokens" if is_control else window,
                        linestyle="-" if window == "left" else "",
                    )
        axis.set(title=_TITLES.get(name, name.replace("_", " ")))
    full = next((row for row in rows if row["lead_span"] == 1 and not row["is_control"]), rows[0])
    chosen = series("left", False)
    for key, label in {"total_seconds": "time", "peak_bytes": "memory", "total_flops": "FLOPs"}.items():
        spans, costs = [row["lead_span"] for row in chosen], [row[key] / full[key] for row in chosen]
        axes[-1].plot(spans, costs, marker="o", label=label)
    axes[-1].set(title="cost relative to full sequences", ylim=(0, None))
    for axis in axes:
        axis.set(xlabel="lead span (fraction of each sequence)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    partial = file.with_name(f".{file.name}")
    figure.savefig(partial, dpi=140, format=file.suffix.removeprefix("."))
    partial.replace(file)
    pyplot.close(figure)
