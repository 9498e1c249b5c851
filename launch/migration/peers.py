"""Experts from another server's checkpoint, where that is quicker than reading them from this one's own.

Every server answers, so that any may be asked: a question is a line of JSON with layer and expert, the answer a line that
describes the arrays, then their bytes. Which server to ask follows from the cluster's measured rates and does not change.
"""

import json
import math
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import jax
import numpy as np

from dancemoe_jax.checkpoint.arena import Arena, room
from dancemoe_jax.errors import ModelError
from dancemoe_jax.model.experts import ExpertWeights
from launch.cluster.channel import Channel
from launch.cluster.jax_runtime import own_address
from launch.cluster.priority import STAGING, give_way
from placement import Cluster

Read = Callable[..., ExpertWeights]  # (layer, expert, arena for large arrays = None)
_LONGEST = 2**16  # of a line
_START_S, _ANSWER_S = 120.0, 60.0


def quickest(cluster: Cluster, server: int) -> int:
    """The server whose checkpoint gives experts to `server` soonest: itself, unless another one's disk and the link from
    there are both faster than its own disk."""
    disk = np.bincount(cluster.device_server, cluster.load_bandwidth, len(cluster.names))
    rate = np.minimum(disk, cluster.bandwidth[:, server])
    rate[server] = disk[server]
    return int(np.argmax(rate)) if rate.max() > rate[server] else server


@contextmanager
def reading(cluster: Cluster, server: int, channel: Channel, read: Read) -> Iterator[Read]:
    """Within the block other servers may read experts here, and what it gives reads them from the quickest server.

    In a program of one process that is `read` itself.

    Args:
        read: (layer, expert) -> its weights from this server's own checkpoint.
    """
    if jax.process_count() == 1:
        yield read
        return
    with ExitStack() as stack:
        here = ExpertServer(read, own_address())
        stack.callback(here.close)
        channel.put(f"peer/{server}", json.dumps(here.address).encode())
        source = quickest(cluster, server)
        told = channel.get(f"peer/{source}", _START_S) if source != server else None
        if told is not None:
            print(f"experts come from {cluster.names[source]}, quicker than from here", file=sys.stderr, flush=True)
            host, port = json.loads(told)
            peer = PeerReader((host, port), read)
            stack.callback(peer.close)
            read = peer
        yield read


class ExpertServer:
    """Answers until it is closed, each connection in a thread of its own.

    Attributes:
        address: host and port.
    """

    def __init__(self, read: Read, host: str) -> None:
        self._read = read
        self._listener = socket.create_server((host, 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        threading.Thread(target=self._listen, name="experts", daemon=True).start()

    def close(self) -> None:
        # A thread that waits in accept would keep the port open.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        give_way(STAGING)
        arena = Arena()
        with connection, suppress(OSError), connection.makefile("rwb") as stream:
            while line := stream.readline(_LONGEST):
                arena.reset()
                try:
                    layer, expert = (int(number) for number in json.loads(line))
                    arrays = [None if a is None else np.ascontiguousarray(a) for a in self._read(layer, expert, arena)]
                except (ModelError, ValueError, TypeError, IndexError) as error:
                    stream.write(json.dumps({"error": " ".join(str(error).split())}).encode() + b"\n")
                else:
                    about = [None if a is None else [a.dtype.name, a.shape] for a in arrays]
                    stream.write(json.dumps({"arrays": about}).encode() + b"\n")
                    for array in arrays:
                        if array is not None:
                            stream.write(array.view(np.uint8).reshape(-1).data)
                stream.flush()


class PeerReader:
    """Reads experts from a server; from the own checkpoint where that server does not answer.

    Args:
        address: host and port of its `ExpertServer`.
        own: reads from the own checkpoint.
    """

    def __init__(self, address: tuple[str, int], own: Read) -> None:
        self._address, self._own = address, own
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __call__(self, layer: int, expert: int, arena: Arena | None = None) -> ExpertWeights:
        """Weights of an expert, as `ExpertFile.read`. Raises ModelError where neither server can read it."""
        stream = None
        try:
            stream = self._connection()
            weights = _ask(stream, layer, expert, arena)
        except (OSError, ValueError, KeyError, TypeError):
            if stream is not None:
                _close(stream)
            return self._own(layer, expert, arena)
        self._free.put(stream)
        return self._own(layer, expert, arena) if weights is None else weights

    def close(self) -> None:
        """End the connections; nobody may be reading."""
        while not self._free.empty():
            _close(self._free.get())

    def _connection(self) -> Any:
        with suppress(queue.Empty):
            return self._free.get_nowait()
        connection = socket.create_connection(self._address, _ANSWER_S)
        stream = connection.makefile("rwb")
        connection.close()  # once the stream is closed
        return stream


def _close(stream: Any) -> None:
    with suppress(OSError):
        stream.close()


def _ask(stream: Any, layer: int, expert: int, arena: Arena | None) -> ExpertWeights | None:
    """The answer to one question; None where the server cannot read that expert."""
    stream.write(json.dumps([layer, expert]).encode() + b"\n")
    stream.flush()
    told = json.loads(stream.readline(_LONGEST))
    if "error" in told:
        return None
    arrays: list[np.ndarray | None] = []
    for about in told["arrays"]:
        if about is None:
            arrays.append(None)
            continue
        dtype, shape = np.dtype(about[0]), about[1]
        array = room(dtype.itemsize * math.prod(shape), arena)
        if stream.readinto(array.data) < len(array):
            raise OSError("the answer ends early")
        arrays.append(array.view(dtype).reshape(shape))
    return ExpertWeights(*arrays)
