"""Students that differ in what they were shown: a table and a plot of quality and cost over the lead span.

Every point is a run of its own in a folder of its own, so a sweep goes on where it was interrupted. A control reads as
many tokens as the whole sequences would be, by more examples of the shorter kind: what a shorter span gains or loses at
the same cost. Validation is on the same whole sequences at every point.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from slimserve.core.errors import UserError
from slimserve.core.progress import print_status
from slimserve.core.provenance import provenance
from slimserve.core.storage import write_atomically
from slimserve.core.variant import read_manifest
from slimserve.distill.recipe import DistillRecipe, parse_distill_recipe
from slimserve.distill.run import distill
from slimserve.distill.supervision import Window, check_lead_span, parse_sections, sections_text


@dataclass(frozen=True)
class Point:
    """One student of a sweep."""

    sections: str
    lead_span: float
    window: Window = "left"
    is_control: bool = False

    @property
    def name(self) -> str:
        kind = "-matched" if self.is_control else ""
        return f"{self.sections.replace('+', '-')}-{self.window}-{self.lead_span:g}{kind}"

    def apply(self, recipe: DistillRecipe) -> DistillRecipe:
        """The recipe of this point: a control has as many more examples and steps as it reads less of each."""
        raw = recipe.model_dump(mode="json", exclude_unset=True)
        asked = {"sections": self.sections, "lead_span": self.lead_span, "window": self.window}
        raw["supervision"] = {**raw.get("supervision", {}), **asked}
        if self.is_control:
            factor = 1 / self.lead_span
            raw["data"] = {**raw.get("data", {}), "num_examples": round(recipe.data.num_examples * factor)}
            stages = [stage.model_dump(mode="json", exclude_unset=True) for stage in recipe.stages]
            raw["stages"] = [
                {**stage, "steps": round(stage["steps"] * factor)} if stage.get("steps") else stage for stage in stages
            ]
        return parse_distill_recipe(raw, f"point {self.name}")


def make_points(lead_spans: str, windows: str, sections: str, has_controls: bool) -> list[Point]:
    """The points of a sweep from options.

    `lead_spans` as 0.25,0.5,1; `windows` as right@0.5 or middle@0.5, beside the left ones; `sections` as all,cot: the
    first has every span, each further one the whole sequences. UserError names what cannot be read.
    """
    try:
        spans = [float(text) for text in lead_spans.split(",")]
    except ValueError as error:
        raise UserError("--lead-spans", lead_spans, "is no list of shares", "write 0.25,0.5,1") from error
    first, *others = [sections_text(parse_sections(text)) for text in sections.split(",")]
    points = [Point(first, span) for span in spans]
    for text in filter(None, windows.split(",")):
        window, _, span = text.partition("@")
        try:
            points.append(Point(first, float(span), cast("Window", window)))
        except ValueError as error:
            raise UserError("--windows", text, "is no window", "write right@0.5") from error
    for point in points:
        check_lead_span(point.lead_span, point.window)
    points += [Point(name, 1.0) for name in others]
    if has_controls:
        points += [Point(one.sections, one.lead_span, one.window, True) for one in points if one.lead_span < 1]
    return points


def sweep(
    student: str,
    teacher: str | None,
    recipe: DistillRecipe,
    points: Sequence[Point],
    folder: Path,
    judge: Callable[[Path], Mapping[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Make every point's student under `folder`; a row per point, also in `sweep.json`, `sweep.md` and `sweep.png`.

    `judge` adds figures of a finished student's directory, as accuracy through a served endpoint; they are kept.
    """
    rows = []
    for number, point in enumerate(points, start=1):
        print_status(f"point {number} of {len(points)}: {point.name}")
        directory = distill(student, teacher, point.apply(recipe), folder / point.name, recipe_name=point.name)
        manifest = read_manifest(directory)
        assert manifest is not None
        detail = next(step.detail for step in manifest.steps if step.name == "distill")
        rows.append({**asdict(point), "name": point.name, **_row(detail), **_judged(directory, folder, judge)})
        document = {"command": "distill sweep", **provenance(), "student": student, "teacher": teacher, "points": rows}
        write_atomically(folder / "sweep.json", json.dumps(document, indent=2) + "\n")
    write_atomically(folder / "sweep.md", markdown(rows))
    plot(rows, folder / "sweep.png")
    return rows


