"""Slots for expert weights: each device's flat pool, shared by all layers and sized once.

A pool is a list of banks, the same list of shapes on every device, because one program runs on all. Where devices have
unequal memory, the smaller ones pass a bank of theirs a second time in place of the banks that they have no memory for:
one buffer, two names, no bytes. Which expert sits in which slot is tables.py's business, changing it is
migrate.py's, computing experts out of slots slot_experts.py's.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple, SupportsInt

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dancemoe_jax.arguments import check_array, check_mesh
from dancemoe_jax.errors import ArgumentError, PlacementError
from dancemoe_jax.expert_parallel.links import Links, make_links
from dancemoe_jax.kernels.zeros import zeros
from dancemoe_jax.mesh import sharded
from dancemoe_jax.model.experts import ExpertWeights

# Slots written by one call: the shape of a write, and so compiled once for each device and size of bank. As many as stay
# below so many bytes, because they lie on the device twice until the call has ended; at least one.
WRITE_ROWS, WRITE_BYTES = 8, 8 * 2**20

# How bfloat16 weights lie in a pool on CPUs: as their bits. XLA has no bfloat16 arithmetic there, and would turn a whole
# pool into float32 rather than the one expert that is sliced out of it.
BFLOAT16_BITS = jnp.uint16


class ExpertPool(NamedTuple):
    """Expert weights of all devices, a pytree. Each bank's arrays have [devices * its slots] in front; uint16 is bfloat16."""

    banks: tuple[ExpertWeights, ...]


@dataclasses.dataclass(frozen=True)
class PoolLayout:
    """The devices, and how the slots of each are cut into banks.

    Attributes:
        capacity: slots of each device.
        banks: slots of each bank. A device owns a prefix of this list, so a slot's number is the same cut everywhere.
        server: of each device.
    """

    capacity: tuple[int, ...]
    banks: tuple[int, ...]
    server: tuple[int, ...]

    @cached_property
    def links(self) -> Links:
        """Who sends to whom in an exchange."""
        return make_links(self.server, max(self.capacity))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First slot of each bank."""
        return tuple(int(s) for s in np.cumsum((0, *self.banks[:-1])))

    def owned(self, device: int) -> int:
        """How many banks, from the first, the device has memory of its own for."""
        return int(np.searchsorted(np.cumsum(self.banks), self.capacity[device], side="right"))

    def buffer(self, device: int, bank: int) -> int:
        """The bank whose buffer the device passes for `bank`: itself, or an owned one of the same size."""
        return bank if bank < self.owned(device) else self.banks.index(self.banks[bank])

    def locate(self, slot: int) -> tuple[int, int]:
        """Bank of a slot, and its row in that bank."""
        bank = int(np.searchsorted(self.starts, slot, side="right")) - 1
        return bank, slot - self.starts[bank]


def pool_layout(capacity: Sequence[int], server: Iterable[SupportsInt] | None = None) -> PoolLayout:
    """Cut devices' slots into banks so that no slot is lost and every bank's size occurs among those all devices own.

    The distinct capacities are levels; a step between two levels becomes one bank, and the smallest device's slots are
    cut so that a bank of each step's size is among them. Steps too large for that are cut into equal parts.

    Args:
        capacity: slots of each device, at least one.
        server: of each device, a number from 0; default: all are on one.

    Returns:
        The layout, static and hashable: steps are compiled for it.

    Raises:
        ArgumentError: `capacity` or `server` is no list of whole numbers, or there is not one server for each device.
        PlacementError: a device has no slot at all.

    >>> layout = pool_layout([2, 3, 5], server=[0, 1, 1])
    >>> layout.banks, [layout.owned(device) for device in range(3)]
    ((1, 1, 1, 1, 1), [2, 3, 5])
    """
    capacity = tuple(capacity)
    server = (0,) * len(capacity) if server is None else tuple(server)
    for name, numbers in (("capacity", capacity), ("server", server)):
        check_array(name, np.array(numbers, None if len(numbers) else int), "integers", {"devices": len(capacity)})
    capacity, server = tuple(int(slots) for slots in capacity), tuple(int(number) for number in server)
    if not capacity or min(server) < 0:
        raise ArgumentError(
            f"capacity, server: {list(capacity)}, {list(server)}; give each device slots and a server from 0"
        )
    if min(capacity) < 1:
        raise PlacementError(
            f"device {int(np.argmin(capacity))} has room for no expert; give it more memory or leave it out"
        )
    levels = sorted(set(capacity))
    steps = [b - a for a, b in itertools.pairwise(levels)]
    if sum(set(steps)) > levels[0]:
        part = max(1, levels[0] // (len(steps) + 1))
        steps = [size for step in steps for size in [part] * (step // part) + [step % part] * (step % part > 0)]
    shared = sorted(set(steps))
    rest = levels[0] - sum(shared)
    return PoolLayout(capacity, (*([rest] if rest else []), *shared, *steps), server)


def local_devices(mesh: Mesh) -> list[int]:
    """Indices in the mesh of this process's devices."""
    return [i for i, device in enumerate(mesh.devices) if device.process_index == jax.process_index()]


