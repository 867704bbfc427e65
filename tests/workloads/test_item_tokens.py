"""Tests of prompts with item ids: how a model with a catalogue reads them, and what is left of them without items."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from slimserve.core.catalogue import Catalogue, write_catalogue
from slimserve.core.errors import UserError
from slimserve.loadtest.prompts import make_prompts
from slimserve.loadtest.settings import SuiteOptions
from slimserve.workloads import load_workload
from slimserve.workloads.interface import Interaction, ScoringPrompt, TextPrompt, hash_number, split_of
from slimserve.workloads.item_tokens import item_tokens_of
from slimserve.workloads.recommendation import Recommendation, is_held_out, label_prompts
from tests.workloads.test_recommendation import candidate_lists, user_of, write_atomic_files

PROMPT = ScoringPrompt(
    query="Heat (1995): yes\nAlien: no\nJaws\n",
    items=("Babe:", "Big:"),
    labels=(" yes", " no"),
    truth=(True, False),
    group=3,
    item_ids=("b", "x"),
    line_ids=("h", "x", "j"),
)


def test_known_items_become_tokens_and_the_others_stay_texts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 128}))
    write_catalogue(tmp_path, Catalogue(100, 4, 2, {}).with_items(["h", "b", "j"]))
    read = item_tokens_of(tmp_path)(PROMPT)
    assert isinstance(read, ScoringPrompt)
    # A line without a label is no item that the user has labelled, so it stays.
    assert read.query == "<|item_0|><|item_1|> yes\nAlien: no\nJaws\n"
    assert read.items == ("<|item_2|><|item_3|>", "Big:")
    assert read.truth == PROMPT.truth
    assert item_tokens_of(tmp_path)(TextPrompt("a", 1, 0)) == TextPrompt("a", 1, 0)


def test_a_model_without_catalogue_reads_texts(tmp_path: Path) -> None:
    assert item_tokens_of(tmp_path)(PROMPT) == item_tokens_of(None)(PROMPT) == PROMPT


def test_items_that_are_not_learned_are_left_out() -> None:
    left = PROMPT.only_items({"x"})
    assert (left.query, left.line_ids) == ("Alien: no\n", ("x",))
    assert (left.items, left.item_ids, left.truth, left.gains) == (("Big:",), ("x",), (False,), (0.0,))
    assert PROMPT.only_items({}).solved == ""
    own_query = replace(PROMPT, query="What should I see next?\n", line_ids=()).only_items({"x"})
    assert (own_query.query, own_query.items) == ("What should I see next?\n", ("Big:",)), "it is no list of items"


def test_every_line_and_candidate_of_a_recommendation_has_its_item(tmp_path: Path) -> None:
    data = write_atomic_files(tmp_path, user_of("quality"), 5)
    (prompt,) = candidate_lists(Recommendation(data, history_len=3, num_candidates=2), "quality")
    assert prompt.line_ids == ("0", "1", "2")
    assert prompt.item_ids == ("3", "4")


def test_histories_that_are_cut_or_repeated_keep_their_ids(tmp_path: Path) -> None:
    workload = Recommendation(write_atomic_files(tmp_path, user_of("load"), 80), item_text="title")
    texts = workload.item_texts()
    prompts = workload.load_prompts(SuiteOptions(history="5..9", candidates="2..4", repeat_visits=0.5), 40)
    assert len(prompts) > 5
    for prompt in prompts:
        assert isinstance(prompt, ScoringPrompt)
        assert [line.rsplit(":", 1)[0] for line in prompt.lines] == [texts[item] for item in prompt.line_ids]
        assert list(prompt.items) == [f"{texts[item]}:" for item in prompt.item_ids]
        assert len(prompt.items) == len(prompt.truth) == len(prompt.gains)


def test_load_tests_send_item_tokens_to_a_variant_that_has_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 5000}))
    every = [str(item) for item in range(50)]
    write_catalogue(tmp_path, Catalogue(100, 2000, 1, {}).with_items(every))
    data = str(write_atomic_files(tmp_path, user_of("load"), 50))
    plain = make_prompts("recommendation", SuiteOptions(data=data), 1)
    tokens = make_prompts("recommendation", SuiteOptions(data=data, item_tokens=str(tmp_path)), 1)
    for (_, text), (_, items) in zip(plain, tokens, strict=True):
        assert isinstance(text, ScoringPrompt)
        assert isinstance(items, ScoringPrompt)
        assert items.items == tuple(f"<|item_{item}|>" for item in text.item_ids)
        assert items.lines[0] == f"<|item_{text.line_ids[0]}|> {text.lines[0].split()[-1]}\n"
        assert items.truth == text.truth


def test_held_out_items_are_in_no_calibration_data_and_in_all_other(tmp_path: Path) -> None:
    for split in ("calibration", "quality"):
        data = write_atomic_files(tmp_path, user_of(split), 60)
        workload = Recommendation(data, 4, 2, holds_out_items=True)
        ids = {item for one in candidate_lists(workload, split) for item in (*one.item_ids, *one.line_ids)}
        assert any(map(is_held_out, ids)) == (split == "quality")
        assert not any(is_held_out(one.item) for one in workload.interactions())
    assert 0.08 < sum(is_held_out(str(item)) for item in range(10_000)) / 10_000 < 0.12


def test_the_text_of_an_item_has_its_genres_on_request(tmp_path: Path) -> None:
    data = write_atomic_files(tmp_path, user_of("quality"), 3)
    (data / "own.item").write_text("item_id\tmovie_title\trelease_year\tclass\n0\tA\t1980\tWar Sci-Fi\n1\tB\t1981\t\n")
    assert Recommendation(data, item_text="genres").item_texts() == {"0": "A (1980), war, sci-fi", "1": "B (1981)"}
    (prompt,) = candidate_lists(Recommendation(data, 1, 1, item_text="genres"), "quality")
    assert (prompt.query, prompt.items) == ("A (1980), war, sci-fi: no\n", ("B (1981):",))


def test_interactions_are_the_ratings_of_calibration_users(tmp_path: Path) -> None:
    data = write_atomic_files(tmp_path, user_of("calibration"), 3)
    group = hash_number(user_of("calibration"))
    expected = [Interaction(group, "0", False), Interaction(group, "1", True), Interaction(group, "2", False)]
    assert Recommendation(data).interactions() == expected
    (data / "own.inter").unlink()
    assert Recommendation(write_atomic_files(tmp_path, user_of("load"), 3)).interactions() == []


def test_a_users_history_tells_the_factorization_what_the_user_likes(tmp_path: Path) -> None:
    """Half of the users like even items and half odd ones, so that popularity and share say nothing."""
    users = [str(user) for user in range(400) if split_of(str(user)) == "calibration"][:60]
    asked = [str(user) for user in range(400) if split_of(str(user)) == "quality"][:10]
    rows = [
        f"{user}\t{item}\t{5 if item % 2 == number % 2 else 1}\t{item}"
        for group in (users, asked)
        for number, user in enumerate(group)
        for item in range(20)
    ]
    (tmp_path / "own.inter").write_text("\n".join(["user_id\titem_id\trating\ttimestamp", *rows]) + "\n")
    items = [f"{item}\tFilm {item}" for item in range(20)]
    (tmp_path / "own.item").write_text("\n".join(["item_id\tmovie_title", *items]) + "\n")
    workload = Recommendation(tmp_path, history_len=6, num_candidates=14)
    prompts = workload.make_prompts("quality", 10)
    answers = workload.baselines(prompts)
    values = {name: workload.metric_data(prompts, given)["within_group_auc"].value for name, given in answers.items()}
    assert values["matrix_factorization"] == 1.0
    assert values["item_popularity"] == pytest.approx(0.5, abs=0.01)


def test_a_prompt_for_each_label_knows_the_items_before_it() -> None:
    first, second = label_prompts(PROMPT.only_items({"h", "x"}), 1)
    assert (first.query, first.items, first.item_ids, first.line_ids) == (
        "Heat (1995): yes\n",
        ("Alien:",),
        ("x",),
        ("h",),
    )
    assert (second.items, second.item_ids, second.line_ids) == (("Big:",), ("x",), ("h", "x"))


RANK = """
kind = "rank"
data = "shop.jsonl"
query = "{history}"
item = "{title}:"
group = "user"
item_id = "sku"
line_ids = "bought"
"""


def test_a_users_own_rank_file_names_the_columns_of_its_ids(tmp_path: Path) -> None:
    row = {"history": "Tea: yes\nRum: no\n", "bought": ["t", 7], "items": [{"sku": 9, "title": "Ale"}], "grades": [1]}
    users = [f"u{number}" for number in range(9)]
    (tmp_path / "shop.jsonl").write_text("\n".join(json.dumps({"user": user, **row}) for user in users))
    (tmp_path / "shop.toml").write_text(RANK)
    workload = load_workload(str(tmp_path / "shop.toml"))
    (prompt, *_) = workload.make_prompts("quality", 9)
    assert isinstance(prompt, ScoringPrompt)
    assert (prompt.line_ids, prompt.item_ids) == (("t", "7"), ("9",))
    assert workload.item_texts() == {"9": "Ale"}
    assert {(one.item, one.is_positive) for one in workload.interactions()} == {("9", True)}


def test_lines_without_ids_make_a_row_unusable(tmp_path: Path) -> None:
    row = {"user": "u", "history": "Tea: yes\n", "bought": ["t", "r"], "items": [{"sku": 9, "title": "Ale"}]}
    (tmp_path / "shop.jsonl").write_text(json.dumps({**row, "grades": [1]}))
    (tmp_path / "shop.toml").write_text(RANK)
    with pytest.raises(Exception, match="has 2 ids for the 1 lines of its query"):
        load_workload(str(tmp_path / "shop.toml")).make_prompts("quality", 1)


def test_an_item_without_its_id_does_not_take_that_of_its_row(tmp_path: Path) -> None:
    rows = [{"sku": "row", "items": [{"title": "a", "sku": "1"}, {"title": "b"}], "grades": [1, 0]}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    file = tmp_path / "own.toml"
    file.write_text('kind = "rank"\ndata = "own.jsonl"\nitem = "{title}:"\nitem_id = "sku"\n')
    with pytest.raises(UserError, match="sku"):
        load_workload(str(file)).make_prompts("quality", 4)
