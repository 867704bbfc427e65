"""Verifiers on answers that models really write."""

from pathlib import Path

import pytest

from slimserve.core.errors import UserError
from slimserve.workloads.verifiers import make_verifier


@pytest.mark.parametrize(
    ("name", "text", "answer", "is_right"),
    [
        ("exact", "  The  Answer ", "the answer", True),
        ("exact", "<think>no</think>\nParis", "Paris", True),
        ("exact", "Paris.", "Paris", False),
        ("number", "so 3 + 4 = 7, thus $1,234.50", "1234.5", True),
        ("number", "It is 7 or 8", "7", False),
        ("number", "none", "7", False),
        ("number", "-3", "3", False),
        ("number", "1e3", "1000", True),
        ("choice", "The answer is (B).", "B", True),
        ("choice", "A is wrong, so C", "c", True),
        ("choice", "Because", "B", False),
    ],
)
def test_verifiers_accept_right_answers_alone(name: str, text: str, answer: str, is_right: bool) -> None:
    assert make_verifier(name, Path())(text, answer) is is_right


def test_a_regular_expression_may_hold_the_answer() -> None:
    check = make_verifier("regex", Path(), pattern=r"Answer:\s*{answer}\b")
    assert check("Answer: a+b", "a+b")
    assert not check("Answer: aab", "a+b")
    with pytest.raises(UserError, match="is not a regular expression"):
        make_verifier("regex", Path(), pattern="(")


def test_a_json_schema_decides_without_a_reference(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(
        '{"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}'
    )
    check = make_verifier("json_schema", tmp_path, schema="schema.json")
    assert not check.needs_answer
    assert check('Here:\n```json\n{"n": 3}\n```', "")
    assert not check('{"n": "3"}', "")
    assert not check("n = 3", "")
    (tmp_path / "bad.json").write_text('{"type": "nothing"}')
    with pytest.raises(UserError, match="is not a JSON schema"):
        make_verifier("json_schema", tmp_path, schema="bad.json")


def test_a_function_beside_the_file_verifies(tmp_path: Path) -> None:
    (tmp_path / "my_check.py").write_text(
        "def check(text, answer):\n    return len(text) == int(answer)\n\n\n"
        "def fail(text, answer):\n    raise OSError(7)\n"
    )
    assert make_verifier("python:my_check:check", tmp_path)("abc", "3")
    with pytest.raises(UserError, match="failed"):
        make_verifier("python:my_check:fail", tmp_path)("abc", "3")
    with pytest.raises(UserError, match="names no function"):
        make_verifier("python:my_check", tmp_path)


@pytest.mark.parametrize(
    ("text", "answer", "is_right"),
    [
        (r"Thus $\frac{1}{2}$.", "0.5", True),
        (r"\boxed{2x + 2}", "2(x+1)", True),
        (r"$\sqrt{8}$", r"$2\sqrt{2}$", True),
        (r"\boxed{3}", "4", False),
    ],
)
def test_maths_equivalence(text: str, answer: str, is_right: bool) -> None:
    pytest.importorskip("math_verify")
    assert make_verifier("maths", Path())(text, answer) is is_right