def assemble(mesh: Mesh, layout: PoolLayout, buffers: dict[int, list[ExpertWeights]]) -> ExpertPool:
    """The pool over the buffers that this process's devices own: `buffers[device][bank]`, no copy."""

    def bank(number: int) -> ExpertWeights:
        parts = [own[layout.buffer(device, number)] for device, own in buffers.items()]

        def joined(*arrays: jax.Array) -> jax.Array:
            shape = (mesh.size * layout.banks[number], *arrays[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, sharded(mesh), list(arrays))

        return jax.tree.map(joined, *parts)

    return ExpertPool(tuple(bank(number) for number in range(len(layout.banks))))


def buffers_of(layout: PoolLayout, pool: ExpertPool, mesh: Mesh) -> dict[int, list[ExpertWeights]]:
    """The inverse of `assemble`: the bank buffers of each device of this process, in order."""

    def local(array: jax.Array) -> dict:
        return {shard.device: shard.data for shard in array.addressable_shards}

    by_device = [jax.tree.map(local, bank) for bank in pool.banks]
    return {
        index: [
            jax.tree.map(lambda shards, at=index: shards[mesh.devices[at]], bank, is_leaf=lambda x: isinstance(x, dict))
            for bank in by_device[: layout.owned(index)]
        ]
        for index in local_devices(mesh)
    }


def fill_pool(
    mesh: Mesh, layout: PoolLayout, slots: np.ndarray, read: Callable[[int, int], ExpertWeights]
) -> ExpertPool:
    """A pool with the experts that `slots` names; empty slots are zero. Each process fills its own devices.

    Args:
        slots: int [devices, layers, experts], slot of each resident expert or -1 (tables.assign_slots).
        read: (layer, expert) -> its weights on the host, in the pool's types. Called once for each copy, from several
            threads; a few experts are in host memory at a time.

    Raises:
        ArgumentError: mesh, layout and slots are not over the same devices, or a slot is not in its device's pool.
    """
    check_mesh(mesh, len(layout.capacity))
    check_slots(layout, slots)
    example = read(0, 0)

    def empty(device: int) -> list[ExpertWeights]:
        def bank(array: np.ndarray, count: int) -> jax.Array:
            on = mesh.devices[device]
            as_bits = on.platform == "cpu" and array.dtype == jnp.bfloat16
            return zeros((count, *array.shape), BFLOAT16_BITS if as_bits else array.dtype, on)

        owned = layout.banks[: layout.owned(device)]
        return [jax.tree.map(functools.partial(bank, count=count), example) for count in owned]

    def experts_of(device: int) -> Iterator[tuple[int, ExpertWeights]]:
        held = np.argwhere(slots[device] >= 0)
        return zip(
            slots[device][tuple(held.T)].tolist(),
            read_ahead(read, [(layer, index) for layer, index in held.tolist()]),
            strict=True,
        )

    pool = assemble(mesh, layout, {device: empty(device) for device in local_devices(mesh)})
    return write_experts(pool, layout, mesh, {device: experts_of(device) for device in local_devices(mesh)})


def check_pool(layout: PoolLayout, pool: ExpertPool) -> None:
    """Raise ArgumentError unless `pool` has the banks of a layout."""
    rows = [bank.w_in.shape[0] for bank in pool.banks] if isinstance(pool, ExpertPool) else type(pool).__name__
    wanted = [len(layout.capacity) * slots for slots in layout.banks]
    if rows != wanted:
        raise ArgumentError(
            f"pool: banks of {rows} slots over all devices, layout asks for {wanted}; fill it with fill_pool"
        )


def check_slots(layout: PoolLayout, slots: np.ndarray) -> None:
    """Raise ArgumentError unless `slots` is an assignment to the pools of a layout: int [devices, layers, experts]."""
    check_array("slots", slots, "integers", {"devices": len(layout.capacity), "layers": None, "experts": None})
    for device, capacity in enumerate(layout.capacity):
        if slots[device].size and not -1 <= slots[device].min() <= slots[device].max() < capacity:
            raise ArgumentError(
                f"slots: {slots[device].min()} to {slots[device].max()} on device {device}, must be its slots 0 to "
                f"{capacity - 1}, or -1 for none; make them with assign_slots"
            )


def read_ahead(
    read: Callable[[int, int], ExpertWeights], experts: Iterable[tuple[int, int]], threads: int = 4
) -> Iterator[ExpertWeights]:
    """Weights of (layer, expert) pairs in order, read by several threads: one waits for the disk, another transposes."""
    with ThreadPoolExecutor(threads) as pool:
        coming: collections.deque = collections.deque()
        for layer, index in experts:
            coming.append(pool.submit(read, layer, index))
            if len(coming) > threads:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def write_experts(
    pool: ExpertPool,
    layout: PoolLayout,
    mesh: Mesh,
    writes: Mapping[int, Iterable[tuple[int, ExpertWeights]]],
) -> ExpertPool:
    """Put experts into slots, in the pool's own memory. The pool passed in must not be used afterwards.

    Args:
        writes: device -> (slot, weights) of what is new there, taken a few at a time; this process's devices only.
    """
    buffers = buffers_of(layout, pool, mesh)
    count = write_rows(sum(leaf.nbytes // len(leaf) for leaf in jax.tree.leaves(pool.banks[0])))

    def flush(device: int, bank: int, rows: list[tuple[int, ExpertWeights]]) -> None:
        rows = rows + [rows[-1]] * (count - len(rows))
        at = np.array([row for row, _ in rows], np.int32)
        own = buffers[device]
        weights = jax.tree.map(_stacked, own[bank], *(one for _, one in rows))
        jax.block_until_ready(own[bank])  # no queue of writes, each with memory of its own
        own[bank] = _write(own[bank], *jax.device_put((at, weights), mesh.devices[device]))

    for device, own_writes in writes.items():
        pending: dict[int, list] = {}
        for slot, weights in own_writes:
            bank, row = layout.locate(slot)
            pending.setdefault(bank, []).append((row, weights))
            if len(pending[bank]) == count:
                flush(device, bank, pending.pop(bank))
        for bank, rows in pending.items():
            flush(device, bank, rows)
    return assemble(mesh, layout, buffers)


def write_rows(expert_bytes: int) -> int:
    """Slots written by one call, of experts of this size."""
    return max(1, min(WRITE_ROWS, WRITE_BYTES // max(1, expert_bytes)))


def _stacked(array: jax.Array, *parts: np.ndarray) -> np.ndarray:
    """Parts in a row, as they lie in an array of the pool."""
    stacked = parts[0][None] if len(parts) == 1 else np.stack(parts)
    stacked = stacked.astype(jnp.bfloat16 if array.dtype == BFLOAT16_BITS else array.dtype, copy=False)
    return stacked.view(array.dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _write(bank, at, values):
    """bank[at[i]] = values[i] in place; a row named twice has the same value twice."""

    def put(array, rows):
        for i in range(len(at)):
            array = jax.lax.dynamic_update_index_in_dim(array, rows[i], at[i], axis=0)
        return array

    return jax.tree.map(put, bank, values)


def resident_bytes(pool: ExpertPool, mesh: Mesh) -> np.ndarray:
    """Bytes of pool memory on each device, int64 [devices], from the arrays: a buffer passed twice counts once.

    Raises:
        ArgumentError: the pool is on other devices than the mesh.
    """
    sizes: list[dict[int, int]] = [{} for _ in mesh.devices]
    index = {device: i for i, device in enumerate(mesh.devices)}
    for bank in jax.tree.leaves(pool):
        for shard in bank.addressable_shards:
            if shard.device not in index:
                raise ArgumentError(f"mesh: {mesh.size} devices without {shard.device}, which holds a part of the pool")
            sizes[index[shard.device]][shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return np.array([sum(buffers.values()) for buffers in sizes], np.int64)
