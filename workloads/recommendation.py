"""Recommendation: a user's rating history, then candidate items to be ranked by the probability of a label.

The history is the shared prefix, one line per film in the order of time, with the share of users who liked the film. A
candidate is the short suffix up to the colon, and its score is the probability of " yes" against " no"::

    Toy Story (1995), liked by 71%: yes
    GoldenEye (1995), liked by 43%: no
    Four Rooms (1995), liked by 46%:          <- candidate

The share is that of the calibration split's users, without the user who is asked about; a film that none of them rated
has none. A title alone says too little: by titles, SmolLM2-135M ranks a user's films no better than chance.

The data is MovieLens-100K as RecBole atomic files, read by path from the installed `recbole` package because its terms
forbid redistribution. Any directory works that has one `.inter` file (user_id, item_id, rating, timestamp) and one
`.item` file (item_id, a title, optionally release_year). A rating of at least 4 counts as "yes".

Items have ids. A model with item tokens reads `<|item_7|> yes` in place of a line whose item its
catalogue has (core/catalogue.py).

Users are assigned to splits by a hash of their id, so no user's taste leaks from calibration into quality. Within a
user the cut is by time: candidates are the items that were rated right after the history. A user's windows do not
overlap.
"""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, cast

from slimserve.core.errors import UserError
from slimserve.core.progress import print_once
from slimserve.core.text import read_table, split_lines
from slimserve.workloads import metrics
from slimserve.workloads.baselines import history_baselines
from slimserve.workloads.interface import (
    SCORING_VIEW,
    Answer,
    Interaction,
    LaunchProfile,
    LoadOptions,
    MetricData,
    Prompt,
    ReportView,
    ScoringPrompt,
    SizeDistribution,
    Split,
    Workload,
    hash_number,
    split_of,
)

ItemText = Literal["title", "genres", "share"]
LABELS = (" yes", " no")
_LIKED_FROM = 4.0
_PSEUDO_COUNTS = 5
"""Weight of the overall share of liked items in the share of one item, in ratings."""
_HELD_OUT_OF = 10
"""One of this many items is held out."""
_DATA = "recommendation data"


@dataclass(frozen=True)
class Rating:
    """One line of a user's history."""

    title: str
    rating: float
    timestamp: float
    item: str
    """Id of the item."""
    genres: str = ""

    @property
    def liked(self) -> bool:
        return self.rating >= _LIKED_FROM


