"""Slots for expert weights: each device's flat pool, shared by all layers and sized once, and computing out of it.

A pool is a list of banks, the same list of shapes on every device, because one program runs on all. Where devices have
unequal memory, the smaller ones pass a bank of theirs a second time in place of the banks that they have no memory for:
one buffer, two names, no bytes. Which expert sits in which slot is tables.py's business, changing it is migrate.py's.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dancemoe_jax.config import ModelError
from dancemoe_jax.experts import swiglu
from dancemoe_jax.mesh import sharded

# Slots written by one call: the shape of a write, and so compiled once for each device and size of bank.
WRITE_ROWS = 8


class ExpertPool(NamedTuple):
    """Expert weights of all devices, a pytree. Bank b: `w_in[b]` [devices * slots, hidden, 2 * inner], `w_out[b]`."""

    w_in: tuple[jax.Array, ...]
    w_out: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class PoolLayout:
    """How the slots of each device are cut into banks.

    Attributes:
        capacity: slots of each device.
        banks: slots of each bank. A device owns a prefix of this list, so a slot's number is the same cut everywhere.
    """

    capacity: tuple[int, ...]
    banks: tuple[int, ...]

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
        """Bank of a slot and its place there."""
        bank = int(np.searchsorted(self.starts, slot, side="right")) - 1
        return bank, slot - self.starts[bank]


def pool_layout(capacity: Sequence[int]) -> PoolLayout:
    """Cut devices' slots into banks so that no slot is lost and every bank's size occurs among those all devices own.

    The distinct capacities are levels; a step between two levels becomes one bank, and the smallest device's slots are
    cut so that a bank of each step's size is among them. Steps too large for that are cut into equal parts.

    Raises:
        ModelError: a device has no slot at all.
    """
    if min(capacity) < 1:
        raise ModelError(
            f"device {int(np.argmin(capacity))} has room for no expert; give it more memory or leave it out"
        )
    levels = sorted(set(capacity))
    steps = [b - a for a, b in itertools.pairwise(levels)]
    if sum(set(steps)) > levels[0]:
        part = max(1, levels[0] // (len(steps) + 1))
        steps = [size for step in steps for size in [part] * (step // part) + [step % part] * (step % part > 0)]
    shared = sorted(set(steps))
    rest = levels[0] - sum(shared)
    return PoolLayout(tuple(int(c) for c in capacity), (*([rest] if rest else []), *shared, *steps))


def assemble(mesh: Mesh, layout: PoolLayout, buffers: Sequence[Sequence[jax.Array]]) -> tuple[jax.Array, ...]:
    """Banks as global arrays over the buffers that devices own: `buffers[device][bank]`, no copy."""
    banks = []
    for bank, slots in enumerate(layout.banks):
        shape = (len(buffers) * slots, *buffers[0][0].shape[1:])
        parts = [own[layout.buffer(device, bank)] for device, own in enumerate(buffers)]
        banks.append(jax.make_array_from_single_device_arrays(shape, sharded(mesh), parts))
    return tuple(banks)


def buffers_of(layout: PoolLayout, banks: Sequence[jax.Array], mesh: Mesh) -> list[list[jax.Array]]:
    """The inverse of `assemble`: each device's own bank buffers, in order."""
    by_device = [{shard.device: shard.data for shard in bank.addressable_shards} for bank in banks]
    return [
        [by_device[bank][device] for bank in range(layout.owned(index))] for index, device in enumerate(mesh.devices)
    ]


