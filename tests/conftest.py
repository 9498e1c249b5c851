"""Shared by all tests: eight virtual CPU devices, and a small random model that routes to all of its experts."""

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "allow")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
