"""All readers of users' data files: borders of texts, and a thousand damaged files for each of them.

A reader is named by the command that reads the file. Every outcome is success, or one error line that names the file,
and its line unless the file as a whole is at fault.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from transformers import AutoTokenizer

from slimserve.compress import calibration
from slimserve.core.errors import UserError
from slimserve.distill.data import load_examples
from slimserve.loadtest.prompts import make_prompts
from slimserve.loadtest.settings import SuiteOptions
from slimserve.serve.policy.keys import load_api_keys
from slimserve.workloads.interface import ChatPrompt, ChoicePrompt, ScoringPrompt, TextPrompt
from slimserve.workloads.kinds import load_workload_file
from slimserve.workloads.recommendation import Recommendation

NUM_FILES = 1000
ALL_QUALITY = "[split]\ncalibration = 0\nquality = 1\nload = 0\n"


@dataclass(frozen=True)
class Reader:
    """A reader with a valid file for it."""

    file: str
    rows: Callable[[Sequence[str]], str]
    """Makes the content of a file that holds each of the texts once, without line feeds in them."""
    read: Callable[[Path], list[str]]
    """Returns the texts of a file in this folder, in any order and with anything around them."""


def jsonl(row: Callable[[str], dict[str, Any]]) -> Callable[[Sequence[str]], str]:
    return lambda texts: "".join(json.dumps(row(text), ensure_ascii=False) + "\n" for text in texts)


def write_once(file: Path, text: str) -> None:
    """Write a file that does not exist; replacing one takes a millisecond."""
    if not file.exists():
        file.write_text(text)


def workload(keys: str, text_of: Callable[[Any], str]) -> Callable[[Path], list[str]]:
    def read(folder: Path) -> list[str]:
        file = folder / "mine.toml"
        write_once(file, f"{keys}\n{ALL_QUALITY}")
        return [text_of(prompt) for prompt in load_workload_file(file).make_prompts("quality", 999)]

    return read


def chat_rows(folder: Path) -> list[str]:
    prompts = make_prompts("chat", SuiteOptions(data=str(folder / "chats.jsonl")), 4)
    return [str(cast("ChatPrompt", prompt).messages[-1]["content"]) for _, prompt in prompts]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


TOKENIZER: dict[str, Any] = {}


@pytest.fixture(scope="module", autouse=True)
def _known_model(smollm2: Path, tokenizer: Any) -> None:
    TOKENIZER.update(directory=smollm2, tokenizer=tokenizer)


def distillation(folder: Path) -> list[str]:
    examples = load_examples(TOKENIZER["tokenizer"], TOKENIZER["directory"], str(folder / "chats.jsonl"), 99, 0, 512, 0)
    return [TOKENIZER["tokenizer"].decode(one.tokens) for one in examples.training]


def calibrated(name: str) -> Callable[[Path], list[str]]:
    def read(folder: Path) -> list[str]:
        source = str(folder / name)
        num_tokens = calibration.load_calibration(TOKENIZER["directory"], source, 9999, 1).tokens_NT.numel()
        found = calibration.load_calibration(TOKENIZER["directory"], source, 1, num_tokens)
        return [TOKENIZER["tokenizer"].decode(found.tokens_NT.flatten())]

    return read


def recommendation(folder: Path) -> list[str]:
    source = Recommendation(data=folder, history_len=2, num_candidates=1)
    prompts = [one for split in ("calibration", "quality", "load") for one in source.make_prompts(split, 99)]
    return [cast("ScoringPrompt", one).solved for one in prompts]


def ratings(texts: Sequence[str]) -> str:
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [f"{user}\t{number}\t{number % 5 + 1}\t{number}" for user in range(4) for number in range(len(texts))]
    return "\n".join(lines) + "\n"


def titles(texts: Sequence[str]) -> str:
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token"]
    return "\n".join([*lines, *(f"{number}\t{text}\t1995" for number, text in enumerate(texts))]) + "\n"


def items(name: str) -> Callable[[Path], list[str]]:
    """Return a reader of atomic files in which the other file than `name` is sound."""

    def read(folder: Path) -> list[str]:
        other = "a.item" if name == "a.inter" else "a.inter"
        write_once(folder / other, {"a.item": titles, "a.inter": ratings}[other](["x", "y", "z"]))
        return recommendation(folder)

    return read


def judged(folder: Path) -> list[str]:
    write_once(folder / "qrels.txt", "q0 0 d 1\nq1 0 d 1\nq2 0 d 1\n")
    write_once(folder / "corpus.tsv", "d\tdocument\n")
    keys = 'kind = "rank"\nqrels = "qrels.txt"\nqueries = "queries.tsv"\ncorpus = "corpus.tsv"\nmax_unusable = 0.0'
    return workload(keys, lambda prompt: prompt.query)(folder)


READERS = {
    "workload text of JSONL": Reader(
        "data.jsonl",
        jsonl(lambda text: {"text": text, "n": 1}),
        workload('kind = "text"\ndata = "data.jsonl"', lambda prompt: cast("TextPrompt", prompt).text),
    ),
    "workload rank of JSONL": Reader(
        "data.jsonl",
        jsonl(lambda text: {"query": text, "items": ["a", "b"], "grades": [0, 1]}),
        workload('kind = "rank"\ndata = "data.jsonl"', lambda prompt: cast("ScoringPrompt", prompt).query),
    ),
    "workload generate of JSONL": Reader(
        "data.jsonl",
        jsonl(lambda text: {"chat": [{"role": "user", "content": text}], "answer": "5"}),
        workload('kind = "generate"\nmessages = "chat"\ndata = "data.jsonl"', lambda prompt: prompt.question),
    ),
    "workload classify of CSV": Reader(
        "data.csv",
        lambda texts: "text,label\n" + "".join('"' + text.replace('"', '""') + '",a\n' for text in texts),
        workload(
            'kind = "classify"\nlabels = ["a", "b"]\ndata = "data.csv"',
            lambda prompt: cast("ChoicePrompt", prompt).query,
        ),
    ),
    "workload text of TSV": Reader(
        "data.tsv",
        lambda texts: "text\tnumber\n" + "".join('"' + text.replace('"', '""') + '"\t1\n' for text in texts),
        workload('kind = "text"\ndata = "data.tsv"', lambda prompt: cast("TextPrompt", prompt).text),
    ),
    "queries of judgements": Reader(
        "queries.tsv", lambda texts: "".join(f"q{number}\t{text}\n" for number, text in enumerate(texts)), judged
    ),
    "loadtest chat": Reader("chats.jsonl", jsonl(lambda text: {"prompt": text}), chat_rows),
    "loadtest chat of messages": Reader(
        "chats.jsonl",
        jsonl(lambda text: {"messages": [{"role": "user", "content": text}], "temperature": 0.5}),
        chat_rows,
    ),
    "distill": Reader("chats.jsonl", jsonl(lambda text: {"prompt": "2 + 3?", "completion": text}), distillation),
    "distill of messages": Reader(
        "chats.jsonl",
        jsonl(
            lambda text: {
                "messages": [
                    {"role": "user", "content": "2 + 3?"},
                    {"role": "assistant", "content": "5", "reasoning": text},
                ]
            }
        ),
        distillation,
    ),
    "compress with texts": Reader("text.jsonl", jsonl(lambda text: {"text": text}), calibrated("text.jsonl")),
    "compress with a text": Reader("text.txt", lambda texts: "\n\n".join(texts) + "\n", calibrated("text.txt")),
    "item titles": Reader("a.item", titles, items("a.item")),
}
MORE = {
    "ratings": Reader("a.inter", ratings, items("a.inter")),
    "compress with token ids": Reader(
        "ids.jsonl", jsonl(lambda text: {"input_ids": list(text.encode())}), calibrated("ids.jsonl")
    ),
}
"""Readers of files without texts."""


@pytest.fixture(autouse=True)
def _one_tokenizer(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """Loading the tokenizer takes half a second."""
    monkeypatch.setattr(calibration, "load_tokenizer", lambda _: tokenizer)


BORDERS = {
    "line separator": "one\u2028two",
    "paragraph separator": "one\u2029two",
    "next line": "one\u0085two",
    "vertical tab": "one\vtwo",
    "form feed": "one\ftwo",
    "file separator": "one\x1ctwo",
    "record separator": "one\x1etwo",
    "byte order mark within": "one\ufefftwo",
    "null character": "one\x00two",
    "no-break space": "one\u00a0two",
    "emoji of two halves": "one\U0001f600two",
    "carriage return in a quoted text": "one\rtwo",
}


@pytest.mark.parametrize("border", BORDERS.values(), ids=list(BORDERS))
@pytest.mark.parametrize("reader", READERS.values(), ids=list(READERS))
def test_a_text_ends_where_its_line_ends(tmp_path: Path, reader: Reader, border: str) -> None:
    texts = [border, "plain", f"last {border} end"]
    (tmp_path / reader.file).write_bytes(reader.rows(texts).encode())
    found = reader.read(tmp_path)
    assert all(any(text in one for one in found) for text in texts)


FORMS: dict[str, Callable[[bytes], bytes]] = {
    "byte order mark": lambda content: b"\xef\xbb\xbf" + content,
    "CRLF": lambda content: content.replace(b"\n", b"\r\n"),
    "no last line feed": lambda content: content.rstrip(b"\n"),
    "empty lines at the end": lambda content: content + b"\n\n",
    "byte order mark and CRLF": lambda content: b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
@pytest.mark.parametrize("reader", [*READERS.values(), *MORE.values()], ids=[*READERS, *MORE])
def test_files_of_windows_and_other_editors_are_read_alike(
    tmp_path: Path, reader: Reader, form: Callable[[bytes], bytes]
) -> None:
    content = reader.rows(["a first text", "another one", "and a third"]).encode()
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / reader.file).write_bytes(content)
    (tmp_path / reader.file).write_bytes(form(content))
    expected = reader.read(tmp_path / "plain")
    assert len(expected) > 0
    assert sorted(reader.read(tmp_path)) == sorted(expected)


NO_TEXTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "half of a surrogate pair": (lambda content: content.replace(b"another", b"\\ud83d"), "holds half of a surrogate"),
    "the other half": (lambda content: content.replace(b"another", b"\\ude00 \\ud83d"), "holds half of a surrogate"),
    "Latin-1": (lambda content: content.replace(b"another", b"caf\xe9"), "is not UTF-8"),
    "a surrogate in UTF-8": (lambda content: content.replace(b"another", b"\xed\xa0\xbd"), "is not UTF-8"),
    "a cut character": (lambda content: content.replace(b"another", b"\xf0\x9f"), "is not UTF-8"),
    "UTF-16": (lambda content: content.decode().encode("utf-16"), "is UTF-16"),
}


@pytest.mark.parametrize(
    ("reader", "damage", "message"),
    [
        pytest.param(reader, damage, message, id=f"{name}-{damaged}")
        for name, reader in READERS.items()
        for damaged, (damage, message) in NO_TEXTS.items()
        if "surrogate" not in message or "json" in reader.file  # only JSON can write half of a pair
    ],
)
def test_what_is_no_text_is_one_error_line_that_names_the_line(
    tmp_path: Path, reader: Reader, damage: Callable[[bytes], bytes], message: str
) -> None:
    content = reader.rows(["a first text", "another one", "and a third"]).encode()
    number = content[: content.index(b"another")].count(b"\n") + 1
    (tmp_path / reader.file).write_bytes(damage(content))
    with pytest.raises(UserError) as error:
        reader.read(tmp_path)
    text = str(error.value)
    assert message in text
    assert (f"{reader.file}:{number}" in text) == ("UTF-16" not in message)
    assert "\n" not in text
    text.encode()


def test_a_file_of_keys_with_a_byte_order_mark_holds_the_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbffirst\r\nsecond\r\n")
    assert load_api_keys({"SLIMSERVE_API_KEYS_FILE": str(file)}) == {"first", "second"}


def test_a_workload_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    file = tmp_path / "mine.toml"
    file.write_bytes(b"\xef\xbb\xbf" + f'kind = "text"\r\ndata = "data.jsonl"\r\n{ALL_QUALITY}'.encode())
    assert len(load_workload_file(file).make_prompts("quality", 9)) == 1


@pytest.mark.parametrize("column", ["rating", "timestamp"])
@pytest.mark.parametrize("value", ["n/a", "", "nan", "inf", "2024-05-01T12:00:00Z", "four", "1,5", "0x10", "--"])
def test_a_rating_or_a_time_that_is_no_number_is_named_before_the_load_begins(
    tmp_path: Path, column: str, value: str
) -> None:
    (tmp_path / "a.item").write_text(titles(["x", "y", "z"]))
    lines = ratings(["x", "y", "z"]).split("\n")
    fields = lines[7].split("\t")
    fields[("user_id", "item_id", "rating", "timestamp").index(column)] = value
    lines[7] = "\t".join(fields)
    (tmp_path / "a.inter").write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"a\.inter:8' has .* in the column {column}, not a number"):
        make_prompts("recommendation", SuiteOptions(data=str(tmp_path), history="2", candidates="1"), 1)


WEIRD = [None, True, -1, 0, 1e300, "", "\ud83d", "\u2028", [], {}, [None], {"a": 1}, "x" * 300, 2**70, [[["a"]]], "NaN"]
KEYS = ["messages", "prompt", "completion", "conversations", "tools", "max_tokens", "output_tokens", "text", "role"]
BYTES = [
    b"\xff",
    b"\x00",
    b"\r",
    b"\n",
    b'"',
    b"\t",
    b",",
    b"\\ud83d",
    b"\xe2\x80\xa8",
    b"{",
    b"]",
    b"NaN",
    b"\xef\xbb\xbf",
]


def damaged(content: bytes, draw: random.Random, is_json: bool) -> bytes:
    """Return the content with one to three faults in its values, its lines or its bytes."""
    for _ in range(draw.randint(1, 3)):
        kind = draw.randrange(8)
        lines = content.split(b"\n")
        number = draw.randrange(len(lines))
        at = draw.randrange(len(content) + 1)
        if is_json and kind < 4:
            lines[number] = damaged_row(lines[number], draw)
        elif kind < 2:
            fields = lines[number].split(b"\t")
            fields[draw.randrange(len(fields))] = draw.choice([b"", b"n/a", b"-1", b"\xff", b"1e999", b"a\tb", b'"'])
            lines[number] = b"\t".join(fields)
        elif kind == 4:
            lines.insert(number, draw.choice(lines))
        elif kind == 5:
            del lines[number]
        elif kind == 6:
            lines = [content[:at], content[at + draw.randint(1, 20) :]]
            content = b"".join(lines)
            continue
        else:
            content = content[:at] + draw.choice(BYTES) + content[at:]
            continue
        content = b"\n".join(lines)
    return content


def damaged_row(line: bytes, draw: random.Random) -> bytes:
    try:
        row = json.loads(line)
    except ValueError:
        return line + b"}"
    if not isinstance(row, dict):
        return line + b","
    place, key = row, draw.choice([*row, draw.choice(KEYS)])
    while isinstance(place.get(key), list) and place[key] and isinstance(place[key][0], dict) and draw.random() < 0.8:
        place = draw.choice(place[key])
        if not isinstance(place, dict) or not place:
            return line
        key = draw.choice([*place])
    if draw.random() < 0.3:
        place.pop(key, None)
    else:
        place[key] = draw.choice(WEIRD)
    return json.dumps(row, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")


WHOLE_FILE = re.compile(
    r"has no rows|is empty|has no conversation|leaves no training example|is UTF-16|mixes text|less than one sequence"
)


FUZZED = {*READERS, *MORE} - {"workload text of JSONL", "workload text of TSV", "loadtest chat", "distill"}
"""One name for each reader; the others only have further forms of rows."""


@pytest.mark.parametrize("name", sorted(FUZZED))
def test_a_thousand_damaged_files_are_read_or_are_one_error_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = {**READERS, **MORE}[name]
    draw = random.Random(f"damage {name}")
    texts = ["a first text", "another \u2028 one, with a comma", "and a third"]
    content = reader.rows(texts).encode()
    num_read = num_refused = 0
    slowest_s = 0.0
    for _ in range(NUM_FILES):
        damaged_content = damaged(content, draw, "json" in reader.file)
        (tmp_path / reader.file).unlink(missing_ok=True)
        (tmp_path / reader.file).write_bytes(damaged_content)
        begun = time.monotonic()
        try:
            found = reader.read(tmp_path)
        except UserError as error:
            num_refused += 1
            text = str(error)
            text.encode()
            assert "\n" not in text
            assert len(text) < 1000, text
            is_named = re.search(rf"({re.escape(reader.file)}|qrels\.txt):\d+", text)
            assert is_named or WHOLE_FILE.search(text), (damaged_content, text)
        else:
            num_read += 1
            assert all(isinstance(one, str) for one in found)
        slowest_s = max(slowest_s, time.monotonic() - begun)
    assert num_read + num_refused == NUM_FILES
    assert num_read > 50, "the damage is not all fatal"
    assert num_refused > 50, "and not all harmless"
    assert slowest_s < 10
    assert "Traceback" not in capsys.readouterr().err
