"""Tables as plain text that fit a terminal: no borders, figures at the right. The one printer of all commands."""

import shutil
import textwrap
from collections.abc import Iterator, Sequence

WIDTH = 80  # where the output is no terminal and COLUMNS is not set
_GAP = 2


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", left: int = 1, width: int | None = None
) -> None:
    """Print a table that is no wider than the terminal where that is possible; see `table_lines`.

    Args:
        columns: heads, one a column.
        rows: cells, as many in each row as there are columns.
        title: a line above it.
        left: how many columns, from the first on, are text; the others are figures.
        width: characters of a line; None asks the terminal.
    """
    width = width or shutil.get_terminal_size((WIDTH, 24)).columns
    for line in [*textwrap.wrap(title, width), *table_lines(columns, rows, left=left, width=width)]:
        print(line)


def print_text(*sentences: str) -> None:
    """Print sentences as one paragraph that fits the terminal."""
    print(textwrap.fill(" ".join(sentences), shutil.get_terminal_size((WIDTH, 24)).columns, break_long_words=False))


def table_lines(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, width: int = WIDTH
) -> Iterator[str]:
    """Lines of a table; cells are never cut or wrapped.

    Where it is too wide, heads of several words stand on several lines and columns move together; where that is not
    enough, the columns that are left over follow below, beside the text columns once more.
    """
    if sum(_widths(columns, rows)) + _GAP * (len(columns) - 1) <= width:
        heads = [[column] for column in columns]
    else:
        cells = _widths([""] * len(columns), rows)
        heads = [textwrap.wrap(c, max(1, n, *map(len, c.split()))) for c, n in zip(columns, cells, strict=True)]
    sizes = _widths([max(head, key=len, default="") for head in heads], rows)
    gap = 1 if sum(sizes) + len(sizes) - 1 <= width < sum(sizes) + _GAP * (len(sizes) - 1) else _GAP
    for number, part in enumerate(_parts(sizes, left, width, gap)):
        if number:
            yield ""
        tall = max(len(heads[i]) for i in part)
        lines = [[([""] * tall + heads[i])[-tall:][line] for i in part] for line in range(tall)]
        for line in [*lines, *([row[i] for i in part] for row in rows)]:
            cells = (c.ljust(sizes[i]) if i < left else c.rjust(sizes[i]) for i, c in zip(part, line, strict=True))
            yield (" " * gap).join(cells).rstrip()


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]


def _parts(sizes: Sequence[int], left: int, width: int, gap: int) -> list[list[int]]:
    """Columns that stand beside each other: all text columns, then as many others as fit, at least one."""
    text = list(range(min(left, len(sizes))))
    parts, used = [], 0
    for i in range(len(text), len(sizes)):
        need = sizes[i] + gap
        if not parts or (used + need > width and len(parts[-1]) > len(text)):
            parts.append(list(text))
            used = sum(sizes[j] + gap for j in text) - gap
        parts[-1].append(i)
        used += need
    return parts or [text]
