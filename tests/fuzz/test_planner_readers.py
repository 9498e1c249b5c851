"""Damaged files and flags for `python -m placement`: each run ends with 0, or with 2 and one line, never with a traceback.

The long run prints its seed. `FUZZ_SEED=N python -m pytest -m slow tests/fuzz`
repeats it, and `FUZZ_RUNS` sets its length.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from placement.__main__ import main
from tests.fuzz.planner_inputs import damaged, make_corpus, recipes, run
from tests.helpers.paths import ROOT

SILENT = 60  # seconds without a next run before the process is taken for hanging where no signal reaches it


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder)
    return folder


def test_undamaged_inputs_are_taken(corpus, monkeypatch, capsys):
    """Otherwise damage to them would prove nothing."""
    monkeypatch.chdir(corpus)
    for recipe in recipes():
        assert main([recipe.command, *recipe.arguments]) == 0, (recipe, capsys.readouterr().err)
    for name in ("new.json", "new.npz", "new.npy"):
        Path(name).unlink(missing_ok=True)


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@given(st.integers(0, 2**40))
@settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_inputs(corpus, work, number):
    arguments = damaged(number, corpus, work)
    note(f"seed {number}: {[text[:80] for text in arguments]}")
    assert run(arguments) is None


@pytest.mark.slow
def test_many_damaged_inputs(tmp_path, fuzz_seed):
    """At least 20,000 runs in processes of limited memory: no traceback, no hang over 10 s, no crash, no more than 2 GB."""
    runs = int(os.environ.get("FUZZ_RUNS", "20000"))
    print(f"seed {fuzz_seed}, {runs} runs")
    wrong, start = [], 0
    while start < runs:
        found, start = child(fuzz_seed, start, runs - start, tmp_path)
        wrong += found
        if len(wrong) > 50:
            break
    print(f"{start} runs of seed {fuzz_seed}: {len(wrong)} went wrong")
    assert not wrong, json.dumps(wrong[:50], indent=1)


def child(seed: int, start: int, count: int, folder: Path) -> tuple[list[dict], int]:
    """What went wrong in one process, and the number of the first run that it has not made."""
    command = [sys.executable, "-m", "tests.fuzz.planner_child", *map(str, (seed, start, count, folder))]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    progress = folder / "progress"
    progress.write_text(str(start))
    with open(folder / "found", "w+") as out, open(folder / "err", "w+") as err:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err)
        ended = None
        while ended is None:
            try:
                ended = process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                if time.time() - progress.stat().st_mtime > SILENT:
                    process.kill()
                    ended = process.wait()
        out.seek(0)
        err.seek(0)
        found, said = [json.loads(line) for line in out], err.read()
    last = int(progress.read_text() or start)  # empty where the process ended while it wrote
    if ended == 0:
        return found, last
    if ended != 3:  # not for its memory, which is reported
        found.append({"number": last, "wrong": f"the process ended with {ended}: {said[-2000:]}"})
    return found, last + 1
