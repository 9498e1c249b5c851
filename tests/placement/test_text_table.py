"""Tables of all commands: every cell whole, figures at the right, no line wider than the terminal."""

import random

import pytest

from placement.text_table import print_table, print_text, table_lines

COLUMNS = ["strategy", "remote", "bytes a token", "decode", "balance"]
ROWS = [["uniform", "0.681", "1.2 MB", "12.5 ms", "1.20"], ["dance", "0.367", "640 kB", "9.1 ms", "1.05"]]


def test_figures_stand_at_the_right_below_their_heads():
    assert list(table_lines(COLUMNS, ROWS)) == [
        "strategy  remote  bytes a token   decode  balance",
        "uniform    0.681         1.2 MB  12.5 ms     1.20",
        "dance      0.367         640 kB   9.1 ms     1.05",
    ]


def test_heads_of_several_words_are_stacked_before_columns_move():
    assert list(table_lines(COLUMNS, ROWS, width=44)) == [
        "                   bytes",
        "                       a",
        "strategy  remote   token   decode  balance",
        "uniform    0.681  1.2 MB  12.5 ms     1.20",
        "dance      0.367  640 kB   9.1 ms     1.05",
    ]


def test_columns_move_together_before_some_move_below():
    lines = list(table_lines(COLUMNS, ROWS, width=39))
    assert lines[-1] == "dance     0.367 640 kB  9.1 ms    1.05"
    assert "" not in lines


def test_columns_that_do_not_fit_follow_below_beside_the_text():
    lines = list(table_lines(COLUMNS, ROWS, width=30))
    assert max(map(len, lines)) <= 30
    assert lines.count("") == 1
    below = lines[lines.index("") + 1 :]
    assert [line.split()[0] for line in below] == ["strategy", "uniform", "dance"]


@pytest.mark.parametrize("seed", range(40))
def test_no_cell_is_lost_at_any_width(seed):
    draw = random.Random(seed)
    columns = ["".join(draw.choices("ab c", k=draw.randint(0, 14))).strip() for _ in range(draw.randint(1, 9))]
    rows = [[f"{r}x{c}" + "9" * draw.randint(0, 6) for c in range(len(columns))] for r in range(draw.randint(0, 4))]
    left, width = draw.randint(0, 3), draw.randint(20, 100)
    lines = list(table_lines(columns, rows, left=left, width=width))
    words = " ".join(lines).split()
    assert all(cell in words for row in rows for cell in row)
    widest = max([len(cell) for row in [columns, *rows] for cell in row], default=0)
    assert all(len(line) <= max(width, (min(left, len(columns)) + 1) * (widest + 2)) for line in lines)
    assert all(line == line.rstrip() for line in lines)


def test_the_terminal_decides_the_width(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "30")
    print_table(COLUMNS, ROWS, title="what every strategy would cost on this cluster")
    print_text("One sentence that is longer than thirty.", "And another.")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 30
    assert lines[0] == "what every strategy would cost"
