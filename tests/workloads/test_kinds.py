"""Workload files: each kind from its rows to its metrics, splits, copies between splits, and malformed data."""

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from slimserve.core.errors import UserError
from slimserve.workloads import load_workload
from slimserve.workloads.interface import (
    ChatAnswer,
    ChatPrompt,
    ChoicePrompt,
    ScoringPrompt,
    TextPrompt,
    TextReading,
)
from slimserve.workloads.kinds import load_workload_file
from slimserve.workloads.kinds.base import FileWorkload

Write = Callable[..., FileWorkload]
ALL_QUALITY = "[split]\ncalibration = 0\nquality = 1\nload = 0\n"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a workload file with its data rows as JSONL, and load it."""

    def write(keys: str, rows: list[dict[str, Any]] | bytes, data: str = "data.jsonl") -> FileWorkload:
        content = rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()
        (tmp_path / data).write_bytes(content)
        file = tmp_path / "mine.toml"
        file.write_text(f'data = "{data}"\n{keys}')
        return load_workload_file(file)

    return write


def ranked(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"query": f"q{n}", "items": ["a", "b", "c"], "grades": [0, 2, 1], **more} for n in range(count)]


def test_rank_rows_become_candidate_lists_with_grades(write: Write) -> None:
    workload = write(
        f'kind = "rank"\nquery = "Likes: {{query}}\\n"\nitem = "{{item}}:"\ngroup = "query"\n{ALL_QUALITY}', ranked(5)
    )
    (prompt, *others) = cast("list[ScoringPrompt]", workload.make_prompts("quality", 9))
    assert len(others) == 4
    assert prompt.query.startswith("Likes: q")
    assert prompt.items == ("a:", "b:", "c:")
    assert (prompt.truth, prompt.gains) == ((False, True, True), (0.0, 2.0, 1.0))
    metrics = workload.metric_data([prompt, *others], [(0.1, 0.9, 0.5)] * 5)
    assert workload.primary_metric == "within_group_auc"
    assert metrics["within_group_auc"].value == metrics["ndcg_at_10"].value == 1.0
    assert metrics["within_group_auc"].floor == 0.5


def test_rows_of_single_items_are_joined_by_their_query(write: Write) -> None:
    rows = [{"query": f"q{n // 3}", "item": f"i{n % 3}", "grade": n % 3, "split": "test"} for n in range(9)]
    workload = write('kind = "rank"\nsplit = "split"\n', rows)
    prompts = cast("list[ScoringPrompt]", workload.make_prompts("quality", 9))
    assert sorted(prompt.query for prompt in prompts) == ["q0", "q1", "q2"]
    assert prompts[0].items == ("i0", "i1", "i2")
    assert prompts[0].gains == (0.0, 1.0, 2.0)


def test_soft_labels_are_relevant_above_a_limit(write: Write) -> None:
    rows = [{"query": "q", "items": ["a", "b"], "grades": [0.3, 0.7]}]
    workload = write(f'kind = "rank"\nrelevant_above = 0.5\n{ALL_QUALITY}', rows)
    (prompt,) = cast("list[ScoringPrompt]", workload.make_prompts("quality", 1))
    assert (prompt.truth, prompt.gains) == ((False, True), (0.0, 0.7))


def test_grades_become_soft_labels_by_the_highest_grade(write: Write) -> None:
    rows = [{"query": "q", "items": ["a", "b", "c"], "grades": [0, 1, 4]}]
    workload = write(f'kind = "rank"\nrelevant_above = 2\nmax_grade = 4\n{ALL_QUALITY}', rows)
    (prompt,) = cast("list[ScoringPrompt]", workload.make_prompts("quality", 1))
    assert (prompt.soft, prompt.truth, prompt.gains) == ((0.0, 0.25, 1.0), (False, False, True), (0.0, 0.0, 4.0))
    rows.append({"query": "p", "items": ["a"], "grades": [5]})
    workload = write(f'kind = "rank"\nmax_grade = 4\nmax_unusable = 0.5\n{ALL_QUALITY}', rows)
    assert len(workload.make_prompts("quality", 2)) == 1, "a grade above the highest cannot be used"


def test_items_by_likelihood_are_choices(write: Write) -> None:
    workload = write(f'kind = "rank"\nscoring = "likelihood"\nitem = " {{item}}"\n{ALL_QUALITY}', ranked(3))
    prompts = cast("list[ChoicePrompt]", workload.make_prompts("quality", 3))
    assert prompts[0].choices == (" a", " b", " c")
    assert prompts[0].truth == 1
    assert prompts[0].probabilities((-1.0, -1.0, -1.0)) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert workload.metric_data(prompts, [(-5.0, -0.1, -1.0)] * 3)["mrr"].value == 1.0


@pytest.mark.parametrize("qrels", ["q1 0 d1 2\nq1 0 d2 0\n", "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n"])
def test_judgements_of_trec_and_beir(tmp_path: Path, qrels: str) -> None:
    (tmp_path / "qrels.tsv").write_text(qrels)
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "what?"}\n')
    corpus = [{"_id": f"d{n}", "title": f"T{n}", "text": "body"} for n in range(1, 9)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    file = tmp_path / "beir.toml"
    file.write_text(
        'kind = "rank"\nqrels = "qrels.tsv"\nqueries = "queries.jsonl"\ncorpus = "corpus.jsonl"\n'
        f"num_negatives = 3\n{ALL_QUALITY}"
    )
    workload = load_workload_file(file)
    (prompt,) = cast("list[ScoringPrompt]", workload.make_prompts("quality", 5))
    assert prompt.query == "what?"
    assert len(prompt.items) == len(set(prompt.items)) == 5
    assert dict(zip(prompt.items, prompt.gains, strict=True))["T1 body"] == 2.0
    assert sum(prompt.truth) == 1
    assert {path.name for path in workload.files} == {"beir.toml", "qrels.tsv", "queries.jsonl", "corpus.jsonl"}


def test_classify_takes_names_and_numbers_of_labels(write: Write) -> None:
    rows = [{"text": f"t{n}", "label": "good" if n % 2 else 1} for n in range(10)]
    workload = write(f'kind = "classify"\nlabels = ["good", "bad"]\n{ALL_QUALITY}', rows)
    prompts = cast("list[ChoicePrompt]", workload.make_prompts("quality", 10))
    assert prompts[0].choices == (" good", " bad")
    answers = [(-0.1, -2.0) if prompt.truth == 0 else (-3.0, -0.2) for prompt in prompts]
    metrics = workload.metric_data(prompts, answers)
    assert metrics["accuracy"].value == metrics["macro_f1"].value == 1.0
    assert (metrics["accuracy"].floor, metrics["accuracy"].n) == (0.5, 10)
    wrong = workload.metric_data(prompts, [(-0.1, -2.0)] * 10)
    assert wrong["accuracy"].value == 0.5


def test_long_choices_are_not_unlikely_if_normalized() -> None:
    prompt = ChoicePrompt("?", (" no", " certainly"), (0.0, 1.0), 0, is_normalized=True)
    assert prompt.probabilities((-3.0, -6.0))[1] > 0.5
    assert ChoicePrompt("?", prompt.choices, prompt.gains, 0).probabilities((-3.0, -6.0))[1] < 0.1


def test_generate_checks_answers_and_counts_samples(write: Write) -> None:
    rows = [{"question": f"{n} + 1?", "answer": n + 1, "why": f"{n} and one."} for n in range(4)]
    workload = write(
        'kind = "generate"\nprompt = "{question}"\nsystem = "Add."\nverifier = "number"\nchain_of_thought = "why"\n'
        f"samples = 2\ntemperature = 0.7\n{ALL_QUALITY}",
        rows,
    )
    prompts = cast("list[ChatPrompt]", workload.make_prompts("quality", 4))
    prompt = next(one for one in prompts if one.answer == "3")
    assert [message["content"] for message in prompt.messages] == ["Add.", "2 + 1?"]
    assert prompt.solution == "<think>\n2 and one.\n</think>\n3"
    assert (prompt.sampling.temperature, prompt.sampling.num_samples) == (0.7, 2)
    answers = [ChatAnswer(f"It is {one.answer}.", 5, ("no idea",)) for one in prompts]
    metrics = workload.metric_data(prompts, answers)
    assert metrics["accuracy"].value == 0.5
    assert metrics["pass_at_2"].value == 1.0


def test_messages_may_come_from_a_column(write: Write) -> None:
    chat = [{"role": "user", "content": "Hi?"}]
    rows = [{"chat": chat, "answer": "hello"}, {"chat": json.dumps(chat), "answer": "hello"}]
    workload = write(f'kind = "generate"\nmessages = "chat"\n{ALL_QUALITY}', rows)
    assert [cast("ChatPrompt", one).messages for one in workload.make_prompts("quality", 2)] == [tuple(chat)] * 2


def test_text_is_predicted(write: Write) -> None:
    workload = write(f'kind = "text"\n{ALL_QUALITY}', [{"text": "one two"}, {"text": "three"}])
    prompts = workload.make_prompts("quality", 2)
    assert all(isinstance(prompt, TextPrompt) for prompt in prompts)
    reading = TextReading((1, 2, 3), (-0.1, -2.0), ({2: -0.1, 9: -3.0}, {9: -0.5, 3: -2.0}))
    metrics = workload.metric_data(prompts, [reading, reading])
    assert metrics["top1_accuracy"].value == 0.5
    assert metrics["perplexity"].value == pytest.approx(math.exp(1.05))
    assert workload.reference_metrics(prompts, [reading] * 2, [reading] * 2)["kl_nats"].value == 0.0


def test_groups_are_never_in_two_splits_and_fractions_hold(write: Write) -> None:
    rows = [{"query": f"q{n % 300}", "items": ["a", "b"], "grades": [0, 1], "user": n % 300} for n in range(900)]
    workload = write('kind = "rank"\ngroup = "user"\n', rows)
    groups = {
        split: {cast("ScoringPrompt", one).group for one in prompts} for split, prompts in workload.splits.rows.items()
    }
    assert not groups["calibration"] & groups["quality"] | groups["quality"] & groups["load"]
    assert [len(groups[split]) / 300 for split in ("calibration", "quality", "load")] == pytest.approx(
        [0.3, 0.5, 0.2], abs=0.08
    )
    assert not workload.splits.leaks


def test_a_copy_of_a_quality_prompt_in_another_split_is_reported(write: Write) -> None:
    rows = [
        {"question": "How  much?", "answer": "1", "split": "train"},
        {"question": "how much?", "answer": "1", "split": "test"},
        {"question": "Why?", "answer": "1", "split": "load"},
    ]
    workload = write('kind = "generate"\nprompt = "{question}"\nsplit = "split"\n', rows)
    assert workload.splits.leaks == [("data.jsonl:1", "data.jsonl:2")]


def test_a_workload_file_is_a_workload_argument(write: Write, tmp_path: Path) -> None:
    write(f'kind = "rank"\nname = "my-lists"\n{ALL_QUALITY}', ranked(3))
    assert load_workload(str(tmp_path / "mine.toml")).name == "my-lists"
    assert load_workload("my-lists") is load_workload(str(tmp_path / "mine.toml"))


def test_baselines_know_popular_items_and_the_majority(write: Write) -> None:
    rows = [
        {"query": f"q{n}", "items": ["loved", "hated"], "grades": [1, 0], "split": "train" if n < 30 else "test"}
        for n in range(60)
    ]
    ranking = write('kind = "rank"\nsplit = "split"\n', rows)
    prompts = ranking.make_prompts("quality", 30)
    popularity = ranking.baselines(prompts)["item_popularity"]
    assert ranking.metric_data(prompts, popularity)["within_group_auc"].value == 1.0
    rows = [
        {"text": f"t{n}", "label": "a" if n % 3 else "b", "split": "train" if n < 30 else "test"} for n in range(60)
    ]
    labels = write('kind = "classify"\nlabels = ["a", "b"]\nsplit = "split"\n', rows)
    prompts = labels.make_prompts("quality", 30)
    assert labels.metric_data(prompts, labels.baselines(prompts)["majority_label"])["accuracy"].value == pytest.approx(
        2 / 3
    )


def test_matrix_factorization_needs_users_and_items_that_repeat(write: Write) -> None:
    # Two kinds of users like two kinds of items; the quality lists hold other items than each user's history.
    def row(user: int, items: Sequence[int], split: str) -> dict[str, Any]:
        grades = [int(item // 6 == user % 2) for item in items]
        return {"query": "", "user": user, "items": [f"i{item}" for item in items], "grades": grades, "split": split}

    draw = random.Random(0)
    rows = [row(user, draw.sample(range(12), 6), "train") for user in range(60)]
    rows += [row(user, range(12), "test") for user in range(60)]
    workload = write('kind = "rank"\ngroup = "user"\nsplit = "split"\n', rows)
    prompts = workload.make_prompts("quality", 99)
    factors = workload.baselines(prompts)["matrix_factorization"]
    assert workload.metric_data(prompts, factors)["within_group_auc"].value > 0.95


RANK = f'kind = "rank"\nmax_unusable = 0.4\n{ALL_QUALITY}'
GOOD = b'{"query": "q", "items": ["a", "b"], "grades": [0, 1]}\n'
BAD_LINES = {
    b'{"query": "q", "items": ["a"], "grades": [0, 1]}': "1 items and 2 grades",
    b'{"query": "q", "items": [], "grades": []}': "has no items",
    b'{"query": "q", "items": ["a", "b"]}': "has no column grades",
    b'{"items": ["a", "b"], "grades": [0, 1]}': "has no column query",
    b'{"query": null, "items": ["a"], "grades": [1]}': "no value in the column query",
    b'{"query": "q", "items": "a b", "grades": [1]}': "has no list in the column items",
    b'{"query": "q", "items": ["a"], "grades": ["n/a"]}': "'n/a' in the column grades, not a number",
    b'{"query": "q", "items": ["a"], "grades": [NaN]}': "not a number",
    b'{"query": "q", "items": ["a"], "grades": [Infinity]}': "not a number",
    b'{"query": "q", "items": [["a"]], "grades": [1]}': "an item that is a list",
    b'{"query": {"a": 1}, "items": ["a"], "grades": [1]}': "has a dict in the column query",
    b'{"query": true, "items": ["a"], "grades": [1]}': "has a bool in the column query",
    b'["q", ["a"], [1]]': "is not a JSON object",
    b'{"query": "q", "items": ["a"': "is not JSON",
    b"not json at all": "is not JSON",
    b'{"query": "caf\xe9", "items": ["a"], "grades": [1]}': "is not UTF-8",
    b'{"query": "\\ud83d", "items": ["a"], "grades": [1]}': "half of a surrogate pair",
    b'{"query": "q", "items": [' + b"[" * 100_000 + b"]": "is nested more than 64 levels deep",
    b"null": "is not a JSON object",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=list(BAD_LINES.values()))
def test_a_bad_line_is_reported_with_its_place_and_the_others_are_used(
    write: Write, line: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = write(f'name = "n{len(line)}"\n{RANK}', GOOD + line + b"\n" + GOOD + GOOD)
    (unusable,) = workload.splits.unusable
    said = f"n{len(line)}: 1 of 4 rows cannot be used: data.jsonl:2 {unusable.reason}"
    assert said in capsys.readouterr().err
    assert unusable.place == "data.jsonl:2"
    assert reason in unusable.reason
    assert len(workload.make_prompts("quality", 9)) == 3
    with pytest.raises(UserError, match=r"1 of 4 rows that cannot be used: data.jsonl:2"):
        _ = write(f'kind = "rank"\n{ALL_QUALITY}', GOOD + line + b"\n" + GOOD + GOOD).splits


GOOD_FILES = {
    "byte order mark": b"\xef\xbb\xbf" + GOOD * 3,
    "CRLF": GOOD.replace(b"\n", b"\r\n") * 3,
    "empty lines": b"\n\n" + GOOD + b"  \n" + GOOD * 2 + b"\n",
    "no last line feed": (GOOD * 3).rstrip(b"\n"),
    "line separators within a text": GOOD.replace(b'"q"', '"a\u2028b\u0085c\\u000bd"'.encode()) * 3,
    "a row of a mebibyte": GOOD * 2 + GOOD.replace(b'"q"', b'"' + b"x" * 2**20 + b'"'),
    "all items relevant": GOOD.replace(b"[0, 1]", b"[1, 1]") + GOOD * 2,
}


@pytest.mark.parametrize("content", GOOD_FILES.values(), ids=GOOD_FILES)
def test_odd_but_valid_files_are_read_in_full(write: Write, content: bytes) -> None:
    workload = write(f'kind = "rank"\n{ALL_QUALITY}', content)
    prompts = workload.make_prompts("quality", 9)
    assert len(prompts) == 3
    assert not workload.splits.unusable
    value = workload.metric_data(prompts, [(0.2, 0.8)] * 3)["within_group_auc"].value
    assert value == 1.0


def test_only_positive_items_leave_the_metric_undefined(write: Write) -> None:
    workload = write(f'kind = "rank"\n{ALL_QUALITY}', GOOD.replace(b"[0, 1]", b"[1, 1]") * 3)
    prompts = workload.make_prompts("quality", 9)
    assert math.isnan(workload.metric_data(prompts, [(0.2, 0.8)] * 3)["within_group_auc"].value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"text,label\n\xe9,a\n", "is not UTF-8"),
        (b"text,text\na,b\n", "names the column 'text' twice"),
        (b"", "is empty"),
        (b"text,label\n", "has no rows"),
        (b"text,label\na\nb,a,c\n", "does not have 2 fields"),
        (b"label\na\n", "has no column text"),
        (b"text,label\nhello,c\n", "has the label 'c'; the labels are a, b"),
    ],
)
def test_bad_csv_files_are_one_clear_error(write: Write, content: bytes, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        _ = write('kind = "classify"\nlabels = ["a", "b"]\n', content, "data.csv").splits


def test_csv_with_quotes_line_feeds_and_a_byte_order_mark(write: Write) -> None:
    content = b'\xef\xbb\xbftext,label\r\n"one, ""two""\nthree",a\r\nfour,b\r\n'
    workload = write(f'kind = "classify"\nlabels = ["a", "b"]\n{ALL_QUALITY}', content, "data.csv")
    queries = {cast("ChoicePrompt", one).query for one in workload.make_prompts("quality", 9)}
    assert queries == {'one, "two"\nthree', "four"}


def test_a_hundred_thousand_rows_are_read_within_seconds(write: Write) -> None:
    rows = b"".join(b'{"text": "number %d", "label": "%s"}\n' % (n, b"ab"[n % 2 : n % 2 + 1]) for n in range(100_000))
    workload = write('kind = "classify"\nlabels = ["a", "b"]\n', rows)
    assert sum(map(len, workload.splits.rows.values())) == 100_000


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ('kind = "sort"', "is not a kind of workload"),
        ('kind = "rank"\ncolour = 1', "colour"),
        ('kind = "rank"\nlabels = ["yes"]', "labels"),
        ('kind = "rank"\nprimary_metric = "beauty"', "is not a metric of this kind"),
        ('kind = "generate"', "needs either `prompt` or `messages`"),
        ('kind = "generate"\nprompt = "{q}"\nverifier = "taste"', "is unknown"),
        ('kind = "generate"\nprompt = "{q}"\nverifier = "regex"', "pattern"),
        ('kind = "generate"\nprompt = "{q}"\nverifier = "json_schema"', "json_schema"),
        ('kind = "generate"\nprompt = "{q}"\nverifier = "python:none.such:f"', "cannot be imported"),
        ('kind = "text"\nname = "a b"', "name"),
    ],
)
def test_wrong_keys_name_themselves(write: Write, keys: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        write(keys, GOOD)


@pytest.mark.parametrize("data", ["missing.jsonl", "rows.xlsx", "broken.parquet"])
def test_data_files_that_cannot_be_read(tmp_path: Path, data: str) -> None:
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "mine.toml").write_text(f'kind = "text"\ndata = "{data}"\n')
    with pytest.raises(UserError, match=data):
        _ = load_workload_file(tmp_path / "mine.toml").splits


def test_duplicated_ids_of_a_group_stay_in_one_list_each(write: Write) -> None:
    workload = write(f'kind = "rank"\ngroup = "user"\n{ALL_QUALITY}', ranked(3, user=7))
    prompts = cast("list[ScoringPrompt]", workload.make_prompts("quality", 9))
    assert len({prompt.group for prompt in prompts}) == 1
    assert workload.splits.num_groups == 1