def _row(detail: Mapping[str, Any]) -> dict[str, Any]:
    """Costs, and the validation of the kept step with that before any."""
    history = detail["validation"]
    kept = next((row for row in history if row["step"] == detail["kept_step"]), history[-1] if history else {})
    figures = {name: value for name, value in kept.items() if name not in {"step", "tokens_read", "train_s"}}
    return {
        **{name: detail[name] for name in ("steps", "tokens_read", "targets", "train_s", "flops", "peak_bytes")},
        "validation": figures,
        "validation_before": {name: history[0][name] for name in figures} if history else {},
    }


def _judged(
    directory: Path, folder: Path, judge: Callable[[Path], Mapping[str, float]] | None
) -> dict[str, dict[str, float]]:
    if judge is None:
        return {}
    file = folder / f"{directory.name}.judged.json"
    if not file.is_file():
        write_atomically(file, json.dumps(dict(judge(directory))))
    return {"judged": json.loads(file.read_text(encoding="utf-8"))}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of all points."""
    figures = list(dict.fromkeys(name for row in rows for name in (*row["validation"], *row.get("judged", {}))))
    head = ["sections", "window", "span", "steps", "tokens", "minutes", "peak GiB", "TFLOP", *figures]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        known = {**row["validation"], **row.get("judged", {})}
        cells = [
            row["sections"],
            row["window"] + (", as many tokens" if row["is_control"] else ""),
            f"{row['lead_span']:g}",
            str(row["steps"]),
            f"{row['tokens_read']:,}",
            f"{row['train_s'] / 60:.1f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
            f"{row['flops'] / 1e12:.0f}",
            *(f"{known[name]:.4g}" if name in known else "" for name in figures),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Quality and costs over the lead span; costs as shares of the whole sequences'."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    first = rows[0]["sections"]
    quality = [name for name in ("cross_entropy", "divergence") if name in rows[0]["validation"]]
    quality += list(rows[0].get("judged", {}))
    costs = {"train_s": "time", "peak_bytes": "memory", "flops": "FLOPs"}
    figure, axes = pyplot.subplots(1, len(quality) + 1, figsize=(4.2 * (len(quality) + 1), 3.6), layout="constrained")
    markers = {("left", False): ("o", "left"), ("left", True): ("s", "left, as many tokens")}
    markers |= {("right", False): ("^", "right"), ("right", True): ("v", "right, as many tokens")}
    markers |= {("middle", False): ("D", "middle"), ("middle", True): ("d", "middle, as many tokens")}
    for axis, name in zip(axes, quality, strict=False):
        for (window, is_control), (marker, label) in markers.items():
            chosen = [
                row
                for row in rows
                if (row["sections"], row["window"], row["is_control"]) == (first, window, is_control)
            ]
            values = [{**row["validation"], **row.get("judged", {})}.get(name) for row in chosen]
            if chosen:
                spans = [row["lead_span"] for row in chosen]
                axis.plot(spans, values, marker=marker, label=label, linestyle="-" if window == "left" else "")
        axis.set(xlabel="lead span (share of each sequence)", title=_title(name))
    whole = next((row for row in rows if row["lead_span"] == 1 and not row["is_control"]), rows[0])
    for key, label in costs.items():
        chosen = [row for row in rows if row["window"] == "left" and not row["is_control"] and row["sections"] == first]
        axes[-1].plot(
            [row["lead_span"] for row in chosen], [row[key] / whole[key] for row in chosen], marker="o", label=label
        )
    axes[-1].set(xlabel="lead span (share of each sequence)", title="cost over that of whole sequences", ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    partial = file.with_name(f".{file.name}")
    figure.savefig(partial, dpi=140, format=file.suffix.removeprefix("."))
    partial.replace(file)
    pyplot.close(figure)


def _title(name: str) -> str:
    return {"cross_entropy": "cross-entropy, nats/token", "divergence": "divergence to the teacher, nats/token"}.get(
        name, name.replace("_", " ")
    )
