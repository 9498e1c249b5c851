"""What running requests notice of migrations, measured in one process and in one for each server."""

import json
import subprocess
import sys

import pytest

from launch.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--migrations", "0"], "--migrations 0: must be at least 1"),
        (["--think", "-1"], "--think -1.0: must be at least 0"),
        (["--model", "absent"], "absent"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments, message, capsys):
    assert main(["bench", "migrate", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_migrations_under_load_are_measured(processes):
    how = ["--processes"] if processes > 1 else []
    command = [sys.executable, "-m", "launch", "bench", "migrate", "--migrations", "2", "--json", *how]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=400)
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["processes"], found["migrations"], found["compilations"]) == (processes, 4, 0)
    assert found["copies_moved_share"] >= 0.2
    assert 0 < found["longest_gap_s"] < 10
    assert 0 < found["longest_gap_migrating_s"] < 10
    assert found["staged_bytes_per_s"] > 0
    # On all servers of a process together; an expert that is being read comes on top for each.
    assert found["peak_staged_bytes"] <= (3 if processes == 1 else 1) * found["staging_bytes"] + 10 * 98304
