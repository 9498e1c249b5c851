"""Shared by all tests: eight virtual CPU devices, and compiled programs that are kept on disk between tests and runs.

Most of the suite's time would go into compiling the same programs again: in every process that a test starts, and in
every run. They are kept in `.pytest_cache/jax`; a test that counts compilations counts them all the same.
"""

import os
import random
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from dancemoe_jax.kernels import library
from tests.helpers.paths import ROOT

_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")  # jax does not let several processes write at once
for _name, _value in {
    "jax_compilation_cache_dir": str(ROOT / ".pytest_cache/jax" / _WORKER),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}.items():
    jax.config.update(_name, type(_value)(os.environ.setdefault(_name.upper(), str(_value))))  # and in what tests start

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.devices()  # now, before a command that a test runs here asks for fewer


def pytest_configure(config: pytest.Config) -> None:
    """Draw the seed of the long random runs before pytest-xdist starts its workers, which inherit the environment."""
    os.environ.setdefault("FUZZ_SEED", str(random.SystemRandom().randrange(2**31)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    seed = os.environ["FUZZ_SEED"]
    if config.getoption("markexpr") == "slow":
        terminalreporter.write_line(f"seed {seed} of the long random runs; FUZZ_SEED={seed} repeats them")


@pytest.fixture(scope="session")
def fuzz_seed() -> int:
    """One for a whole run, whatever number of processes it has."""
    return int(os.environ["FUZZ_SEED"])


# Here the subject is what the compiler makes of a program: its bits, its copies, its time. These are compiled as users' are.
_OPTIMIZED = {
    "test_arrivals",
    "test_compile_cache",
    "test_cost",
    "test_demo_and_train",
    "test_gpu_kernels",
    "test_gpu_programs",
    "test_kernels",
    "test_reproducible",
    "test_same_steps",
}


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiled without LLVM's slower passes, in what the tests start too, which takes a third less time.

    Compiled programs are dropped after each module: every one holds memory mappings, and a process may have 65,530.
    """
    quick = request.module.__name__.rpartition(".")[2] not in _OPTIMIZED
    jax.config.update("jax_disable_most_optimizations", quick)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quick))
    yield
    jax.clear_caches()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(params=["xla", "native"])
def native(request: pytest.FixtureRequest) -> bool:
    """Both ways to compute on CPUs; the native one only where there is a compiler for it."""
    if request.param == "native" and library.load() is None:
        pytest.skip("no C++ compiler")
    return request.param == "native"
