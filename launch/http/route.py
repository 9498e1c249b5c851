"""Which server a request should enter at: where its user's experts are, if what that saves is more than the way there."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.cluster.addresses import DEFAULT_PORT, LOOPBACK, join_address, listen, split_address
from launch.cluster.async_framing import listen_at
from launch.http.book import Accepted
from launch.http.hand_over import PURPOSE, Hands, Takes
from launch.http.service import Service
from placement import Cluster

_HAND_S = 0.002  # for the two front doors, beside the link


class Router:
    """Hands requests to other servers, and takes theirs (`--route`).

    Args:
        cluster: its links; service: of this server; secret: of the cluster.

    Raises:
        InputError: nothing can listen at this server's address.
    """

    def __init__(self, cluster: Cluster, service: Service, secret: bytes) -> None:
        self._names, self._own, self._supervisor = cluster.names, service.server, service.supervisor
        self._secret = secret
        self._round_trips = round_trips(cluster.latency)
        own = cluster.servers[service.server]
        self._host = split_address(own.host or LOOPBACK, f"server {own.name}", DEFAULT_PORT)[0]
        self._listening = listen(self._host, 0, "--route")
        self._takes = Takes(service.book, service.supervisor, service.config, service.server)
        self.hands = Hands(service.book, secret, service.supervisor.flush)
        service.route = self.route

    async def open(self) -> None:
        """Take requests from now on."""
        self._listening.listen(64)
        await listen_at(self._listening, self._secret, PURPOSE, self._takes.take)
        self._supervisor.door = join_address(self._host, self._listening.getsockname()[1])

    def route(self, accepted: Accepted) -> None:
        """Hand a request that was just accepted to another server, if that pays."""
        stats: Mapping[str, Any] = self._supervisor.stats or {}
        fits, doors = stats.get("fits", {}).get(accepted.label), self._supervisor.doors
        if fits is None or not doors or len(fits) != len(self._names):
            return
        allowed = [i for i, name in enumerate(self._names) if i == self._own or name in doors]
        best = best_server(np.array(fits), self._round_trips, self._own, allowed, accepted.request.max_tokens)
        if best != self._own:
            self.hands.hand(accepted, doors[self._names[best]])


def round_trips(latency: np.ndarray) -> np.ndarray:
    """Seconds there and back between servers, [N, N], from one-way latencies."""
    return latency + latency.T


def best_server(fits: np.ndarray, trips: np.ndarray, own: int, allowed: list[int], tokens: int) -> int:
    """Where a request of so many tokens is answered soonest.

    Args:
        fits: layers in which a token that enters at each server needs another one, expected, [N].
        trips: seconds there and back, [N, N]; own: where the request is; allowed: where it may go.
    """
    others = trips.sum(1) / max(1, len(trips) - 1)  # to any other server, mean
    seconds = tokens * fits * others + np.where(np.arange(len(fits)) == own, 0.0, trips[own] + _HAND_S)
    best = min(allowed, key=lambda server: seconds[server])
    return best if seconds[best] < seconds[own] else own
