"""`kind = "rank"`: items of a query in the order of their relevance.

A row is a query with its items and grades, or a query with one item and its grade; rows of the second form with one
query make one list. `qrels` reads judged documents as TREC and BEIR write them instead. The score of an item is the
probability of a label after it, or the probability of the item's text itself (`scoring = "likelihood"`).
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from pydantic import Field

from slimserve.core.errors import UserError
from slimserve.core.text import BadLine, parse_json, read_text, scan_fields, split_lines
from slimserve.workloads import metrics
from slimserve.workloads.baselines import ranking_baselines
from slimserve.workloads.interface import (
    SCORING_VIEW,
    Answer,
    ChoicePrompt,
    Interaction,
    LaunchProfile,
    MetricData,
    Prompt,
    ReportView,
    ScoringPrompt,
    hash_number,
)
from slimserve.workloads.kinds.base import (
    FileSpec,
    FileWorkload,
    UnusableRowError,
    column,
    fill,
    number_of,
    text_column,
)
from slimserve.workloads.kinds.rows import Row, Table, Unusable, read_file

METRICS = ("within_group_auc", "auc", "ndcg_at_10", "map", "mrr", "brier")


class RankSpec(FileSpec):
    """Keys of a workload file with `kind = "rank"`."""

    kind: Literal["rank"]
    query: str = Field("{query}", description="Template of the text before every item, with columns in braces.")
    item: str = Field("{item}", description="Template of an item's text; `{item}` is the item itself.")
    items: str = Field("items", description="Column of a row's items: a list of texts or of objects.")
    item_id: str | None = Field(None, description="Column of an item's id in catalogues; needs items that are objects.")
    line_ids: str | None = Field(None, description="Column with the id of the item on each line of the query.")
    grades: str = Field("grades", description="Column of the items' grades: numbers, relevant above `relevant_above`.")
    grade: str = Field("grade", description="Column of the grade, if each row has one item.")
    relevant_above: float = Field(0.0, description="Grades above this are relevant; 0.5 suits soft labels.")
    max_grade: float | None = Field(
        None, gt=0, description="Grade of a certain item; students then learn grade / max_grade as a soft label."
    )
    scoring: Literal["labels", "likelihood"] = Field(
        "labels", description="Score an item by a label's probability after it, or by the likelihood of its own text."
    )
    labels: list[str] = Field(
        [" yes", " no"], min_length=2, max_length=2, description="Labels; the score is the first one's probability."
    )
    qrels: str | None = Field(None, description="Judgements as TREC or BEIR write them, in place of `data`.")
    queries: str | None = Field(None, description="Queries of the judgements: JSONL or TSV with an id and a text.")
    corpus: str | None = Field(None, description="Documents of the judgements: JSONL or TSV with an id and a text.")
    num_negatives: int = Field(0, ge=0, description="Number of random documents that are added to each judged list.")


class CandidateLists(FileWorkload):
    """Base class of workloads with candidate lists: their metrics and how the report shows them."""

    default_metric: ClassVar[str] = "within_group_auc"
    default_profile: ClassVar[LaunchProfile] = "prefill"
    metric_names: ClassVar[tuple[str, ...]] = METRICS
    view: ClassVar[ReportView] = SCORING_VIEW

    def question(self, prompt: Prompt) -> str:
        """Return the query with its items."""
        one = cast("ScoringPrompt | ChoicePrompt", prompt)
        return "\n".join((one.query, *(one.items if isinstance(one, ScoringPrompt) else one.choices)))

    def metric_data(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, MetricData]:
        """Return the ranking metrics, grouped by user or query."""
        lists = cast("Sequence[ScoringPrompt | ChoicePrompt]", prompts)
        given = cast("Sequence[Sequence[float]]", answers)
        scores = [
            row if isinstance(prompt, ScoringPrompt) else prompt.probabilities(row)
            for prompt, row in zip(lists, given, strict=True)
        ]
        return metrics.ranking_metrics([one.gains for one in lists], scores, [one.group for one in lists])


class Rank(CandidateLists):
    """Candidate lists with grades."""

    spec: ClassVar[RankSpec]

    def read_rows(self) -> Table:
        """Return one row per list: read from `qrels`, or from `data` with single items joined by their query."""
        if self.spec.qrels is not None:
            return _judged_lists(self.spec, self.folder)
        table = super().read_rows()
        single = [row for row in table.rows if self.spec.items not in row.values and self.spec.grade in row.values]
        if single:
            table.rows = [row for row in table.rows if row not in single] + list(self._joined(single, table))
        return table

    def further_files(self) -> list[str]:
        """Return the files of judged documents."""
        return [name for name in (self.spec.qrels, self.spec.queries, self.spec.corpus) if name]

    def make_prompt(self, row: Row, group: int) -> Prompt:
        """Return the list of a row; UnusableRowError names what is wrong with it."""
        items = _list_in(row, self.spec.items)
        grades = tuple(number_of(grade, self.spec.grades) for grade in _list_in(row, self.spec.grades))
        if len(items) != len(grades):
            raise UnusableRowError(f"has {len(items)} items and {len(grades)} grades")
        if not items:
            raise UnusableRowError("has no items")
        query, texts = fill(self.spec.query, row), tuple(self._item_text(row, item) for item in items)
        if self.spec.scoring == "likelihood":
            if len(set(texts)) < len(texts):
                raise UnusableRowError("has the same item twice")
            return ChoicePrompt(query, texts, tuple(self._above(grade) for grade in grades), group)
        truth = tuple(grade > self.spec.relevant_above for grade in grades)
        gains = tuple(self._above(grade) for grade in grades)
        ids = tuple(self._item_id(row, item) for item in items) if self.spec.item_id else ()
        line_ids = tuple(map(str, _list_in(row, self.spec.line_ids))) if self.spec.line_ids else ()
        labels, soft = tuple(self.spec.labels), self._soft(grades)
        prompt = ScoringPrompt(query, texts, labels, truth, group, gains, soft, ids, line_ids)
        if line_ids and len(line_ids) != len(prompt.lines):
            raise UnusableRowError(f"has {len(line_ids)} ids for the {len(prompt.lines)} lines of its query")
        return prompt

    def item_texts(self) -> dict[str, str]:
        """Return the text of each item that has an id, without the colon that ends it."""
        lists = [one for rows in self.splits.rows.values() for one in rows if isinstance(one, ScoringPrompt)]
        pairs = ((item, text) for one in lists for item, text in zip(one.item_ids, one.items, strict=False))
        return {item: text.removesuffix(":") for item, text in pairs}

    def interactions(self) -> list[Interaction]:
        """Return the items of the calibration split with an id, and whether they are relevant."""
        lists = [one for one in self.splits.rows["calibration"] if isinstance(one, ScoringPrompt)]
        return [
            Interaction(one.group, item, is_relevant)
            for one in lists
            for item, is_relevant in zip(one.item_ids, one.truth, strict=False)
        ]

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, list[Answer]]:
        """Return baselines from the query's own labels and from the items' popularity in the calibration split."""
        lists = [one for one in prompts if isinstance(one, ScoringPrompt)]
        if len(lists) < len(prompts):
            return {}
        known = cast("list[ScoringPrompt]", self.splits.rows["calibration"])
        training = [pair for one in known for pair in zip(one.items, one.truth, strict=True)]
        groups = [one.group for one in known for _ in one.items]
        return ranking_baselines(lists, training, groups)

    def _above(self, grade: float) -> float:
        """Return the gain of a grade: 0 if it is not relevant."""
        return grade if grade > self.spec.relevant_above else 0.0

    def _soft(self, grades: Sequence[float]) -> tuple[float, ...]:
        """Return the soft labels of grades, or none; UnusableRowError names a grade that is no share of max_grade."""
        if self.spec.max_grade is None:
            return ()
        if unusable := [grade for grade in grades if not 0 <= grade <= self.spec.max_grade]:
            raise UnusableRowError(f"has the grade {unusable[0]:g}, which is not between 0 and max_grade")
        return tuple(grade / self.spec.max_grade for grade in grades)

    def _item_text(self, row: Row, item: Any) -> str:
        if isinstance(item, dict):
            return fill(self.spec.item, Row(row.place, {**row.values, **item}))
        if isinstance(item, bool) or not isinstance(item, (str, int, float)):
            raise UnusableRowError(f"has an item that is a {type(item).__name__}, not a text")
        return fill(self.spec.item, row, {"item": str(item)})

    def _item_id(self, row: Row, item: Any) -> str:
        assert self.spec.item_id is not None
        # Not the row's own columns: a list's items would all get one id.
        values = item if isinstance(item, dict) else {"item": item}
        return text_column(Row(row.place, values), self.spec.item_id)

    def _joined(self, rows: Sequence[Row], table: Table) -> Iterator[Row]:
        """Yield one row for all rows with the same query and group."""
        lists: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in rows:
            try:
                key = fill(self.spec.query, row), text_column(row, self.spec.group) if self.spec.group else ""
            except UnusableRowError as error:
                table.unusable.append(Unusable(row.place, str(error)))
                continue
            lists[key].append(row)
        for members in lists.values():
            first = members[0]
            values = {
                **first.values,
                self.spec.items: [dict(row.values) for row in members],
                self.spec.grades: [row.values[self.spec.grade] for row in members],
            }
            yield Row(first.place, values)


def _list_in(row: Row, name: str) -> list[Any]:
    """Return the list in a column; a text is read as JSON, as CSV has no lists."""
    value = column(row, name)
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise UnusableRowError(f"has no list in the column {name} ({error})") from error
    if not isinstance(value, (list, tuple)):
        raise UnusableRowError(f"has no list in the column {name}")
    return list(value)


def _judged_lists(spec: RankSpec, folder: Path) -> Table:
    """Return one row per query with its judged documents, and random documents that nobody judged as negatives."""
    if spec.queries is None or spec.corpus is None or spec.qrels is None:
        raise UserError("qrels", spec.qrels, "needs `queries` and `corpus` beside it", "name the files with the texts")
    table = Table()
    queries, corpus = (_texts_by_id(folder / name, table) for name in (spec.queries, spec.corpus))
    documents = list(corpus)
    judged: dict[str, dict[str, float]] = defaultdict(dict)
    first_places: dict[str, str] = {}
    for place, query, document, grade in _judgements(folder / spec.qrels, table):
        if query not in queries or document not in corpus:
            missing = f"query {query!r}" if query not in queries else f"document {document!r}"
            file = Path(spec.queries if query not in queries else spec.corpus).name
            table.unusable.append(Unusable(place, f"names the {missing}, which has no text in {file}"))
            continue
        judged[query][document] = grade
        first_places.setdefault(query, place)
    for query, grades in judged.items():
        draw = random.Random(hash_number(query))
        others = draw.sample(documents, min(len(documents), spec.num_negatives + len(grades)))
        chosen = [*grades, *[one for one in others if one not in grades][: spec.num_negatives]]
        draw.shuffle(chosen)
        values = {
            "query_id": query,
            "query": queries[query],
            spec.items: [corpus[document] for document in chosen],
            spec.grades: [grades.get(document, 0.0) for document in chosen],
        }
        table.rows.append(Row(first_places[query], values))
    return table


def _judgements(file: Path, table: Table) -> Iterator[tuple[str, str, str, float]]:
    """Yield place, query id, document id and grade of TREC (four columns) or BEIR judgements (three, with a header)."""
    lines = split_lines(read_text(file, "qrels", "give a TREC or BEIR file in UTF-8"))
    for number, line in enumerate(lines, start=1):
        parts = line.split()
        if not parts or (number == 1 and parts[-1] in {"score", "rel", "relevance"}):
            continue
        place = f"{file.name}:{number}"
        try:
            grade = float(parts[-1])
        except ValueError:
            grade = math.nan
        if len(parts) not in {3, 4} or not math.isfinite(grade):
            table.unusable.append(Unusable(place, "is not `query document grade` or `query 0 document grade`"))
        else:
            yield place, parts[0], parts[-2], grade


def _texts_by_id(file: Path, table: Table) -> dict[str, str]:
    """Return texts by id: JSONL with `_id` or `id`, `text` and an optional `title`, or a TSV of id and text.

    Lines without an id are added to the unusable ones of `table`.
    """
    found = {}
    if file.suffix.lower() == ".jsonl":
        part = read_file(file)
        table.unusable += part.unusable
        for row in part.rows:
            identifier = row.values.get("_id", row.values.get("id"))
            text = " ".join(str(row.values[name]) for name in ("title", "text") if row.values.get(name))
            if identifier is None:
                table.unusable.append(Unusable(row.place, "has no column _id or id"))
            elif text:
                found[str(identifier)] = text
        return found
    rows = scan_fields(file, "queries or corpus", "give a JSONL or TSV file", delimiter="\t", is_quoted=False)
    for number, fields in rows:
        if isinstance(fields, BadLine) or len(fields) < 2:
            table.unusable.append(Unusable(f"{file.name}:{number}", "is not an id and a text with a tab between"))
        else:
            found[fields[0]] = fields[1]
    return found
