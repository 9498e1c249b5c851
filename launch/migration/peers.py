"""Experts from another server's checkpoint, where that is quicker than reading them from this one's own.

Every server answers, so that any may be asked: a request is a message with layer and expert, the reply one that describes
the arrays, then their bytes (`launch.cluster.framing`). Which server to ask follows from the cluster's measured rates and
does not change.
"""

import itertools
import json
import logging
import math
import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

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
from placement.files import parse_json

log = logging.getLogger(__name__)

Read = Callable[..., ExpertWeights]  # (layer, expert, arena for large arrays = None)
PURPOSE = "experts"
_START_S, _ANSWER_S = 120.0, 60.0
_REQUEST = {"layer": int, "expert": int}
_REPLY = {"error?": str, "arrays?": list, "model": str}
_WHOLE_EVERY = 16  # experts of a peer: the first of so many is compared in whole with the own checkpoint
_LARGEST = 2**34  # bytes of an array that is believed


class OwnModel(NamedTuple):
    """What a server reads from its own checkpoint.

    Attributes:
        read: (layer, expert, arena) -> weights; fingerprint: of the model, the same on all servers that serve it.
        check: (layer, expert, weights, whole): raises ModelError where another server's weights are not this model's.
    """

    read: Read
    fingerprint: str = ""
    check: Callable[[int, int, ExpertWeights, bool], None] = lambda *_: None


def quickest(cluster: Cluster, server: int) -> int:
    """The server whose checkpoint gives experts to `server` soonest: itself, unless another one's disk and the link from
    there are both faster than its own disk."""
    disk = np.bincount(cluster.device_server, cluster.load_bandwidth, len(cluster.names))
    rate = np.minimum(disk, cluster.bandwidth[:, server])
    rate[server] = disk[server]
    return int(np.argmax(rate)) if rate.max() > rate[server] else server


@contextmanager
def reading(cluster: Cluster, server: int, channel: Channel, own: OwnModel, secret: bytes) -> Iterator[Read]:
    """Within the block other servers may read experts here, and what it gives reads them from the quickest server.

    In a program of one process that is `own.read` itself.
    """
    if jax.process_count() == 1:
        yield own.read
        return
    with ExitStack() as stack:
        here = ExpertServer(own.read, own_address(), secret, own.fingerprint)
        stack.callback(here.close)
        channel.put(f"peer/{server}", json.dumps(here.address).encode())
        source = quickest(cluster, server)
        message = channel.get(f"peer/{source}", _START_S) if source != server else None
        read = own.read
        if message is not None:
            log.info("experts come from %s, quicker than from here", cluster.names[source])
            host, port = parse_json(message, f"peer/{source}")
            peer = PeerReader((host, port), own, secret, cluster.names[source])
            stack.callback(peer.close)
            read = peer
        yield read


class ExpertServer:
    """Answers until it is closed, each connection in a thread of its own.

    Attributes:
        address: host and port.
    """

    def __init__(self, read: Read, host: str, secret: bytes, fingerprint: str = "") -> None:
        self._read, self._fingerprint = read, fingerprint
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
                    connection.send({"error": " ".join(str(error).split())[:1000], "model": self._fingerprint})
                    continue
                about = [None if a is None else [a.dtype.name, a.shape] for a in arrays]
                data = [a.view(np.uint8).reshape(-1).data for a in arrays if a is not None]
                connection.send({"arrays": about, "model": self._fingerprint}, *data)


class PeerReader:
    """Reads experts from a server; from the own checkpoint where that server does not answer, or serves another model.

    Args:
        address: host and port of its `ExpertServer`; name: of the server.
        own: the checkpoint here, which what comes is checked against.
        secret: of the cluster.
    """

    def __init__(self, address: tuple[str, int], own: OwnModel, secret: bytes, name: str = "the other server") -> None:
        self._address, self._own, self._secret, self._name = address, own, secret, name
        self._free: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._count, self._refused = itertools.count(), False

    def __call__(self, layer: int, expert: int, arena: Arena | None = None) -> ExpertWeights:
        """Weights of an expert, as `ExpertFile.read`. Raises ModelError where neither server can read it."""
        if self._refused:
            return self._own.read(layer, expert, arena)
        connection = None
        try:
            connection = self._connection()
            weights = _request(connection, layer, expert, arena, self._own.fingerprint)
            if weights is not None:
                self._own.check(layer, expert, weights, next(self._count) % _WHOLE_EVERY == 0)
        except ModelError as error:
            self._refuse(error)
            assert connection is not None
            connection.close()
            return self._own.read(layer, expert, arena)
        except (OSError, MessageError) as error:
            log.debug("layer %d expert %d is read here: %s", layer, expert, error)
            if connection is not None:
                connection.close()
            return self._own.read(layer, expert, arena)
        self._free.put(connection)
        return self._own.read(layer, expert, arena) if weights is None else weights

    def _refuse(self, error: ModelError) -> None:
        """Take nothing from there any more."""
        if not self._refused:
            log.warning(
                "experts do not come from %s any more: its model is another (%s); they are read here. Give it the same model",
                self._name,
                error,
            )
        self._refused = True

    def close(self) -> None:
        """End the connections; nobody may be reading."""
        while not self._free.empty():
            self._free.get().close()

    def _connection(self) -> Connection:
        with suppress(queue.Empty):
            return self._free.get_nowait()
        return connect(self._address, self._secret, PURPOSE, _ANSWER_S)


def _request(
    connection: Connection, layer: int, expert: int, arena: Arena | None, fingerprint: str
) -> ExpertWeights | None:
    """The reply to one request; None where the server cannot read that expert. Raises MessageError, ModelError."""
    connection.send({"layer": layer, "expert": expert})
    reply = connection.receive(_REPLY, _ANSWER_S)
    if reply["model"] != fingerprint:
        raise ModelError("its fingerprint differs")
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
