"""The seed of the long runs, printed so that one can be repeated."""

import os
import random

import pytest

SEED = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(2**32))


@pytest.fixture(scope="session")
def fuzz_seed() -> int:
    return SEED


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"fuzz: seed {SEED} of the long runs; FUZZ_SEED={SEED} repeats them")
