"""Which arrays are moved to large pages, and that they stay what they are."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from dancemoe_jax import huge_pages
from dancemoe_jax.huge_pages import on_huge_pages


def test_large_arrays_are_asked_for_and_small_ones_are_left(monkeypatch):
    asked = []
    monkeypatch.setattr(huge_pages, "_ask", lambda address, size: asked.append((address, size)))
    monkeypatch.setattr(huge_pages, "_allowed", lambda: True)
    monkeypatch.setattr(sys, "platform", "linux")
    large, small = jnp.ones(2**21), jnp.ones(3)
    assert on_huge_pages({"a": large, "b": small, "c": np.ones(2**21)})["a"] is large
    assert asked == [(large.unsafe_buffer_pointer(), 2**23)]
    monkeypatch.setattr(huge_pages, "_allowed", lambda: False)
    on_huge_pages(large)
    assert len(asked) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the advice is Linux's")
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_what_is_moved_keeps_its_contents(kind, rng):
    numbers = rng.integers(-100, 100, (3, 2**21 + 5)).astype(kind)
    array = jnp.asarray(numbers)
    huge_pages._ask(array.unsafe_buffer_pointer(), array.nbytes)
    np.testing.assert_array_equal(array, numbers)
