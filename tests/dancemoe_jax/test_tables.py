"""Tables: stable slots, nearest copy first, load shared by a fixed rule."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dancemoe_jax import DanceMoEError, assign_slots, pool_layout, routing_tables
from tests.helpers.cluster_of_devices import CAPACITY, DEVICE_SERVER, random_resident

LAYOUT = pool_layout(CAPACITY, DEVICE_SERVER)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_slots_are_distinct_in_range_and_stable(seed):
    rng = np.random.default_rng(seed)
    first, second = random_resident(rng), random_resident(rng)
    old = assign_slots(LAYOUT, first)
    new = assign_slots(LAYOUT, second, previous=old)
    for resident, slots in ((first, old), (second, new)):
        np.testing.assert_array_equal(slots >= 0, resident)
        for device, capacity in enumerate(CAPACITY):
            used = slots[device][slots[device] >= 0]
            assert len(set(used.tolist())) == len(used)
            assert used.max(initial=0) < capacity
    stays = first & second
    np.testing.assert_array_equal(new[stays], old[stays])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_every_source_uses_a_nearest_copy(seed):
    rng = np.random.default_rng(seed)
    slots = assign_slots(LAYOUT, random_resident(rng))
    cost = rng.permutation(9).reshape(3, 3).astype(float)
    tables = routing_tables(LAYOUT, slots, cost)
    for source, layer, expert in np.ndindex(tables.device.shape):
        chosen = tables.device[source, layer, expert]
        assert tables.slot[source, layer, expert] == slots[chosen, layer, expert] >= 0

        def distance(device, source=source):
            here, there = DEVICE_SERVER[source], DEVICE_SERVER[device]
            return (device != source, here != there, cost[here, there] if here != there else 0)

        holders = [d for d in range(len(CAPACITY)) if slots[d, layer, expert] >= 0]
        assert distance(chosen) == min(map(distance, holders))
    away = (np.arange(4)[:, None, None] != tables.device).any(2).T  # [layers, source]
    np.testing.assert_array_equal(tables.needs.any((1, 2)), away)
    for layer, source, target, entry in np.argwhere(tables.needs):
        used = DEVICE_SERVER[tables.device[entry, layer]]
        assert DEVICE_SERVER[target] in used
        assert source == entry or DEVICE_SERVER[source] == DEVICE_SERVER[target] != DEVICE_SERVER[entry]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_remote_calls_go_where_the_planner_says(seed):
    rng = np.random.default_rng(seed)
    slots = assign_slots(LAYOUT, random_resident(rng))
    serving = rng.integers(0, 3, (3, *slots.shape[1:]))
    tables = routing_tables(LAYOUT, slots, serving=serving)
    for source, layer, expert in np.ndindex(tables.device.shape):
        home, chosen = DEVICE_SERVER[source], tables.device[source, layer, expert]
        assert slots[chosen, layer, expert] == tables.slot[source, layer, expert] >= 0
        holders = set(DEVICE_SERVER[slots[:, layer, expert] >= 0].tolist())
        wanted = home if home in holders else serving[home, layer, expert]
        assert DEVICE_SERVER[chosen] == wanted or wanted not in holders
        if slots[source, layer, expert] >= 0:
            assert chosen == source


def test_equally_cheap_copies_share_the_load():
    slots = np.full((4, 2, 64), -1, np.int32)
    slots[0] = slots[1] = np.arange(128).reshape(2, 64)
    device = routing_tables(pool_layout([128] * 4, range(4)), slots).device[2]
    assert 0.4 < (device == 0).mean() < 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: np.ones_like(r), "device 0 is to hold 24 experts, its pool has 7 slots"),
        (lambda r: r & (np.arange(8) != 5), "expert 5 of layer 0 is on no device"),
        (lambda r: r[:3], r"resident: bool \[3, 3, 8\], must be booleans \[devices = 4"),
    ],
)
def test_placements_that_do_not_fit_are_refused(change, message, rng):
    with pytest.raises(DanceMoEError, match=message):
        assign_slots(LAYOUT, change(random_resident(rng)))
