"""Arguments that do not fit are refused by one line that begins with the argument's name."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import Mesh

from dancemoe_jax import (
    ArgumentError,
    DanceMoEError,
    PlacementError,
    assign_slots,
    commit,
    decode_step,
    fill_pool,
    generate,
    init_state,
    make_mesh,
    migrate,
    pool_layout,
    prefill,
    resident_bytes,
    routing_tables,
    stage,
)
from tests.helpers.cluster_of_devices import Small, random_resident


@pytest.fixture(autouse=True)
def types_unchecked(monkeypatch):
    """The suite's run-time check of annotations would speak first; users do not have it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def small():
    return Small.make()


@pytest.fixture(scope="module")
def placed(small):
    resident = random_resident(np.random.default_rng(0))
    return resident, *small.place(resident)


def decode_rows(**changes):
    rows = {
        "tokens": np.zeros((4, 2), np.int32),
        "positions": np.zeros((4, 2), np.int32),
        "active": np.zeros((4, 2), bool),
    }
    return list((rows | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": np.zeros((4, 2), np.float32)}, r"tokens: float32 \[4, 2\], must be integers"),
        ({"tokens": np.zeros((4, 3), np.int32)}, r"tokens: int32 \[4, 3\], .*devices = 4, sequences = 2"),
        ({"positions": np.zeros(4, np.int32)}, r"positions: int32 \[4\]"),
        ({"active": np.zeros((4, 2), np.int32)}, r"active: int32 \[4, 2\], must be booleans"),
        ({"active": np.zeros((4, 2), bool), "control": np.zeros((3, 1), np.int32)}, r"control: int32 \[3, 1\]"),
    ],
)
def test_decode_step(small, placed, changes, message):
    state = init_state(small.config, small.mesh, 2)
    with pytest.raises(ArgumentError, match=f"^{message}"):
        decode_step(placed[2], state, *decode_rows(**changes), **small.shapes)


def test_decode_step_with_another_config_mesh_or_layout(small, placed):
    state, weights = init_state(small.config, small.mesh, 2), placed[2]
    changes = [
        ({"config": dataclasses.replace(small.config, num_experts=16)}, "weights.tables.device"),
        ({"config": dataclasses.replace(small.config, max_position=640)}, "state.pages"),
        ({"mesh": make_mesh(jax.devices()[:3])}, "mesh: 3 devices, layout: 4"),
        ({"mesh": Mesh(np.array(jax.devices()[:4]), ("x",))}, "mesh: axes"),
        ({"layout": pool_layout((9, 9, 9, 9))}, "pool: banks"),
    ]
    for change, message in changes:
        with pytest.raises(ArgumentError, match=f"^{message}"):
            decode_step(weights, state, *decode_rows(), **small.shapes | change)


def test_prefill(small, placed):
    state, tokens, row = (
        init_state(small.config, small.mesh, 2),
        np.zeros((4, 1, 8), np.int32),
        np.zeros((4, 1), np.int32),
    )
    cases = [
        ((tokens[0], row, row, row), r"tokens: int32 \[1, 8\]"),
        ((tokens, row[:2], row, row), r"sequences: int32 \[2, 1\]"),
        ((tokens, row, row.astype(bool), row), r"starts: bool \[4, 1\]"),
        ((tokens, row, row, np.zeros((4, 2), np.int32)), r"lengths: int32 \[4, 2\]"),
    ]
    for rows, message in cases:
        with pytest.raises(ArgumentError, match=f"^{message}"):
            prefill(placed[2], state, *rows, **small.shapes)
    for how in ({"most_tokens": 0}, {"most_tokens": 9}, {"most_tokens": 4, "all_logits": True}):
        with pytest.raises(ArgumentError, match=f"^most_tokens: {how['most_tokens']}, must be from 1 to 8"):
            prefill(placed[2], state, tokens, row, row, row, **small.shapes, **how)