@dataclass(frozen=True)
class Recommendation(Workload):
    """Candidate lists of `num_candidates` items after a history of `history_len` items."""

    data: Path | None = None
    """Directory of atomic files; None selects MovieLens-100K of the installed recbole package."""
    history_len: int = 24
    num_candidates: int = 16
    is_latest_only: bool = False
    """Use only the most recent items of each user, so that no user counts more than another."""
    item_text: ItemText = "share"
    """Text of an item: its title and year, and with `genres` or `share` also its genres or the share of users who liked
    it."""
    holds_out_items: bool = False
    """Leave every tenth item, chosen by a hash of its id, out of the calibration split."""

    name: ClassVar[str] = "recommendation"
    primary_metric: ClassVar[str] = "auc"
    launch_profile: ClassVar[LaunchProfile] = "prefill"
    preset_prompts: ClassVar[Mapping[str, int]] = {"quick": 128, "full": 256}
    view: ClassVar[ReportView] = SCORING_VIEW

    def make_prompts(self, split: Split, num_prompts: int, seed: int = 0) -> list[Prompt]:
        """Return candidate lists of the split's users, shuffled by `seed`; UserError if the data cannot be read.

        For quality, every user's first list comes before any user's second one, so that users with long histories do
        not count more than others while there are others.
        """
        return self._prompts(split, num_prompts, seed, is_by_user=split == "quality")

    def score_calibration_prompts(self, num_prompts: int, seed: int = 0) -> list[Prompt]:
        """Return lists of the calibration split's users, every user's first one before any second one.

        Users say yes less often in later lists, so that lists in another order would have another share of yes.
        """
        return self._prompts("calibration", num_prompts, seed, is_by_user=True)

    def _prompts(self, split: Split, num_prompts: int, seed: int, *, is_by_user: bool) -> list[Prompt]:
        drawn: list[tuple[int, Prompt]] = []
        span = self.history_len + self.num_candidates
        of_users = self._ratings()
        texts = _ItemTexts(self.item_text, of_users)
        for user, ratings in of_users.items():
            if split_of(user) != split:
                continue
            last = len(ratings) - span
            for number, start in enumerate(range(max(0, last) if self.is_latest_only else 0, last + 1, span)):
                history = ratings[start : start + self.history_len]
                candidates = ratings[start + self.history_len : start + span]
                drawn.append((number, _scoring_prompt(user, history, candidates, texts)))
        random.Random(seed).shuffle(drawn)
        if is_by_user:
            drawn.sort(key=lambda one: one[0])
        return [prompt for _, prompt in drawn[:num_prompts]]

    def metric_data(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, MetricData]:
        """Return pooled and within-user AUC, NDCG@10 and calibration error, grouped by user.

        Pooled AUC also rises because some users say yes more often than others. `within_group_auc` is the mean over
        candidate lists, which only ranking can raise.
        """
        lists = cast("Sequence[ScoringPrompt]", prompts)
        scores = cast("Sequence[Sequence[float]]", answers)
        return metrics.ranking_metrics([one.gains for one in lists], scores, [one.group for one in lists])

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, list[Answer]]:
        """Return the share of "yes" in the history, the popularity of the items in the calibration split, and both.

        `matrix_factorization` adds what the history says of the user's taste, by factors of the calibration split.
        """
        return history_baselines(cast("Sequence[ScoringPrompt]", prompts), self.interactions())

    def item_texts(self) -> dict[str, str]:
        """Return the title of each item that was rated, with its year and, if `item_text` says so, its genres."""
        ratings = self._ratings()
        texts = _ItemTexts("genres" if self.item_text == "genres" else "title", ratings)
        return {one.item: texts.text(one).removesuffix(":") for rows in ratings.values() for one in rows}

    def interactions(self) -> list[Interaction]:
        """Return what the users of the calibration split liked and did not like."""
        return [
            Interaction(hash_number(user), one.item, one.liked)
            for user, rows in self._ratings().items()
            if split_of(user) == "calibration"
            for one in rows
        ]

    def _ratings(self) -> dict[str, list[Rating]]:
        """Return the ratings of each user, without those that are held out."""
        of_users = load_ratings(self.data or movielens_directory())
        if not self.holds_out_items:
            return of_users
        return {
            user: [one for one in rows if split_of(user) != "calibration" or not is_held_out(one.item)]
            for user, rows in of_users.items()
        }

    def load_prompts(self, options: LoadOptions, num_prompts: int) -> list[Prompt]:
        """Return candidate lists with histories and candidates of drawn lengths; a repeat visit reuses a history."""
        # The text seeds the draws, so a different text would change every recorded load test.
        numbers = random.Random(f"slates {options.prompt_seed}")
        history = SizeDistribution("--history", options.history)
        candidates = SizeDistribution("--candidates", options.candidates)
        source = replace(
            self,
            data=Path(options.data) if options.data else self.data,
            history_len=history.largest,
            num_candidates=candidates.largest,
        )
        drawn = cast("list[ScoringPrompt]", source.make_prompts("load", num_prompts, options.prompt_seed))
        if not drawn:
            remedy = "ask for shorter histories or fewer candidates"
            raise UserError("--history", options.history, "is longer than the history of every user", remedy)
        prompts: list[Prompt] = []
        of_user: dict[int, list[ScoringPrompt]] = {}
        for prompt in drawn:
            length, count = history.draw(numbers), candidates.draw(numbers)
            cut = replace(
                prompt.with_candidates(range(min(count, len(prompt.items)))),
                query="".join(prompt.lines[-length:]),
                line_ids=prompt.line_ids[-length:],
            )
            earlier = of_user.setdefault(prompt.group, [])
            if earlier and numbers.random() < options.repeat_visits:
                chosen = numbers.choice(earlier)
                cut = replace(cut, query=chosen.query, line_ids=chosen.line_ids)
            earlier.append(cut)
            prompts.append(cut)
        return prompts


def label_prompts(prompt: ScoringPrompt, first: int = 0) -> list[ScoringPrompt]:
    """Split a solved prompt into one prompt per label, from the `first`-th label on.

    A server that scores these prompts answers the same questions that training on the full sequence asks in one pass.
    """
    prompts: list[ScoringPrompt] = []
    ids, query = (*prompt.line_ids, *prompt.item_ids), ""
    for number, line in enumerate(split_lines(prompt.solved, keepends=True)):
        label = next(label for label in prompt.labels if line.endswith(f"{label}\n"))
        item, truth = line.removesuffix(f"{label}\n"), (label == prompt.labels[0],)
        own, before = ids[number : number + 1], ids[:number]
        one = ScoringPrompt(query, (item,), prompt.labels, truth, prompt.group, item_ids=own, line_ids=before)
        prompts.append(one)
        query += line
    return prompts[first:]


def movielens_directory() -> Path:
    """Return the directory of MovieLens-100K in the installed recbole package, which is not imported."""
    spec = importlib.util.find_spec("recbole")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(_DATA, "ml-100k", "is not installed", "run: pip install --no-deps recbole==1.2.1")
    return Path(next(iter(spec.submodule_search_locations))) / "dataset_example" / "ml-100k"


