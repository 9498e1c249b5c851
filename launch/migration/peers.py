"""Experts from another server's checkpoint, where that is quicker than reading them from this one's own.

Every server answers, so that any may be asked: a request is a message with layer and expert, the reply one that describes
the arrays, then their bytes (`launch.cluster.framing`). Which server to ask follows from the cluster's measured rates and
does not change.
"""

import json
import logging
import math
import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import jax
import numpy as np

from dancemoe_jax.checkpoint.arena import Arena, room
from dancemoe_jax.errors import ModelError
from dancemoe_jax.model.experts import ExpertWeights
from launch.cluster.addresses import listen
from launch.cluster.channel import Channel
from launch.cluster.framing import Connection, Listener, MessageError, connect
from launch.cluster.jax_runtime import own_address
from launch.cluster.priority import STAGING, give_way
from placement import Cluster

log = logging.getLogger(__name__)

Read = Callable[..., ExpertWeights]  # (layer, expert, arena for large arrays = None)
PURPOSE = "experts"
_START_S, _ANSWER_S = 120.0, 60.0
_REQUEST = {"layer": int, "expert": int}
_REPLY = {"error?": str, "arrays?": list}
_LARGEST = 2**34  # bytes of an array that is believed


def quickest(cluster: Cluster, server: int) -> int:
    """The server whose checkpoint gives experts to `server` soonest: itself, unless another one's disk and the link from
    there are both faster than its own disk."""
    disk = np.bincount(cluster.device_server, cluster.load_bandwidth, len(cluster.names))
    rate = np.minimum(disk, cluster.bandwidth[:, server])
    rate[server] = disk[server]
    return int(np.argmax(rate)) if rate.max() > rate[server] else server


@contextmanager
def reading(cluster: Cluster, server: int, channel: Channel, read: Read, secret: bytes) -> Iterator[Read]:
    """Within the block other servers may read experts here, and what it gives reads them from the quickest server.

    In a program of one process that is `read` itself.

    Args:
        read: (layer, expert) -> its weights from this server's own checkpoint.
    """
    if jax.process_count() == 1:
        yield read
        return
    with ExitStack() as stack:
        here = ExpertServer(read, own_address(), secret)
        stack.callback(here.close)
        channel.put(f"peer/{server}", json.dumps(here.address).encode())
        source = quickest(cluster, server)
        message = channel.get(f"peer/{source}", _START_S) if source != server else None
        if message is not None:
            log.info("experts come from %s, quicker than from here", cluster.names[source])
            host, port = json.loads(message)
            peer = PeerReader((host, port), read, secret)
            stack.callback(peer.close)
            read = peer
        yield read


class ExpertServer:
    """Answers until it is closed, each connection in a thread of its own.

    Attributes:
        address: host and port.
    """

    def __init__(self, read: Read, host: str, secret: bytes) -> None:
        self._read = read
        listening = listen(host, 0, "experts")
        self.address: tuple[str, int] = listening.getsockname()[:2]
        self._listener = Listener(listening, secret, PURPOSE, self._answer)

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _answer(self, connection: Connection) -> None:
        give_way(STAGING)
        arena = Arena()
        with connection, suppress(MessageError):  # it ends when the other has read what it wanted
            while True:
                request = connection.receive(_REQUEST, None)
                arena.reset()
                try:
                    weights = self._read(request["layer"], request["expert"], arena)
                    arrays = [None if a is None else np.ascontiguousarray(a) for a in weights]
                except (ModelError, ValueError, TypeError, IndexError) as error:
                    connection.send({"error": " ".join(str(error).split())[:1000]})
                    continue
                about = [None if a is None else [a.dtype.name, a.shape] for a in arrays]
                data = [a.view(np.uint8).reshape(-1).data for a in arrays if a is not None]
                connection.send({"arrays": about}, *data)


class PeerReader:
    """Reads experts from a server; from the own checkpoint where that server does not answer.

    Args:
        address: host and port of its `ExpertServer`.
        own: reads from the own checkpoint.
        secret: of the cluster.
    """

    def __init__(self, address: tuple[str, int], own: Read, secret: bytes) -> None:
        self._address, self._own, self._secret = address, own, secret
        self._free: queue.SimpleQueue[Connection] = queue.SimpleQueue()

    def __call__(self, layer: int, expert: int, arena: Arena | None = None) -> ExpertWeights:
        """Weights of an expert, as `ExpertFile.read`. Raises ModelError where neither server can read it."""
        connection = None
        try:
            connection = self._connection()
            weights = _request(connection, layer, expert, arena)
        except (OSError, MessageError) as error:
            log.debug("layer %d expert %d is read here: %s", layer, expert, error)
            if connection is not None:
                connection.close()
            return self._own(layer, expert, arena)
        self._free.put(connection)
        return self._own(layer, expert, arena) if weights is None else weights

    def close(self) -> None:
        """End the connections; nobody may be reading."""
        while not self._free.empty():
            self._free.get().close()

    def _connection(self) -> Connection:
        with suppress(queue.Empty):
            return self._free.get_nowait()
        return connect(self._address, self._secret, PURPOSE, _ANSWER_S)


def _request(connection: Connection, layer: int, expert: int, arena: Arena | None) -> ExpertWeights | None:
    """The reply to one request; None where the server cannot read that expert. Raises MessageError."""
    connection.send({"layer": layer, "expert": expert})
    reply = connection.receive(_REPLY, _ANSWER_S)
    if "error" in reply:
        return None
    arrays: list[np.ndarray | None] = []
    for about in reply.get("arrays", ()):
        if about is None:
            arrays.append(None)
            continue
        dtype, shape, size = _described(about)
        array = room(size, arena)
        connection.receive_into(array.data, _ANSWER_S)
        arrays.append(array.view(dtype).reshape(shape))
    try:
        return ExpertWeights(*arrays)
    except TypeError:
        raise MessageError(f"{connection.peer}: {len(arrays)} arrays are no expert") from None


def _described(about: Any) -> tuple[np.dtype, list[int], int]:
    """Type, shape and bytes of an array that follows."""
    try:
        dtype, shape = np.dtype(about[0]), [int(size) for size in about[1]]
        size = dtype.itemsize * math.prod(shape)
        if min(shape, default=0) < 0 or size > _LARGEST or dtype.hasobject:
            raise ValueError(size)
    except (ValueError, TypeError, LookupError):
        raise MessageError("an array of no known type or size") from None
    return dtype, shape, size