def fill_pool(mesh: Mesh, layout: PoolLayout, slots: np.ndarray, read: Callable, dtype=jnp.float32) -> ExpertPool:
    """A pool with the experts that `slots` names; empty slots are zero.

    Args:
        slots: int [devices, layers, experts], slot of each resident expert or -1 (tables.assign_slots).
        read: (layer, expert) -> (w_in [hidden, 2 * inner], w_out [inner, hidden]) on the host. Called once for each
            copy; a few experts are in host memory at a time.
    """

    def empty(side: np.ndarray) -> tuple[jax.Array, ...]:
        owned = [
            [jnp.zeros((n, *side.shape), dtype, device=device) for n in layout.banks[: layout.owned(index)]]
            for index, device in enumerate(mesh.devices)
        ]
        return assemble(mesh, layout, owned)

    def experts_of(device: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for layer, expert in np.argwhere(slots[device] >= 0):
            yield int(slots[device, layer, expert]), *read(int(layer), int(expert))

    w_in, w_out = read(0, 0)
    pool = ExpertPool(empty(w_in), empty(w_out))
    return write_experts(pool, layout, mesh, [experts_of(device) for device in range(mesh.size)])


def write_experts(
    pool: ExpertPool,
    layout: PoolLayout,
    mesh: Mesh,
    writes: Sequence[Iterable[tuple[int, np.ndarray, np.ndarray]]],
) -> ExpertPool:
    """Put experts into slots, in the pool's own memory. The pool passed in must not be used afterwards.

    Args:
        writes: for each device, (slot, w_in, w_out) of what is new there; taken a few at a time.
    """
    buffers = [buffers_of(layout, banks, mesh) for banks in pool]

    def flush(device: int, bank: int, rows: list) -> None:
        rows = rows + [rows[-1]] * (WRITE_ROWS - len(rows))
        places, *weights = (np.stack(column) for column in zip(*rows, strict=True))
        for own, values in zip(buffers, weights, strict=True):
            target = own[device][bank]
            own[device][bank] = _write(
                target, *jax.device_put((places.astype(np.int32), values.astype(target.dtype)), target.device)
            )

    for device, own_writes in enumerate(writes):
        pending: dict[int, list] = {}
        for slot, *weights in own_writes:
            bank, place = layout.locate(slot)
            pending.setdefault(bank, []).append((place, *weights))
            if len(pending[bank]) == WRITE_ROWS:
                flush(device, bank, pending.pop(bank))
        for bank, rows in pending.items():
            flush(device, bank, rows)
    return ExpertPool(*(assemble(mesh, layout, own) for own in buffers))


@functools.partial(jax.jit, donate_argnums=0)
def _write(bank, places, values):
    """bank[places[i]] = values[i] in place; a place named twice has the same value twice."""
    for i in range(WRITE_ROWS):
        bank = jax.lax.dynamic_update_index_in_dim(bank, values[i], places[i], axis=0)
    return bank


def resident_bytes(pool: ExpertPool, mesh: Mesh) -> np.ndarray:
    """Bytes of pool memory on each device, int64 [devices], from the arrays: a buffer passed twice counts once."""
    sizes: list[dict[int, int]] = [{} for _ in mesh.devices]
    index = {device: i for i, device in enumerate(mesh.devices)}
    for bank in jax.tree.leaves(pool):
        for shard in bank.addressable_shards:
            sizes[index[shard.device]][shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return np.array([sum(buffers.values()) for buffers in sizes], np.int64)


def slot_experts(
    layout: PoolLayout,
    pool: ExpertPool,
    x: Float[Array, "tokens hidden"],
    slots: Int[Array, "tokens k"],
    weights: Float[Array, "tokens k"],
    tile: int,
) -> Float[Array, "tokens hidden"]:
    """Weighted sum over each token's assignments to slots of this device's pool (inside shard_map).

    Assignments are sorted by slot and worked off in tiles of one expert each; a loop over the tiles that exist takes each
    expert's weights out of the pool where they lie, so the cost follows what is active, never the size of the pool.

    Args:
        slots: slot of each assignment; -1 for none (its weight does not matter).
        tile: rows computed at once; a few for decode, more for prefill.
    """
    tokens, k = slots.shape
    count = tokens * k
    key = jnp.where(slots < 0, jnp.iinfo(jnp.int32).max, slots).reshape(-1)
    order = jnp.argsort(key)
    key = key[order]
    index = jnp.arange(count)
    new_group = jnp.concatenate([jnp.ones(1, bool), key[1:] != key[:-1]])
    rank = index - jax.lax.cummax(jnp.where(new_group, index, 0))
    starts_tile = (rank % tile == 0) & (key < jnp.iinfo(jnp.int32).max)
    tile_start = jnp.nonzero(starts_tile, size=count, fill_value=0)[0]
    rows = jnp.concatenate([x[order // k], jnp.zeros((tile, x.shape[1]), x.dtype)])
    banks = list(zip(pool.w_in, pool.w_out, strict=True))

    def take(w_in, w_out):
        def branch(place):
            pick = jax.lax.dynamic_index_in_dim
            return pick(w_in, place, keepdims=False), pick(w_out, place, keepdims=False)

        return branch

    branches = [take(*bank) for bank in banks]
    starts = jnp.array(layout.starts, jnp.int32)

    def work(i, outputs):
        start = tile_start[i]
        bank = jnp.sum(key[start] >= starts) - 1
        w_in, w_out = jax.lax.switch(bank, branches, key[start] - starts[bank])
        result = swiglu(jax.lax.dynamic_slice_in_dim(rows, start, tile), w_in, w_out)
        # A tile may run into the rows of the next expert: that expert's own tiles come later and overwrite them.
        return jax.lax.dynamic_update_slice_in_dim(outputs, result, start, axis=0)

    outputs = jax.lax.fori_loop(0, starts_tile.sum(), work, jnp.zeros_like(rows))
    outputs = outputs[jnp.argsort(order)].reshape(tokens, k, -1)
    return jnp.einsum("tkd,tk->td", outputs, jnp.where(slots < 0, 0.0, weights).astype(x.dtype))
