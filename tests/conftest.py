"""Shared by all tests: eight virtual CPU devices, and programs that live as long as the module that compiled them."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest

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
