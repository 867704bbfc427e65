"""Workload files of ratings: windows against a brute-force reading of the same rows, splits, baselines, bad data."""

import csv
import random
from collections import defaultdict
from pathlib import Path
from typing import cast, get_args

import pytest

from slimserve.core.errors import UserError
from slimserve.workloads.interface import Interaction, ScoringPrompt, Split
from slimserve.workloads.kinds import load_workload_file
from slimserve.workloads.kinds.ratings import Ratings

Rating = tuple[str, str, int, int]
"""User, item, rating from 1 to 5, time."""
KEYS = 'kind = "ratings"\ndata = "ratings.csv"\nitems = "items.jsonl"\nliked_from = 4\n'
HISTORY, CANDIDATES = 6, 4


def random_ratings(num_users: int = 60, num_items: int = 30) -> list[Rating]:
    draw = random.Random(0)
    rows = [
        (f"u{user}", f"i{item}", draw.randint(1, 5), draw.randrange(10**6))
        for user in range(num_users)
        for item in draw.sample(range(num_items), draw.randint(2, 25))
    ]
    draw.shuffle(rows)
    return rows


def write(folder: Path, ratings: list[Rating], keys: str = "", num_items: int = 30) -> Ratings:
    with (folder / "ratings.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("user", "item", "rating", "time"), *ratings])
    texts = [f'{{"id": "i{item}", "text": "Film  {item}"}}\n' for item in range(num_items)]
    (folder / "items.jsonl").write_text("".join(texts))
    file_name = folder / "films.toml"
    file_name.write_text(f"{KEYS}history = {HISTORY}\ncandidates = {CANDIDATES}\n{keys}")
    return cast("Ratings", load_workload_file(file_name))


def all_lists(workload: Ratings) -> list[ScoringPrompt]:
    return [cast("ScoringPrompt", one) for split in get_args(Split) for one in workload.make_prompts(split, 10**6)]


def test_windows_are_those_of_a_brute_force_reading(tmp_path: Path) -> None:
    ratings = random_ratings()
    of_users: dict[str, list[Rating]] = defaultdict(list)
    for rating in sorted(ratings, key=lambda one: one[3]):
        of_users[rating[0]].append(rating)
    wanted = set()
    for rows in of_users.values():
        while len(rows) >= 2:
            window, rows = rows[: HISTORY + CANDIDATES], rows[HISTORY + CANDIDATES :]
            count = max(1, int(len(window) * CANDIDATES / (HISTORY + CANDIDATES)))
            solved = [f"Film {item[1:]}:{' yes' if grade >= 4 else ' no'}\n" for _, item, grade, _ in window]
            wanted.add(("".join(solved), count, tuple(item for _, item, *_ in window)))
    found = [
        (one.solved, len(one.items), (*one.line_ids, *one.item_ids)) for one in all_lists(write(tmp_path, ratings))
    ]
    assert len(found) == len(wanted) > 60
    assert set(found) == wanted


def test_a_user_has_one_split_and_training_knows_no_other_users(tmp_path: Path) -> None:
    ratings = random_ratings()
    workload = write(tmp_path, ratings)
    groups = {split: {one.group for one in workload.make_prompts(split, 10**6)} for split in get_args(Split)}
    assert all(groups.values())
    assert not groups["calibration"] & (groups["quality"] | groups["load"])
    interactions = workload.interactions()
    assert {one.group for one in interactions} == groups["calibration"]
    lists = [one for one in all_lists(workload) if one.group in groups["calibration"]]
    assert len(interactions) == sum(len(one.line_ids) + len(one.item_ids) for one in lists)
    one = lists[0]
    labels = [line.endswith(" yes\n") for line in one.solved.splitlines(keepends=True)]
    expected = [Interaction(one.group, *pair) for pair in zip((*one.line_ids, *one.item_ids), labels, strict=True)]
    assert [found for found in interactions if found.group == one.group][: len(expected)] == expected


def test_baselines_and_metrics_rank_a_world_where_one_item_is_liked_by_all(tmp_path: Path) -> None:
    ratings = [(user, item, 5 if item == "i0" else grade, time) for user, item, grade, time in random_ratings()]
    workload = write(tmp_path, ratings)
    prompts = workload.make_prompts("quality", 10**6)
    baselines = workload.baselines(prompts)
    assert set(baselines) == {"history_share", "item_popularity", "popularity_and_history", "matrix_factorization"}
    lists = cast("list[ScoringPrompt]", prompts)
    popularity = cast("list[tuple[float, ...]]", baselines["item_popularity"])
    pairs = [zip(scores, one.item_ids, strict=True) for one, scores in zip(lists, popularity, strict=True)]
    best = [max(ranked)[1] for one, ranked in zip(lists, pairs, strict=True) if "i0" in one.item_ids]
    assert best
    assert set(best) == {"i0"}
    perfect = [tuple(map(float, one.truth)) for one in lists]
    assert workload.metric_data(prompts, perfect)["within_group_auc"].value == 1.0
    assert workload.item_texts()["i7"] == "Film 7"


def test_without_times_the_order_is_that_of_the_rows(tmp_path: Path) -> None:
    ratings = [("u", f"i{number}", 5, 100 - number) for number in range(5)]
    (one,) = all_lists(write(tmp_path, ratings, 'time = ""\n'))
    assert (*one.line_ids, *one.item_ids) == ("i0", "i1", "i2", "i3", "i4")
    (one,) = all_lists(write(tmp_path, ratings, ""))
    assert (*one.line_ids, *one.item_ids) == ("i4", "i3", "i2", "i1", "i0")


def test_bad_rows_are_counted_among_the_ratings_and_not_among_the_lists(tmp_path: Path) -> None:
    ratings = random_ratings()
    bad = [("u1", "i99", 5, 1), ("u1", "i1", "good", 2), ("u1", "i2", 3, "noon")]
    workload = write(tmp_path, [*ratings, *bad])  # type: ignore[list-item]
    splits = workload.splits
    assert splits.num_rows == len(ratings) + len(bad)
    assert [one.reason for one in splits.unusable] == [
        "names the item 'i99', which has no text in items.jsonl",
        "has 'good' in the column rating, not a number",
        "has 'noon' in the column time, not a number",
    ]
    with pytest.raises(UserError, match=r"has 3 of \d+ rows that cannot be used"):
        _ = write(tmp_path, [*ratings[:200], *bad]).splits  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"id": "i1", "text": "again"}\n', "i1"),
        ('{"id": "new", "text": "  "}\n', "has no text"),
        ('{"text": "no id"}\n', "has no column id"),
        ("garbage\n", "items.jsonl:31"),
    ],
)
def test_an_item_without_id_or_text_is_named(tmp_path: Path, line: str, problem: str) -> None:
    workload = write(tmp_path, random_ratings())
    with (tmp_path / "items.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(UserError, match=problem):
        _ = workload.splits


def test_the_file_must_say_what_is_liked(tmp_path: Path) -> None:
    (tmp_path / "films.toml").write_text('kind = "ratings"\ndata = "ratings.csv"\nitems = "items.jsonl"\n')
    with pytest.raises(UserError, match="liked_from"):
        load_workload_file(tmp_path / "films.toml")
