"""Pools: no slot lost to banks, unequal memory really unequal, tiles give what the dense sum gives."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dancemoe_jax.expert_parallel.pool as pool_module
from dancemoe_jax import PlacementError, fill_pool, make_mesh, pool_layout, resident_bytes
from dancemoe_jax.expert_parallel.pool import ExpertPool, buffers_of
from dancemoe_jax.expert_parallel.slot_experts import slot_experts
from dancemoe_jax.model.experts import ExpertWeights, dense_experts
from tests.helpers.cluster_of_devices import Small, random_resident


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=9))
def test_banks_lose_no_slot_and_every_size_is_owned_by_all(capacity):
    layout = pool_layout(capacity)
    always = layout.banks[: min(layout.owned(d) for d in range(len(capacity)))]
    for device, slots in enumerate(capacity):
        assert sum(layout.banks[: layout.owned(device)]) == slots
        for bank in range(len(layout.banks)):
            assert layout.banks[layout.buffer(device, bank)] == layout.banks[bank]
            assert layout.buffer(device, bank) < layout.owned(device)
    assert set(layout.banks) <= set(always)
    assert sum(layout.banks) == max(capacity)
    for slot in range(max(capacity)):
        bank, place = layout.locate(slot)
        assert layout.starts[bank] + place == slot
        assert 0 <= place < layout.banks[bank]


@pytest.mark.parametrize("most", [1, 10**9])
def test_large_experts_are_written_one_by_one_and_small_ones_together(most, rng, monkeypatch):
    monkeypatch.setattr(pool_module, "WRITE_BYTES", most)
    calls, write = [], pool_module._write
    monkeypatch.setattr(
        pool_module, "_write", lambda bank, at, values: calls.append(len(at)) or write(bank, at, values)
    )
    small = Small.make()
    slots, weights = small.place(random_resident(rng))
    assert set(calls) == {1 if most == 1 else pool_module.WRITE_ROWS}
    for device, banks in buffers_of(small.layout, weights.pool, small.mesh).items():
        for layer, expert in np.argwhere(slots[device] >= 0):
            bank, row = small.layout.locate(int(slots[device, layer, expert]))
            np.testing.assert_array_equal(banks[bank].w_in[row], small.read(layer, expert).w_in)


def test_device_without_a_slot_is_refused():
    with pytest.raises(PlacementError, match="device 1 has room for no expert"):
        pool_layout([3, 0])


def test_pool_memory_is_what_the_capacities_say(rng):
    small = Small.make()
    _, weights = small.place(random_resident(rng))
    expected = np.array(small.layout.capacity) * small.config.expert_params * 4
    np.testing.assert_array_equal(resident_bytes(weights.pool, small.mesh), expected)
    # The arrays are larger than the memory: some buffers have two names.
    assert sum(a.nbytes for a in jax.tree.leaves(weights.pool)) > expected.sum()


def test_pool_holds_each_expert_in_its_slot(rng):
    small = Small.make()
    slots, weights = small.place(random_resident(rng))
    for device, own in buffers_of(small.layout, weights.pool, small.mesh).items():
        for layer, expert in np.argwhere(slots[device] >= 0):
            bank, place = small.layout.locate(int(slots[device, layer, expert]))
            jax.tree.map(
                lambda there, here, at=place: np.testing.assert_array_equal(there[at], here),
                own[bank],
                small.read(layer, expert),
            )


@pytest.mark.parametrize("tile", [1, 3, 8, 32])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_slot_experts_equals_the_dense_sum(tile, tokens, native, rng):
    slots, hidden, inner, k = 11, 16, 8, 3
    w_in = jnp.asarray(rng.normal(size=(slots, 2 * inner, hidden)), jnp.float32)
    w_out = jnp.asarray(rng.normal(size=(slots, hidden, inner)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(tokens, hidden)), jnp.float32)
    ids = rng.integers(0, slots, (tokens, k)).astype(np.int32)
    weights = rng.random((tokens, k)).astype(np.float32)
    skipped = rng.random((tokens, k)) < 0.4
    layout = pool_layout([11])
    split = np.cumsum(layout.banks)[:-1]
    pool = ExpertPool(tuple(map(ExpertWeights, jnp.split(w_in, split), jnp.split(w_out, split))))
    got = slot_experts(pool, x, jnp.where(skipped, -1, ids), jnp.asarray(weights), native=native, tile=tile)
    expected = dense_experts(x, ExpertWeights(w_in, w_out), jnp.where(skipped, 0, weights), jnp.asarray(ids))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_slot_experts_with_nothing_to_do_gives_zeros(native):
    pool = ExpertPool((ExpertWeights(jnp.ones((2, 4, 4)), jnp.ones((2, 4, 2))),))
    nothing = jnp.full((3, 2), -1), jnp.full((3, 2), jnp.nan)
    out = slot_experts(pool, jnp.ones((3, 4)), *nothing, native=native, tile=4)
    np.testing.assert_array_equal(out, 0)


def test_bfloat16_experts_are_computed_without_a_copy_of_the_pool(native, rng):
    slots, hidden, inner, tokens, k = 64, 64, 32, 5, 2
    held = ExpertWeights(*(rng.normal(size=shape) for shape in ((slots, 2 * inner, hidden), (slots, hidden, inner))))
    held = jax.tree.map(lambda w: w.astype(ml_dtypes.bfloat16), held)
    layout, mesh = pool_layout([slots]), make_mesh(jax.devices()[:1])
    where = np.arange(slots, dtype=np.int32)[None, None]
    pool = fill_pool(mesh, layout, where, lambda layer, expert: jax.tree.map(lambda w: w[expert], held))
    assert resident_bytes(pool, mesh) == [sum(w.nbytes for w in held[:2])]
    ids = jnp.asarray(rng.integers(0, slots, (tokens, k)), jnp.int32)
    weights, x = jnp.asarray(rng.random((tokens, k)), jnp.float32), jnp.asarray(rng.normal(size=(tokens, hidden)))

    @jax.jit
    def three_layers(pool, x):
        def layer(x, _):
            return slot_experts(pool, x, ids, weights, native=native, tile=4).astype(x.dtype), None

        return jax.lax.scan(layer, x, None, length=3)[0]

    program = three_layers.lower(pool, x.astype(jnp.bfloat16)).compile()
    assert program.memory_analysis().temp_size_in_bytes < resident_bytes(pool, mesh)[0] / 4
    exact, y = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), held), x.astype(jnp.bfloat16).astype(jnp.float32)
    for _ in range(3):
        y = dense_experts(y, exact, weights, ids)
    got = np.asarray(program(pool, x.astype(jnp.bfloat16)), np.float32)
    assert np.abs(got - y).max() < 0.03 * np.abs(y).max()
