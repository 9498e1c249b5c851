"""Live migration: bring the experts that a new placement adds into host memory, then write them between two steps.

Staging reads and touches no device. Commit writes the changed slots in place, device by device, and swaps the tables;
slots of experts that stay are not touched, shapes never change and no step is compiled again.
"""

from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dancemoe_jax.arguments import check_mesh
from dancemoe_jax.errors import ArgumentError
from dancemoe_jax.expert_parallel.pool import (
    ExpertPool,
    PoolLayout,
    check_pool,
    check_slots,
    local_devices,
    write_experts,
)
from dancemoe_jax.expert_parallel.tables import assign_slots
from dancemoe_jax.model.experts import ExpertWeights


class Staged(NamedTuple):
    """A migration ready to commit.

    Attributes:
        slots: int32 [devices, layers, experts], the new assignment.
        writes: device -> (slot, weights) of each expert that is new there, on the host; this process's devices.
    """

    slots: np.ndarray
    writes: dict[int, list[tuple[int, ExpertWeights]]]

    @property
    def nbytes(self) -> int:
        """Bytes of weights that the commit writes."""
        return sum(leaf.nbytes for own in self.writes.values() for leaf in jax.tree.leaves([w for _, w in own]))


def stage(
    layout: PoolLayout,
    mesh: Mesh,
    slots: np.ndarray,
    resident: np.ndarray,
    read: Callable[[int, int], ExpertWeights],
    threads: Executor | None = None,
) -> Staged:
    """Read every expert that `resident` adds on devices of this process, once, for however many of them.

    Args:
        slots: the assignment in force, int [devices, layers, experts].
        resident: the new placement, bool [devices, layers, experts].
        read: (layer, expert) -> its weights on the host, in the pool's types; what it raises ends staging.
        threads: call it; default: four new ones.

    Raises:
        ArgumentError: mesh, layout, slots and resident are not over the same devices, layers and experts.
        PlacementError: the placement does not fit the pool or leaves an expert uncovered. Nothing has changed then.
    """
    check_mesh(mesh, len(layout.capacity))
    check_slots(layout, slots)
    new = assign_slots(layout, resident, previous=slots)
    own = local_devices(mesh)
    added = (new >= 0) & (slots < 0)
    experts = [(layer, expert) for layer, expert in np.argwhere(added[own].any(axis=0)).tolist()]
    writes: dict[int, list[tuple[int, ExpertWeights]]] = {device: [] for device in own}
    with nullcontext(threads) if threads else ThreadPoolExecutor(4) as readers:
        reading = [readers.submit(read, layer, expert) for layer, expert in experts]
        try:
            for (layer, expert), weights in zip(experts, reading, strict=True):
                for device in own:
                    if added[device, layer, expert]:
                        writes[device].append((int(new[device, layer, expert]), weights.result()))
        finally:  # nobody reads any more, into whatever memory, once this has ended
            wait([future for future in reading if not future.cancel()])
    return Staged(new, writes)


def rewrite(layout: PoolLayout, mesh: Mesh, slots: np.ndarray, read: Callable[[int, int], ExpertWeights]) -> Staged:
    """The first slot of every bank as it is: committing it compiles what any commit takes, and changes nothing."""
    writes = {}
    for device in local_devices(mesh):
        held = {int(slot): at for at, slot in np.ndenumerate(slots[device]) if slot >= 0}
        firsts = layout.starts[: layout.owned(device)]
        # What is written into a slot that holds nothing does not matter.
        writes[device] = [(slot, read(*held.get(slot, (0, 0)))) for slot in firsts]
    return Staged(slots, writes)


def commit(pool: ExpertPool, layout: PoolLayout, mesh: Mesh, staged: Staged) -> ExpertPool:
    """Write what is staged into the pool's own memory. The pool passed in must not be used afterwards.

    Raises:
        ArgumentError: pool, layout and mesh do not belong together, or `staged` is for other devices.
    """
    check_mesh(mesh, len(layout.capacity))
    check_pool(layout, pool)
    if not isinstance(staged, Staged) or not set(staged.writes) <= set(local_devices(mesh)):
        found = sorted(staged.writes) if isinstance(staged, Staged) else type(staged).__name__
        raise ArgumentError(f"staged: {found}, must be what stage returned for this process's devices of the mesh")
    return write_experts(pool, layout, mesh, staged.writes)


def migrate(
    pool: ExpertPool, slots: np.ndarray, resident: np.ndarray, read: Callable, *, layout: PoolLayout, mesh: Mesh
) -> tuple[ExpertPool, np.ndarray]:
    """Stage and commit in one call, between two steps.

    Make the new tables with `routing_tables(layout, slots)` and pass both to the next step.

    Args:
        pool: must not be used afterwards, because its memory becomes the new pool's.
        slots: the assignment in force, int [devices, layers, experts].
        resident: the new placement, bool [devices, layers, experts].
        read: (layer, expert) -> its weights on the host, in the pool's types.

    Returns:
        The new pool, and the new assignment int32 [devices, layers, experts].

    Raises:
        ArgumentError: pool, slots, resident, layout and mesh do not belong together.
        PlacementError: the placement does not fit the pool or leaves an expert uncovered. Nothing has changed then.
    """
    check_pool(layout, pool)
    staged = stage(layout, mesh, slots, resident, read)
    return commit(pool, layout, mesh, staged), staged.slots
