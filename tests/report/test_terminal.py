"""Tests of tables on the terminal: they fit its width and break no word."""

from __future__ import annotations

import io
import random
import re

import pytest
from rich.console import Console

from slimserve.report.terminal import print_table


def printed(width: int, headings: list[str], rows: list[list[str]], numbers: bool = True) -> list[str]:
    file = io.StringIO()
    print_table(Console(file=file, width=width), headings, rows, numbers=numbers)
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_a_table_fits_the_terminal_and_breaks_no_word(width: int) -> None:
    draw = random.Random(width)
    for _ in range(30):
        num_columns = draw.randint(1, 12)
        words = [f"w{number}{'x' * draw.randint(0, 12)}" for number in range(200)]
        cells = [
            [" ".join(draw.choices(words, k=draw.randint(0, 4))) for _ in range(num_columns)]
            for _ in range(draw.randint(1, 5))
        ]
        headings = [f"h{number} {draw.choice(words)}" for number in range(num_columns)]
        lines = printed(width, headings, cells, numbers=draw.random() < 0.5)
        assert max(map(len, lines)) <= width
        shown = " ".join(lines).split()
        for word in {word for row in [headings, *cells] for cell in row for word in cell.split()}:
            assert word in shown


def test_columns_that_do_not_fit_follow_with_the_first_column() -> None:
    rows = [["alpha", "1" * 20, "2" * 20, "3" * 20], ["beta", "4" * 20, "5" * 20, "6" * 20]]
    lines = printed(60, ["variant", "a", "b", "c"], rows)
    assert sum("variant" in line for line in lines) == sum("alpha" in line for line in lines) == 2
    assert re.search(rf"alpha +{'1' * 20} +{'2' * 20}", "\n".join(lines))
    assert re.search(rf"alpha +{'3' * 20}", "\n".join(lines))


def test_a_wide_terminal_gets_one_table_without_wrapped_lines() -> None:
    lines = printed(120, ["variant", "a b c"], [["one two three", "9"]])
    assert len(lines) == 3
    assert "one two three" in lines[2]


def test_a_word_that_is_wider_than_the_terminal_is_shown_in_full() -> None:
    lines = printed(20, ["a", "b"], [["x" * 50, "1"]])
    assert max(map(len, lines)) <= 20
    assert "".join(lines).count("x") == 50
