"""Tests of all masks and windows against tables written by hand."""

from __future__ import annotations

import pytest

from slimserve.core.errors import UserError
from slimserve.distill.sections import Example, Section
from slimserve.distill.supervision import Supervision, parse_sections, sections_text, window_of

P, C, A = Section.PROMPT, Section.COT, Section.ANSWER
EXAMPLE = Example("x", tuple(range(10, 19)), (P, P, P, C, C, C, C, A, A), 3)


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("prompt", (1, 2)),
        ("cot", (3, 4, 5, 6)),
        ("answer", (7, 8)),
        ("prompt+cot", (1, 2, 3, 4, 5, 6)),
        ("prompt+answer", (1, 2, 7, 8)),
        ("cot+answer", (3, 4, 5, 6, 7, 8)),
        ("prompt+cot+answer", (1, 2, 3, 4, 5, 6, 7, 8)),
        ("all", (1, 2, 3, 4, 5, 6, 7, 8)),
    ],
)
def test_a_mask_chooses_targets_and_keeps_every_token(text: str, targets: tuple[int, ...]) -> None:
    supervised = Supervision(sections=text).apply(EXAMPLE)
    assert supervised.targets == targets
    assert supervised.tokens == EXAMPLE.tokens


@pytest.mark.parametrize(
    ("length", "share", "window", "expected"),
    [
        (9, 1.0, "left", (0, 9)),
        (9, 0.5, "left", (0, 4)),
        (9, 0.5, "right", (5, 9)),
        (9, 0.5, "middle", (2, 6)),
        (8, 0.25, "middle", (3, 5)),
        (9, 0.01, "left", (0, 1)),
        (9, 0.01, "right", (8, 9)),
        (1, 0.3, "middle", (0, 1)),
    ],
)
def test_windows_follow_the_papers_definition(
    length: int, share: float, window: str, expected: tuple[int, int]
) -> None:
    assert window_of(length, share, window) == expected  # type: ignore[arg-type]


def test_a_window_is_cut_before_sections_are_chosen() -> None:
    left = Supervision(sections="answer", lead_span=0.5, window="left")
    assert left.apply(EXAMPLE).targets == (), "the answer was cut off"
    right = Supervision(sections="answer", lead_span=0.5, window="right").apply(EXAMPLE)
    assert (right.tokens, right.targets) == ((15, 16, 17, 18), (2, 3))
    # The first token of a window has nothing before it.
    assert Supervision(sections="cot", lead_span=0.5, window="right").apply(EXAMPLE).targets == (1,)


def test_examples_without_a_target_are_left_out_and_having_no_example_is_an_error() -> None:
    longer = Example("y", tuple(range(4)), (P, A, A, A), 1)
    supervision = Supervision(sections="answer", lead_span=0.5, window="left")
    assert [one.name for one in supervision.apply_all([EXAMPLE, longer])] == ["y"]
    with pytest.raises(UserError, match=r"'answer in the left 50%' leaves no target in 1 examples"):
        supervision.apply_all([EXAMPLE])


def test_sections_are_parsed_and_printed() -> None:
    assert sections_text(parse_sections("answer + cot")) == "cot+answer"
    for bad in ("", "cot+", "cot+cot", "thought", "all+cot"):
        with pytest.raises(ValueError, match="join some of prompt, cot, answer"):
            parse_sections(bad)
