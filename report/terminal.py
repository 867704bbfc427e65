"""Tables on the terminal that fit its width without breaking a word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_GAP = 2
"""Empty columns of characters between two columns of a table."""


def print_table(
    console: Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    numbers: bool = True,
) -> None:
    """Print a table; text wraps between words, and columns that do not fit follow in a further table.

    Each further table repeats the first column. `numbers` aligns all other columns to the right. Only a word that is
    longer than the terminal is wide is broken.
    """
    from rich.text import Text

    columns = list(zip(headings, *rows, strict=True))
    if title:
        console.print(Text(title, style="italic"), justify="left")
    for number, part in enumerate(_parts(columns, console.width)):
        if number:
            console.print()
        console.print(_table(part, console.width, numbers))


def _parts(columns: Sequence[tuple[str, ...]], width: int) -> Iterator[list[tuple[str, ...]]]:
    """Yield the columns of each table: as many as fit, and at least one besides the first."""
    first, *others = columns
    part = [first]
    left = width - _GAP - _narrowest(first)
    for column in others:
        left -= _GAP + _narrowest(column)
        if left < 0 and len(part) > 1:
            yield part
            part = [first]
            left = width - 2 * _GAP - _narrowest(first) - _narrowest(column)
        part.append(column)
    yield part


def _table(columns: Sequence[tuple[str, ...]], width: int, numbers: bool) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    has_header = any(column[0] for column in columns)
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, show_header=has_header)
    widths = [_narrowest(column) for column in columns]
    left = width - sum(widths) - _GAP * len(columns)
    for number, column in enumerate(columns):  # wider columns as long as there is room, from the left
        more = max(0, min(left, _widest(column) - widths[number]))
        widths[number] += more
        left -= more
    for number, (heading, *_) in enumerate(columns):
        justify = "right" if numbers and number else "left"
        table.add_column(Text(heading), justify=justify, width=min(widths[number], width), overflow="fold")  # type: ignore[arg-type]
    for cells in zip(*(column[1:] for column in columns), strict=True):
        table.add_row(*map(Text, cells))
    return table


def _narrowest(cells: Sequence[str]) -> int:
    from rich.cells import cell_len

    return max((cell_len(word) for cell in cells for word in cell.split()), default=1)


def _widest(cells: Sequence[str]) -> int:
    from rich.cells import cell_len

    return max((cell_len(line) for cell in cells for line in cell.split("\n")), default=1)
