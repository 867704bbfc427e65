import itertools
from pathlib import Path

import pytest

from slimserve.core.errors import UserError
from slimserve.workloads import load_workload
from slimserve.workloads.interface import ScoringPrompt, Split, split_of
from slimserve.workloads.metrics import evaluate
from slimserve.workloads.recommendation import Recommendation, label_prompts, load_ratings, movielens_directory

SPLITS: tuple[Split, ...] = ("calibration", "quality", "load")


def write_atomic_files(directory: Path, user: str, num_films: int) -> Path:
    films = [f"{item}\tFilm {item}\t{1980 + item}" for item in range(num_films)]
    items = ["item_id:token\tmovie_title:token_seq\trelease_year:token", *films]
    # The file is not in the order of time, because the loader must sort by timestamp.
    ratings = [f"{user}\t{item}\t{4 if item % 2 else 3}\t{100 + item}" for item in reversed(range(num_films))]
    inter = ["user_id:token\titem_id:token\trating:float\ttimestamp:float", *ratings]
    (directory / "own.item").write_text("\n".join(items) + "\n", encoding="utf-8")
    (directory / "own.inter").write_text("\n".join(inter) + "\n", encoding="utf-8")
    return directory


def user_of(split: Split) -> str:
    return next(str(number) for number in range(1000) if split_of(str(number)) == split)


def candidate_lists(workload: Recommendation, split: Split, num: int = 10_000) -> list[ScoringPrompt]:
    prompts = workload.make_prompts(split, num)
    assert all(isinstance(prompt, ScoringPrompt) for prompt in prompts)
    return [prompt for prompt in prompts if isinstance(prompt, ScoringPrompt)]


def test_a_prompt_is_the_history_in_the_order_of_time_and_then_the_candidates(tmp_path: Path) -> None:
    data = write_atomic_files(tmp_path, user_of("quality"), 5)
    (prompt,) = candidate_lists(Recommendation(data, history_len=3, num_candidates=2), "quality")
    assert prompt.query == "Film 0 (1980): no\nFilm 1 (1981): yes\nFilm 2 (1982): no\n"
    assert prompt.items == ("Film 3 (1983):", "Film 4 (1984):")
    assert prompt.truth == (True, False)
    assert prompt.labels == (" yes", " no")


def test_items_show_the_share_of_other_calibration_users_who_liked_them(tmp_path: Path) -> None:
    users = [str(number) for number in range(1000) if split_of(str(number)) == "calibration"][:5]
    asked = user_of("quality")
    ratings = [(user, item, 5 if place <= item else 1) for place, user in enumerate(users) for item in (0, 1)]
    rows = [f"{user}\t{item}\t{rating}\t{item}" for user, item, rating in [*ratings, (asked, 0, 1), (asked, 1, 1)]]
    (tmp_path / "own.inter").write_text("\n".join(["user_id\titem_id\trating\ttimestamp", *rows]) + "\n")
    (tmp_path / "own.item").write_text("item_id\tmovie_title\n0\tA\n1\tB\n")
    workload = Recommendation(tmp_path, history_len=1, num_candidates=1)
    overall = 3 / 10
    (prompt,) = candidate_lists(workload, "quality")
    assert prompt.query == f"A, liked by {(1 + 5 * overall) / 10:.0%}: no\n"
    assert prompt.items == (f"B, liked by {(2 + 5 * overall) / 10:.0%}:",)
    # A calibration user's own rating does not count, so the share does not give the label away.
    own = {prompt.truth[0]: prompt.items[0] for prompt in candidate_lists(workload, "calibration")}
    assert own == {
        True: f"B, liked by {(1 + 5 * overall) / 9:.0%}:",
        False: f"B, liked by {(2 + 5 * overall) / 9:.0%}:",
    }


def test_prompts_of_a_user_do_not_overlap(tmp_path: Path) -> None:
    data = write_atomic_files(tmp_path, user_of("load"), 11)
    prompts = candidate_lists(Recommendation(data, history_len=3, num_candidates=2), "load")
    films = [line for prompt in prompts for line in (*prompt.query.splitlines(), *prompt.items)]
    titles = [line.split(":")[0] for line in films]
    assert len(prompts) == 2
    assert len(titles) == len(set(titles)) == 10


def test_quality_asks_every_user_once_before_it_asks_one_twice() -> None:
    groups = [prompt.group for prompt in candidate_lists(Recommendation(), "quality")]
    num_users = len(set(groups))
    assert num_users < len(groups)
    assert len(set(groups[:num_users])) == num_users