def test_generate(small, placed):
    weights = placed[2]
    cases = [
        (([[1]], -1), {}, "max_tokens, chunk: -1, 64"),
        (([[1]], 1), {"chunk": 0}, "max_tokens, chunk: 1, 0"),
        (([[1]], 1), {"mesh": make_mesh(jax.devices()[:2])}, "mesh: 2 devices"),
        ((["text"], 1), {}, "prompt 0: holds something that is no whole number"),
        (([[1.0]], 1), {}, "prompt 0: holds"),
    ]
    for arguments, change, message in cases:
        with pytest.raises(DanceMoEError, match=f"^{message}"):
            generate(weights, *arguments, **small.shapes | change)
    with pytest.raises(ArgumentError, match=r"^sequences: 0"):
        init_state(small.config, small.mesh, 0)
    with pytest.raises(ArgumentError, match=r"^pages: 0"):
        init_state(small.config, small.mesh, 2, pages=0)


def test_fill_pool_and_resident_bytes(small, placed):
    _, slots, weights = placed
    two = make_mesh(jax.devices()[:2])
    with pytest.raises(ArgumentError, match=r"^mesh: 2 devices, layout: 4"):
        fill_pool(two, small.layout, slots, small.read)
    with pytest.raises(ArgumentError, match=r"^slots: int32 \[2, 3, 8\]"):
        fill_pool(small.mesh, small.layout, slots[:2], small.read)
    with pytest.raises(ArgumentError, match=r"^slots: .* 99 on device 0, must be its slots 0 to 6"):
        fill_pool(small.mesh, small.layout, np.where(slots == 1, 99, slots), small.read)
    with pytest.raises(ArgumentError, match=r"^mesh: 2 devices without"):
        resident_bytes(weights.pool, two)


def test_migrate_stage_and_commit(small, placed):
    resident, slots, weights = placed
    shapes = {"layout": small.layout, "mesh": small.mesh}
    with pytest.raises(ArgumentError, match=r"^resident: int64 \[4, 3, 8\], must be booleans"):
        migrate(weights.pool, slots, resident.astype(int), small.read, **shapes)
    with pytest.raises(ArgumentError, match=r"^previous: int32 \[4, 2, 8\]"):
        migrate(weights.pool, slots[:, :2], resident, small.read, **shapes)
    with pytest.raises(ArgumentError, match=r"^pool: banks"):
        migrate(weights.pool, slots, resident, small.read, layout=pool_layout((30,) * 4), mesh=small.mesh)
    with pytest.raises(ArgumentError, match=r"^mesh: 3 devices"):
        stage(small.layout, make_mesh(jax.devices()[:3]), slots, resident, small.read)
    staged = stage(small.layout, small.mesh, slots, resident, small.read)
    with pytest.raises(ArgumentError, match=r"^staged: \[9\]"):
        commit(weights.pool, small.layout, small.mesh, staged._replace(writes={9: []}))
    with pytest.raises(ArgumentError, match=r"^staged: dict"):
        commit(weights.pool, small.layout, small.mesh, {})


def test_routing_tables(small, placed):
    _, slots, _ = placed
    cases = [
        ({"slots": slots.astype(float)}, "slots: float64"),
        ({"link_cost": np.ones((2, 3))}, r"link_cost: float64 \[2, 3\]"),
        ({"serving": np.zeros((3, 3, 8))}, "serving: float64"),
        ({"likely": np.zeros((3, 3, 3), int)}, "likely: int64"),
    ]
    for change, message in cases:
        with pytest.raises(ArgumentError, match=f"^{message}"):
            routing_tables(small.layout, **{"slots": slots} | change)
    bare = slots.copy()
    bare[:, 2, 5] = -1
    with pytest.raises(PlacementError, match=r"^slots: expert 5 of layer 2 has a slot on no device"):
        routing_tables(small.layout, bare)


def test_assign_slots_and_pool_layout(small):
    with pytest.raises(ArgumentError, match=r"^resident: no array"):
        assign_slots(small.layout, [[True], [True, False]])
    for capacity, server, message in [
        ([], None, "capacity, server"),
        ([1.5, 2], None, "capacity: float64"),
        ([[1]], None, "capacity: int64"),
        ([1, 2], [0], r"server: int64 \[1\]"),
        ([1, 2], [0, -1], "capacity, server"),
        (["a"], None, "capacity: <U1"),
    ]:
        with pytest.raises(ArgumentError, match=f"^{message}"):
            pool_layout(capacity, server)
    assert pool_layout(jnp.array([2, 3])).capacity == (2, 3)
