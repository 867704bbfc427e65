"""`kind = "ratings"`: what users thought of items, one rating per row, for rankers that read a user's history.

The ratings of a user, in the order of time, are cut into windows that do not overlap. Each window is one list: the
history, whose lines are items with labels, and then the candidates:

    Toy Story (1995): yes
    GoldenEye (1995): no
    Four Rooms (1995):          <- candidate

Ratings of one user share a split, so that no user's taste leaks from training into quality.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple, cast

from pydantic import Field

from slimserve.core.errors import UserError
from slimserve.workloads.baselines import history_baselines
from slimserve.workloads.interface import (
    Answer,
    Interaction,
    Prompt,
    ScoringPrompt,
)
from slimserve.workloads.kinds.base import (
    FileSpec,
    UnusableRowError,
    column,
    fill,
    number_of,
    text_column,
)
from slimserve.workloads.kinds.rank import CandidateLists
from slimserve.workloads.kinds.rows import Row, Table, Unusable, read_file

_WINDOW = "window"
"""Column of a joined row with the ratings of one window."""


class RatingsSpec(FileSpec):
    """Keys of a workload file with `kind = "ratings"`."""

    kind: Literal["ratings"]
    group: str = Field("user", description="Column of the user.")
    item: str = Field("item", description="Column of the item's id.")
    rating: str = Field("rating", description="Column of the rating, a number.")
    time: str = Field("time", description="Column of the time, a number; an empty name takes the order of the rows.")
    liked_from: float = Field(description="Ratings from this number on have the first label.")
    items: str = Field(description="File of the items, one row each, relative to the workload file.")
    item_id: str = Field("id", description="Column of the id in the file of the items.")
    item_text: str = Field("{text}", description="Template of an item's text, with columns of the file in braces.")
    labels: list[str] = Field(
        [" yes", " no"], min_length=2, max_length=2, description="Labels; the score is the first one's probability."
    )
    history: int = Field(24, ge=1, description="Number of items in the history of a window.")
    candidates: int = Field(16, ge=1, description="Number of candidates in a window.")


class _Rating(NamedTuple):
    item: str
    is_liked: bool


class Ratings(CandidateLists):
    """Candidate lists after the histories of users."""

    spec: ClassVar[RatingsSpec]

    def read_rows(self) -> Table:
        """Return one row per window. The number of rows read is that of the ratings."""
        table = super().read_rows()
        num_read = len(table.rows) + len(table.unusable)
        of_users: dict[str, list[tuple[float, Row, _Rating]]] = defaultdict(list)
        for number, row in enumerate(table.rows):
            try:
                time = _number_in(row, self.spec.time) if self.spec.time else float(number)
                of_users[text_column(row, self.spec.group)].append((time, row, self._rating(row)))
            except UnusableRowError as error:
                table.unusable.append(Unusable(row.place, str(error)))
        windows = (window for rated in of_users.values() for window in self._windows(rated))
        return Table(list(windows), table.unusable, num_read)

    def further_files(self) -> list[str]:
        """Return the file of the items."""
        return [self.spec.items]

    def make_prompt(self, row: Row, group: int) -> Prompt:
        """Return the list of a window."""
        rated = cast("Sequence[_Rating]", row.values[_WINDOW])
        first, second = self.spec.labels
        size = self.spec.history + self.spec.candidates
        num_candidates = max(1, len(rated) * self.spec.candidates // size)
        history, candidates = rated[:-num_candidates], rated[-num_candidates:]
        lines = (f"{self._texts[one.item]}:{first if one.is_liked else second}\n" for one in history)
        return ScoringPrompt(
            query="".join(lines),
            items=tuple(f"{self._texts[one.item]}:" for one in candidates),
            labels=(first, second),
            truth=tuple(one.is_liked for one in candidates),
            group=group,
            item_ids=tuple(one.item for one in candidates),
            line_ids=tuple(one.item for one in history),
        )

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, list[Answer]]:
        """Return the share of the first label in the history, the items' popularity, both, and a factorization."""
        return history_baselines(cast("Sequence[ScoringPrompt]", prompts), self.interactions())

    def item_texts(self) -> dict[str, str]:
        """Return the text of each item."""
        return dict(self._texts)

    def interactions(self) -> list[Interaction]:
        """Return all ratings of the calibration split's users."""
        first = self.spec.labels[0]
        found = []
        for one in cast("Sequence[ScoringPrompt]", self.splits.rows["calibration"]):
            liked = [line.rstrip("\n").endswith(first) for line in one.lines]
            pairs = zip((*one.line_ids, *one.item_ids), (*liked, *one.truth), strict=True)
            found += [Interaction(one.group, item, is_liked) for item, is_liked in pairs]
        return found

    def _windows(self, rated: list[tuple[float, Row, _Rating]]) -> Iterator[Row]:
        """Yield the windows of one user; a last one that is shorter has candidates in the same proportion."""
        rated.sort(key=lambda one: one[0])
        size = self.spec.history + self.spec.candidates
        for begin in range(0, len(rated), size):
            part = rated[begin : begin + size]
            first = part[0][1]
            if len(part) > 1:
                values: Mapping[str, object] = {**first.values, _WINDOW: [one for *_, one in part]}
                yield Row(first.place, values)

    def _rating(self, row: Row) -> _Rating:
        item = text_column(row, self.spec.item)
        if item not in self._texts:
            raise UnusableRowError(f"names the item {item!r}, which has no text in {self.spec.items}")
        return _Rating(item, _number_in(row, self.spec.rating) >= self.spec.liked_from)

    @cached_property
    def _texts(self) -> dict[str, str]:
        """Text of each item by its id; a text is one line. Raises UserError if a row has no id or no text."""
        file = self.folder / self.spec.items
        table, texts = read_file(file), {}
        for row in table.rows:
            try:
                item, text = text_column(row, self.spec.item_id), " ".join(fill(self.spec.item_text, row).split())
            except UnusableRowError as error:
                table.unusable.append(Unusable(row.place, str(error)))
                continue
            if item in texts or not text:
                reason = "has no text" if not text else f"has the id {item!r}, which is on an earlier row too"
                table.unusable.append(Unusable(row.place, reason))
                continue
            texts[item] = text
        if table.unusable:
            first = table.unusable[0]
            raise UserError("items", first.place, first.reason, "give each item one row with an id and a text")
        return texts


def _number_in(row: Row, name: str) -> float:
    return number_of(column(row, name), name)
