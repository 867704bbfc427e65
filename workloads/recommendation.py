"""Recommendation: a member's long rating history, then candidates to be ranked by P(label).

The history is the shared prefix, one line per film in the order of time; a candidate is
the short suffix `Title (year):`, and its score the probability of " yes" against " no":

    Toy Story (1995): yes
    GoldenEye (1995): no
    Four Rooms (1995):          <- candidate

Data: MovieLens-100K as RecBole atomic files, read by path from the installed `recbole`
package (its terms forbid redistribution, so it is never copied), or any directory with
one `.inter` file (user_id, item_id, rating, timestamp) and one `.item` file (item_id,
a title, and optionally release_year). "yes" means a rating of at least 4.

Members are divided over the splits by a hash of their id, so no member's taste leaks
from calibration into quality. Within a member the cut is by time: candidates are the
films that were rated right after the history. Windows of a member do not overlap.
"""

from __future__ import annotations

import csv
import importlib.util
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from slimserve.core.errors import UserError
from slimserve.workloads import metrics
from slimserve.workloads.interface import Answer, Estimate, Prompt, ScoringPrompt, Split, hash_number, split_of

LABELS = (" yes", " no")
_LIKED_FROM = 4.0


@dataclass(frozen=True)
class Rating:
    """One line of a member's history."""

    title: str
    rating: float
    timestamp: float

    @property
    def liked(self) -> bool:
        return self.rating >= _LIKED_FROM


@dataclass(frozen=True)
class Recommendation:
    """Slates of `num_candidates` films behind a history of `history_len` films."""

    data: Path | None = None
    """Directory of atomic files; None: MovieLens-100K of the installed recbole package."""
    history_len: int = 24
    num_candidates: int = 16
    is_latest_only: bool = False
    """Each member's most recent films alone, so that no member counts more than another."""
    name: str = "recommendation"
    primary_metric: str = "auc"

    def make_prompts(self, split: Split, num_prompts: int, seed: int = 0) -> list[Prompt]:
        """Slates of members of `split`, shuffled by `seed`; raises UserError where the data cannot be read."""
        slates: list[Prompt] = []
        span = self.history_len + self.num_candidates
        for member, ratings in load_ratings(self.data or movielens_directory()).items():
            if split_of(member) != split:
                continue
            last = len(ratings) - span
            for start in range(max(0, last) if self.is_latest_only else 0, last + 1, span):
                history = ratings[start : start + self.history_len]
                candidates = ratings[start + self.history_len : start + span]
                slates.append(_slate(member, history, candidates))
        random.Random(seed).shuffle(slates)
        return slates[:num_prompts]

    def evaluate(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, Estimate]:
        """Pooled and within-slate AUC, NDCG@10 and calibration error, intervals by member.

        Part of the pooled AUC is that some members say yes more often than others;
        `within_user_auc` is the mean over slates, which only ranking can raise.
        """
        slates = cast("Sequence[ScoringPrompt]", prompts)
        scores = cast("Sequence[Sequence[float]]", answers)
        figures = metrics.ranking_metrics([slate.truth for slate in slates], scores, [slate.group for slate in slates])
        return {name: metrics.estimate(figure) for name, figure in figures.items()}


def label_prompts(prompt: ScoringPrompt, first: int = 0) -> list[ScoringPrompt]:
    """Every label of a solved prompt, from the `first`-th on, as the one candidate behind all that comes before it.

    A server that scores these answers what training on the whole sequence asks of a model in one pass.
    """
    found: list[ScoringPrompt] = []
    query = ""
    for line in prompt.solved.splitlines(keepends=True):
        label = next(label for label in prompt.labels if line.endswith(f"{label}\n"))
        item = line.removesuffix(f"{label}\n")
        found.append(ScoringPrompt(query, (item,), prompt.labels, (label == prompt.labels[0],), prompt.group))
        query += line
    return found[first:]


def movielens_directory() -> Path:
    """Where the installed recbole package keeps MovieLens-100K; recbole itself is not imported."""
    spec = importlib.util.find_spec("recbole")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "recommendation data", "ml-100k", "is not installed", "run: pip install --no-deps recbole==1.2.1"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "dataset_example" / "ml-100k"


def load_ratings(directory: Path) -> dict[str, list[Rating]]:
    """Ratings by member id, each member's in the order of time (ties by item id), from atomic files."""
    titles = {row["item_id"]: _title(row) for row in _read_atomic(directory, ".item")}
    dated: dict[str, list[tuple[float, str, Rating]]] = {}
    for row in _read_atomic(directory, ".inter"):
        item = row["item_id"]
        if item in titles:
            rating = Rating(titles[item], float(row["rating"]), float(row["timestamp"]))
            dated.setdefault(row["user_id"], []).append((rating.timestamp, item, rating))
    return {member: [rating for *_, rating in sorted(rows, key=lambda row: row[:2])] for member, rows in dated.items()}


def _read_atomic(directory: Path, suffix: str) -> list[dict[str, str]]:
    files = sorted(directory.glob(f"*{suffix}"))
    if not files:
        raise UserError("recommendation data", directory, f"has no {suffix} file", "give a directory of atomic files")
    with files[0].open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        names = [name.split(":")[0] for name in next(rows, [])]
        needed = {"item_id"} if suffix == ".item" else {"user_id", "item_id", "rating", "timestamp"}
        if not needed <= set(names):
            lacking = ", ".join(sorted(needed - set(names)))
            raise UserError("recommendation data", files[0], f"lacks the column {lacking}", "add it to the header")
        return [dict(zip(names, row, strict=False)) for row in rows]


def _title(row: dict[str, str]) -> str:
    title = next((row[key] for key in ("movie_title", "title", "name") if row.get(key)), row["item_id"])
    year = row.get("release_year", "")
    return f"{title} ({year})" if year else title


def _slate(member: str, history: list[Rating], candidates: list[Rating]) -> ScoringPrompt:
    lines = [f"{rating.title}:{LABELS[0] if rating.liked else LABELS[1]}\n" for rating in history]
    return ScoringPrompt(
        query="".join(lines),
        items=tuple(f"{rating.title}:" for rating in candidates),
        labels=LABELS,
        truth=tuple(rating.liked for rating in candidates),
        group=hash_number(member),
    )