@pytest.mark.parametrize(("num_films", "titles"), [(4, []), (5, [0, 1, 2, 3, 4]), (11, [6, 7, 8, 9, 10])])
def test_only_the_latest_films_of_a_user_are_used_on_request(tmp_path: Path, num_films: int, titles: list[int]) -> None:
    data = write_atomic_files(tmp_path, user_of("quality"), num_films)
    prompts = candidate_lists(Recommendation(data, history_len=3, num_candidates=2, is_latest_only=True), "quality")
    lines = [line for prompt in prompts for line in (*prompt.query.splitlines(), *prompt.items)]
    assert [line.split(":")[0] for line in lines] == [f"Film {item} ({1980 + item})" for item in titles]


def test_every_user_of_movielens_is_in_one_split() -> None:
    groups = {split: {prompt.group for prompt in candidate_lists(Recommendation(), split)} for split in SPLITS}
    assert all(groups.values())
    assert not groups["calibration"] & groups["quality"]
    assert not groups["calibration"] & groups["load"]
    assert not groups["quality"] & groups["load"]


def test_movielens_is_complete_and_sorted_by_time() -> None:
    ratings = load_ratings(movielens_directory())
    assert len(ratings) == 943
    assert sum(map(len, ratings.values())) == 100_000
    assert all(
        earlier.timestamp <= later.timestamp
        for history in ratings.values()
        for earlier, later in itertools.pairwise(history)
    )


def test_the_seed_determines_the_order_and_the_number_only_cuts() -> None:
    workload = load_workload("recommendation")
    assert workload.make_prompts("quality", 7, seed=1) == workload.make_prompts("quality", 9, seed=1)[:7]
    assert workload.make_prompts("quality", 7, seed=1) != workload.make_prompts("quality", 7, seed=2)


def test_perfect_useless_and_reversed_scores_have_the_expected_metrics() -> None:
    workload = Recommendation()
    prompts = candidate_lists(workload, "quality", 40)
    perfect = [[float(label) for label in prompt.truth] for prompt in prompts]
    results = evaluate(workload, prompts, perfect)
    assert results["auc"].value == results["within_group_auc"].value == 1.0
    assert results["ndcg_at_10"].value == pytest.approx(1.0)
    assert results["calibration_error"].value == pytest.approx(0.0)
    assert results["auc"].n == 40 * 16
    assert evaluate(workload, prompts, [[0.5] * 16] * 40)["auc"].value == 0.5
    reversed_scores = [[1 - score for score in row] for row in perfect]
    assert evaluate(workload, prompts, reversed_scores)["within_group_auc"].value == 0.0


def test_the_share_of_liked_items_per_list_raises_only_the_pooled_auc() -> None:
    workload = Recommendation()
    prompts = candidate_lists(workload, "quality", 60)
    base_rate = [[sum(prompt.truth) / len(prompt.truth)] * len(prompt.truth) for prompt in prompts]
    results = evaluate(workload, prompts, base_rate)
    assert results["auc"].value > 0.6
    assert results["within_group_auc"].value == 0.5


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no .item file"),
        ({"a.item": "title:token\nx\n"}, "has no column item_id"),
        (
            {"a.item": "item_id:token\n1\n", "a.inter": "user_id:token\n1\n"},
            "has no column item_id, rating, timestamp",
        ),
    ],
)
def test_data_in_another_format_is_rejected(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        Recommendation(tmp_path).make_prompts("quality", 1)


def test_the_error_for_an_unknown_workload_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="'shopping' is unknown; choose from recommendation, reasoning"):
        load_workload("shopping")


def test_every_label_becomes_a_prompt_after_all_earlier_items_and_labels() -> None:
    prompt = ScoringPrompt("A: yes\nB yes: no\n", ("C:", "D no:"), (" yes", " no"), (True, False), 7)
    prompts = label_prompts(prompt)
    assert [(one.query, one.items, one.truth) for one in prompts] == [
        ("", ("A:",), (True,)),
        ("A: yes\n", ("B yes:",), (False,)),
        ("A: yes\nB yes: no\n", ("C:",), (True,)),
        ("A: yes\nB yes: no\nC: yes\n", ("D no:",), (False,)),
    ]
    assert label_prompts(prompt, 3) == prompts[3:]
    assert {one.group for one in prompts} == {7}


def test_ratings_of_items_without_a_title_are_counted_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.item").write_text("item_id:token\tmovie_title:token_seq\n1\tOne\n")
    (tmp_path / "a.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\t1\t5\t0\nu\t2\t4\t1\n"
    )
    assert [rating.title for rating in load_ratings(tmp_path)["u"]] == ["One"]
    load_ratings(tmp_path)
    assert capsys.readouterr().err.count("1 ratings are not used, as the .item file lacks their items") == 1