def load_ratings(directory: Path) -> dict[str, list[Rating]]:
    """Read the ratings of each user id from atomic files, in the order of time; ties are ordered by item id.

    UserError names the file and the line of a record that lacks a field or whose rating or time is not a number.
    """
    items = {
        row["item_id"]: (_title(row), row.get("class", "")) for _, row in _read_atomic(directory, ".item", ("item_id",))
    }
    dated: dict[str, list[tuple[float, str, Rating]]] = {}
    num_untitled = 0
    for place, row in _read_atomic(directory, ".inter", ("user_id", "item_id", "rating", "timestamp")):
        rating, timestamp = (_number(row, name, place) for name in ("rating", "timestamp"))
        item = row["item_id"]
        if item not in items:
            num_untitled += 1
        else:
            title, genres = items[item]
            one = Rating(title, rating, timestamp, item, genres)
            dated.setdefault(row["user_id"], []).append((timestamp, item, one))
    if num_untitled:
        print_once(f"{directory}: {num_untitled} ratings are not used, as the .item file lacks their items")
    return {user: [rating for *_, rating in sorted(rows, key=lambda row: row[:2])] for user, rows in dated.items()}


def _read_atomic(directory: Path, suffix: str, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place and the fields of each record; the header gives a type after each column's name."""
    files = sorted(directory.glob(f"*{suffix}"))
    if not files:
        raise UserError(_DATA, directory, f"has no {suffix} file", "give a directory of atomic files")
    remedy = "give each line as many tab-separated fields as the header has"
    options = {"delimiter": "\t", "is_quoted": False, "needed": needed, "column_of": lambda name: name.split(":")[0]}
    for number, row in read_table(files[0], _DATA, remedy, **options):
        yield f"{files[0]}:{number}", row


def _number(row: Mapping[str, str], column: str, place: str) -> float:
    try:
        number = float(row[column])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        problem = f"has {row[column][:40]!r} in the column {column}, not a number"
        raise UserError(_DATA, place, problem, "write ratings as numbers and times as seconds")
    return number


def _title(row: dict[str, str]) -> str:
    title = next((row[key] for key in ("movie_title", "title", "name") if row.get(key)), row["item_id"])
    year = row.get("release_year", "")
    return f"{title} ({year})" if year else title


def is_held_out(item: str) -> bool:
    """Tell whether `holds_out_items` leaves an item out of the calibration split."""
    return hash_number(f"item {item}") % _HELD_OUT_OF == 0


class _ItemTexts:
    """The text of each item, with the share of the calibration split's users who liked it if that is wanted."""

    def __init__(self, item_text: ItemText, of_users: Mapping[str, Sequence[Rating]]) -> None:
        self._item_text = item_text
        self._counts: dict[str, list[int]] = {}
        for user, ratings in of_users.items():
            if split_of(user) == "calibration":
                for rating in ratings:
                    counts = self._counts.setdefault(rating.title, [0, 0])
                    counts[0] += rating.liked
                    counts[1] += 1
        liked, total = (sum(counts[at] for counts in self._counts.values()) for at in (0, 1))
        self._rate = liked / total if total else 0.5

    def text(self, rating: Rating, is_counted: bool = False) -> str:
        """Return the text of an item up to its label; `is_counted` if this rating is one of those counted."""
        if self._item_text == "genres" and rating.genres:
            return f"{rating.title}, {', '.join(rating.genres.split()).lower()}:"
        if self._item_text != "share":
            return f"{rating.title}:"
        liked, total = self._counts.get(rating.title, (0, 0))
        if is_counted:
            liked, total = liked - rating.liked, total - 1
        if not total:
            return f"{rating.title}:"
        share = (liked + _PSEUDO_COUNTS * self._rate) / (total + _PSEUDO_COUNTS)
        return f"{rating.title}, liked by {share:.0%}:"


def _scoring_prompt(
    user: str, history: Sequence[Rating], candidates: Sequence[Rating], texts: _ItemTexts
) -> ScoringPrompt:
    is_counted = split_of(user) == "calibration"
    lines = [f"{texts.text(rating, is_counted)}{LABELS[0] if rating.liked else LABELS[1]}\n" for rating in history]
    return ScoringPrompt(
        query="".join(lines),
        items=tuple(texts.text(rating, is_counted) for rating in candidates),
        labels=LABELS,
        truth=tuple(rating.liked for rating in candidates),
        group=hash_number(user),
        item_ids=tuple(rating.item for rating in candidates),
        line_ids=tuple(rating.item for rating in history),
    )


WORKLOAD = Recommendation()
