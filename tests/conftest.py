"""Shared by all tests: eight virtual CPU devices, and compiled programs that are kept on disk between tests and runs.

Most of the suite's time would go into compiling the same programs again: in every worker, in every process that a test starts, and in
every run. They are kept in `.pytest_cache/jax`; a test that counts compilations counts them all the same.
"""

import os
from collections.abc import Iterator

from tests.helpers.paths import ROOT

for _name, _value in {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache/jax"),
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2 * 10**9),  # with a limit jax takes a lock, so that workers may share it
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}.items():
    os.environ.setdefault(_name, _value)

import jax  # noqa: E402  (it reads the environment when it is imported)
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "allow")


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module() -> Iterator[None]:
    """Compiled programs are dropped after each module: every one holds memory mappings, and a process may have 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
