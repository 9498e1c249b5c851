"""Which device may send to which, in which order of rounds, and which pairs a placement needs. Static; sends nothing."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Array, Bool

from dancemoe_jax.errors import PlacementError

Pairs = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Links:
    """Who may send to whom; static, the same on all devices.

    Attributes:
        server: server of each device.
        slots: upper bound of the slot numbers of any device.
        across: rounds of (source, gateway on another server). In a round a device is in at most one pair.
        within: rounds of (device, another device of its server).
    """

    server: tuple[int, ...]
    slots: int
    across: tuple[Pairs, ...]
    within: tuple[Pairs, ...]

    @property
    def index_on_server(self) -> tuple[int, ...]:
        """Index of each device within its server."""
        return tuple(self.server[:d].count(s) for d, s in enumerate(self.server))

    def fan_in(self, rounds: tuple[Pairs, ...]) -> int:
        """The most sources that any device receives from."""
        into = [target for pairs in rounds for _, target in pairs]
        return max(map(into.count, into), default=0)


@functools.cache
def make_links(device_server: tuple[int, ...], slots: int) -> Links:
    """Pairs and rounds for devices on these servers, gateways shared evenly among a server's devices.

    Raises:
        PlacementError: more slots on a server than a row's header can name.
    """
    server = tuple(int(s) for s in device_server)
    members = {s: [d for d, other in enumerate(server) if other == s] for s in sorted(set(server))}
    most = max(map(len, members.values()))
    if slots * most >= 2**16:
        raise PlacementError(
            f"exchange: {most} devices on a server with {slots} slots each; slots of a server must stay below {2**16}"
        )
    across, within = [], []
    for source, home in enumerate(server):
        turn = members[home].index(source) + home
        across += [(source, own[turn % len(own)]) for other, own in members.items() if other != home]
        within += [(source, sibling) for sibling in members[home] if sibling != source]
    return Links(server, slots, _rounds(across, len(server)), _rounds(within, len(server)))


def _rounds(pairs: list[tuple[int, int]], devices: int) -> tuple[Pairs, ...]:
    """Pairs in as few rounds as first fit finds; pairs at the same distance around the ring tend to share one."""
    rounds: list[list[tuple[int, int]]] = []
    for pair in sorted(pairs, key=lambda p: ((p[1] - p[0]) % devices, p)):
        free = (r for r in rounds if not any(set(pair) & set(other) for other in r))
        chosen = next(free, None)
        if chosen is None:
            rounds.append(chosen := [])
        chosen.append(pair)
    return tuple(tuple(sorted(r)) for r in rounds)


def link_needs(links: Links, device: np.ndarray) -> np.ndarray:
    """Which pair may carry rows of which device's tokens: bool [layers, source, target, device of entry].

    Args:
        device: int [devices, layers, experts], whose copy each source uses (tables.Tables.device).
    """
    server = np.array(links.server)
    devices, layers, _ = device.shape
    uses = (device[..., None] == np.arange(devices)).any(2).transpose(1, 0, 2)  # [layers, source, owner]
    needs = np.zeros((layers, devices, devices, devices), bool)
    for source, gateway in (pair for pairs in links.across for pair in pairs):
        there = server == server[gateway]
        needs[:, source, gateway, source] = uses[:, source][:, there].any(1)
        for sibling in np.flatnonzero(there & (np.arange(devices) != gateway)):
            needs[:, gateway, sibling, source] |= uses[:, source, sibling]
    for source, sibling in (pair for pairs in links.within for pair in pairs):
        needs[:, source, sibling, source] |= uses[:, source, sibling]
    return needs


def live_links(
    needs: Bool[Array, "devices devices devices"], busy: Bool[Array, " devices"]
) -> Bool[Array, "devices devices"]:
    """Pairs that may carry something in a layer: `link_needs` of the layer, and which devices have tokens in this step."""
    return (needs & busy[None, None]).any(-1)


def linked_pairs(rounds, devices):
    linked = np.zeros((devices, devices), bool)
    for source, target in (pair for pairs in rounds for pair in pairs):
        linked[source, target] = True
    return linked
