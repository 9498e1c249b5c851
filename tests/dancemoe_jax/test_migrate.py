"""Migration: only what is new is written, where it belongs, in the memory that is there; a refusal changes nothing."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from dancemoe_jax import ModelError, PlacementError, commit, migrate, resident_bytes, stage
from dancemoe_jax.expert_parallel.pool import buffers_of
from tests.helpers.cluster_of_devices import Small, random_resident


def contents(small, pool, slots):
    """Weights found in each expert's slot, by (device, layer, expert)."""
    buffers = buffers_of(small.layout, pool, small.mesh)
    found = {}
    for device, layer, expert in np.argwhere(slots >= 0):
        bank, place = small.layout.locate(int(slots[device, layer, expert]))
        found[device, layer, expert] = jax.tree.map(lambda a, at=place: np.asarray(a[at]), buffers[device][bank])
    return found


def pointers(pool):
    return [[shard.data.unsafe_buffer_pointer() for shard in bank.addressable_shards] for bank in jax.tree.leaves(pool)]


@pytest.mark.parametrize("seed", range(3))
def test_after_a_migration_every_slot_holds_its_expert(seed):
    rng = np.random.default_rng(seed)
    small = Small.make()
    slots, weights = small.place(random_resident(rng))
    pool, memory = weights.pool, resident_bytes(weights.pool, small.mesh)
    for _ in range(3):
        resident = random_resident(rng)
        pool, slots = migrate(pool, slots, resident, small.read, layout=small.layout, mesh=small.mesh)
        np.testing.assert_array_equal(slots >= 0, resident)
        for (_, layer, expert), found in contents(small, pool, slots).items():
            jax.tree.map(np.testing.assert_array_equal, found, small.read(layer, expert))
        np.testing.assert_array_equal(resident_bytes(pool, small.mesh), memory)


def test_migrations_write_into_the_memory_that_is_there(rng):
    small = Small.make()
    slots, weights = small.place(random_resident(rng))
    pool, buffers = weights.pool, pointers(weights.pool)
    for _ in range(4):
        pool, slots = migrate(pool, slots, random_resident(rng), small.read, layout=small.layout, mesh=small.mesh)
        assert pointers(pool) == buffers


def test_staging_reads_just_what_is_new_and_that_once(rng):
    small = Small.make()
    slots, _ = small.place(random_resident(rng))
    after = random_resident(rng)
    read = []
    staged = stage(
        small.layout,
        small.mesh,
        slots,
        after,
        lambda layer, expert: read.append((layer, expert)) or small.read(layer, expert),
    )
    new = after & (slots < 0)
    assert new.sum(0).max() > 1  # two devices get the same
    assert sorted(read) == [tuple(at) for at in np.argwhere(new.any(0)).tolist()]
    assert staged.nbytes == new.sum() * small.config.expert_params * 4
    assert stage(small.layout, small.mesh, slots, slots >= 0, small.read).nbytes == 0


def test_staging_that_fails_leaves_nobody_reading(rng):
    small = Small.make()
    slots, _ = small.place(random_resident(rng))
    after = random_resident(rng)
    first = tuple(np.argwhere((after & (slots < 0)).any(0))[0])
    slow, over = threading.Event(), []

    def read(layer, expert):
        if (layer, expert) == first:
            slow.wait(10)
            raise ModelError("damaged")
        slow.set()
        time.sleep(0.2)
        over.append((layer, expert))
        return small.read(layer, expert)

    with ThreadPoolExecutor(3) as threads:
        with pytest.raises(ModelError, match="damaged"):
            stage(small.layout, small.mesh, slots, after, read, threads)
        ended = len(over)
        time.sleep(0.5)
        assert len(over) == ended > 0


def test_a_refused_placement_changes_nothing(rng):
    small = Small.make()
    slots, weights = small.place(random_resident(rng))
    before = contents(small, weights.pool, slots)
    uncovered = random_resident(rng)
    uncovered[:, 1, 2] = False
    with pytest.raises(PlacementError, match="expert 2 of layer 1 is on no device"):
        migrate(weights.pool, slots, uncovered, small.read, layout=small.layout, mesh=small.mesh)
    for key, found in contents(small, weights.pool, slots).items():
        jax.tree.map(np.testing.assert_array_equal, found, before[key])


def test_writes_compile_once_for_each_bank(rng):
    from dancemoe_jax.expert_parallel.pool import _write

    small = Small.make()
    slots, weights = small.place(random_resident(rng))
    pool = weights.pool
    del weights
    for _ in range(2):
        pool = commit(
            pool,
            small.layout,
            small.mesh,
            staged := stage(small.layout, small.mesh, slots, random_resident(rng), small.read),
        )
        slots = staged.slots
    compiled = _write._cache_size()
    for _ in range(3):
        pool = commit(
            pool,
            small.layout,
            small.mesh,
            staged := stage(small.layout, small.mesh, slots, random_resident(rng), small.read),
        )
        slots = staged.slots
    assert _write._cache_size() == compiled
