"""From a placement to what a step reads: which slot holds an expert, and which copy each source device uses.

Plain numpy on the host. Tables are inputs of the jitted steps, so a new placement is new numbers in the same shapes.
"""

from typing import Any, NamedTuple

import numpy as np

from dancemoe_jax.arguments import check_array
from dancemoe_jax.errors import PlacementError
from dancemoe_jax.expert_parallel.links import link_needs
from dancemoe_jax.expert_parallel.pool import PoolLayout, check_slots


class Tables(NamedTuple):
    """Where each source device sends its assignments; numpy arrays, then arrays on devices (`place_tables`).

    Attributes:
        device: int32 [devices, layers, experts], the device whose copy the source uses; sharded by source.
        slot: int32 [devices, layers, experts], the slot of that copy; sharded by source.
        needs: bool [layers, devices, devices, devices], whether the pair (source, target) may carry rows of the tokens of a
            device (links.link_needs); replicated.
        eager: bool [layers, devices, devices], pairs whose first row goes before it is known that it is needed; replicated.
    """

    device: Any
    slot: Any
    needs: Any
    eager: Any


def assign_slots(layout: PoolLayout, resident: np.ndarray, previous: np.ndarray | None = None) -> np.ndarray:
    """Give every resident expert a slot; one that stays on a device keeps its slot.

    Args:
        resident: bool [devices, layers, experts].
        previous: the result for the placement in force.

    Returns:
        int32 [devices, layers, experts], slot or -1.

    Raises:
        ArgumentError: `resident` or `previous` is not over the layout's devices, or they differ in layers and experts.
        PlacementError: more experts on a device than it has slots, or an expert that is nowhere.

    >>> from dancemoe_jax import pool_layout
    >>> layout = pool_layout([2, 1])
    >>> assign_slots(layout, np.array([[[True, True, False]], [[False, False, True]]])).tolist()
    [[[0, 1, -1]], [[-1, -1, 0]]]
    """
    check_array("resident", resident, "booleans", {"devices": len(layout.capacity), "layers": None, "experts": None})
    resident = np.asarray(resident)
    for device, capacity in enumerate(layout.capacity):
        if (held := int(resident[device].sum())) > capacity:
            raise PlacementError(f"placement: device {device} is to hold {held} experts, its pool has {capacity} slots")
    uncovered = np.argwhere(~resident.any(0))
    if len(uncovered):
        layer, expert = uncovered[0]
        raise PlacementError(
            f"placement: expert {expert} of layer {layer} is on no device ({len(uncovered)} uncovered)"
        )
    slots = np.full(resident.shape, -1, np.int32)
    if previous is not None:
        check_slots(layout, previous)
        check_array(
            "previous", previous, "integers", dict(zip(("devices", "layers", "experts"), resident.shape, strict=True))
        )
        slots = np.where(resident, previous, -1).astype(np.int32)
    for device, capacity in enumerate(layout.capacity):
        new = resident[device] & (slots[device] < 0)
        free = np.setdiff1d(np.arange(capacity), slots[device][slots[device] >= 0])
        slots[device][new] = free[: int(new.sum())]
    return slots


def routing_tables(
    layout: PoolLayout,
    slots: np.ndarray,
    link_cost: np.ndarray | None = None,
    serving: np.ndarray | None = None,
    likely: np.ndarray | None = None,
) -> Tables:
    """Choose a copy for every source device: its own, then one on its server, then one over the cheapest link.

    Equally cheap copies share the load by a fixed rule over source, layer and expert, so that runs reproduce.

    Args:
        slots: int [devices, layers, experts], from `assign_slots`.
        link_cost: float [servers, servers], cost of reaching column from row; default: all links alike.
        serving: int [servers, layers, experts], the server that a planner wants to serve each server's calls; where it
            holds no copy, the links decide.
        likely: bool [servers, layers, servers], whether a step of row's tokens is so sure to need column in a layer that
            its first row goes without asking; default: nowhere.

    Returns:
        Tables of numpy arrays; `place_tables` puts them on devices.

    Raises:
        ArgumentError: an array does not fit the layout, or another one.
        PlacementError: an expert has no slot anywhere.

    >>> from dancemoe_jax import pool_layout
    >>> layout = pool_layout([2, 1], server=[0, 1])
    >>> routing_tables(layout, np.array([[[0, 1, -1]], [[-1, -1, 0]]])).device.tolist()
    [[[0, 0, 1]], [[0, 0, 1]]]
    """
    check_slots(layout, slots)
    devices, layers, experts = slots.shape
    device_server = np.asarray(layout.server)
    servers = int(device_server.max()) + 1
    _check_server_arrays(link_cost, serving, likely, servers, layers, experts)
    if len(uncovered := np.argwhere((slots < 0).all(0))):
        layer, expert = uncovered[0]
        raise PlacementError(
            f"slots: expert {expert} of layer {layer} has a slot on no device ({len(uncovered)} have none)"
        )
    chosen = _nearest_copies(device_server, slots, link_cost, serving)
    slot = np.take_along_axis(slots, chosen, axis=0)
    # Within a server the devices share nearly every token, and bytes cost nothing.
    eager = np.broadcast_to(device_server[:, None] == device_server, (layers, devices, devices)).copy()
    if likely is not None:
        eager |= np.asarray(likely)[device_server][:, :, device_server].transpose(1, 0, 2)
    return Tables(chosen, slot.astype(np.int32), link_needs(layout.links, chosen), eager)


def _check_server_arrays(link_cost: Any, serving: Any, likely: Any, servers: int, layers: int, experts: int) -> None:
    if link_cost is not None:
        check_array("link_cost", link_cost, "numbers", {"servers": servers, "to servers": servers})
    if serving is not None:
        check_array("serving", serving, "integers", {"servers": servers, "layers": layers, "experts": experts})
    if likely is not None:
        check_array("likely", likely, "booleans", {"servers": servers, "layers": layers, "to servers": servers})


def _nearest_copies(device_server: np.ndarray, slots: np.ndarray, link_cost: Any, serving: Any) -> np.ndarray:
    """The device whose copy each source uses: int32 [devices, layers, experts]."""
    devices, layers, experts = slots.shape
    servers = int(device_server.max()) + 1
    cost = np.ones((servers, servers)) if link_cost is None else np.asarray(link_cost, float)
    # 0 = this device, 1 = this server, 2 and up = other servers by the rank of their link's cost.
    ranks = np.stack([np.unique(row, return_inverse=True)[1] for row in cost]) + 2
    distance = ranks[np.ix_(device_server, device_server)]
    distance[device_server[:, None] == device_server[None, :]] = 1
    np.fill_diagonal(distance, 0)
    spread = np.arange(layers)[:, None] + np.arange(experts)[None, :]
    chosen = np.empty((devices, layers, experts), np.int32)
    for source in range(devices):
        far = np.where(slots >= 0, distance[source][:, None, None], np.iinfo(np.int64).max)
        if serving is not None:
            wanted = device_server[:, None, None] == np.asarray(serving)[device_server[source]]
            far = np.where(wanted & (far > 1) & (slots >= 0), 2, np.where((far > 1) & (slots >= 0), far + 1, far))
        best = far == far.min(0)
        turn = (spread + source) % best.sum(0)
        chosen[source] = np.argmax(best & (np.cumsum(best, axis=0) - 1 == turn), axis=0)
    return chosen
