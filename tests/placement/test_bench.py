"""python -m placement bench: what it measures, what it prints, what it refuses."""

import json

import numpy as np
import pytest

from placement.__main__ import main
from placement.commands.bench import measure, synthetic


def test_table_and_json(capsys):
    arguments = ["bench", "--strategies", "dance,exact", "--sizes", "2x8x3x2,4x8x3x2"]
    assert main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [(row["strategy"], row["size"]) for row in rows] == [
        (name, [layers, 8, 3, 2]) for name in ("dance", "exact") for layers in (2, 4)
    ]
    assert [row["growth"] is None for row in rows] == [True, False, True, False]
    assert rows[2]["gap"] == rows[3]["gap"] == 0
    assert all(row["peak_bytes"] > 2**20 and row["seconds"] > 0 for row in rows)
    assert main(["bench", "--strategies", "uniform", "--sizes", "2x8x3x2"]) == 0
    assert "2x8x3x2" in capsys.readouterr().out


def test_synthetic_memory_is_the_copies_asked_for_and_uneven():
    problem = synthetic(6, 16, 4, 3, copies=1.5, seed=0)
    assert 0 <= problem.budget.sum() - 1.5 * 6 * 16 < 12
    assert problem.budget.max() > 1.5 * problem.budget.min()
    assert (problem.frequency == synthetic(6, 16, 4, 3, copies=1.5, seed=0).frequency).all()
    assert (problem.frequency != synthetic(6, 16, 4, 3, copies=1.5, seed=1).frequency).any()


def test_the_optimum_is_no_worse_than_any_other():
    shares = [measure(name, (3, 16, 3, 2), 1.3, 0)["remote_share"] for name in ("exact", "dance", "eplb", "uniform")]
    assert shares[0] == min(shares)
    assert np.isclose(measure("exact", (3, 16, 3, 2), 1.3, 0)["remote_share"], shares[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategies", "best"], "--strategies: 'best' is unknown; choose from uniform"),
        (["--sizes", "58x256"], "--sizes: '58x256': must be LxExNxG"),
        (["--sizes", "0x1x1x1"], "must be LxExNxG"),
        (["--sizes", "99999x99999x9x9"], "choose a smaller one"),
        (["--copies", "0.5"], "--copies = 0.5: must be from 1 to 1000"),
        (["--copies", "nan"], "--copies = nan: must be from 1 to 1000"),
    ],
)
def test_refuses(capsys, arguments, message):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
