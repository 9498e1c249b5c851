"""What the processes of one program tell each other beside their steps: small values under names. Holds no engine."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import jax

from launch.cluster.jax_runtime import store_client


class ChannelLost(RuntimeError):
    """The store that the processes started with is gone: the first server has ended, or the program has."""


class Channel(Protocol):
    """Values that one process puts and all can get, from any thread."""

    def put(self, name: str, value: bytes) -> None:
        """Set a value, or replace it."""
        ...

    def offer(self, name: str, value: bytes) -> None:
        """Set a value unless there is one: of several that are offered, all get the same."""
        ...

    def get(self, name: str, seconds: float) -> bytes | None:
        """The value, waiting at most so long until there is one; None too where it is on its way by then."""
        ...

    def look(self, name: str) -> bytes | None:
        """The value that there is now, however long it travels; None where there is none."""
        ...

    def drop(self, name: str) -> None:
        """Forget a value; it need not exist."""
        ...


def open_channel(prefix: str = "") -> Channel:
    """The channel of this program, whether it is one process or several; names under a prefix do not meet others."""
    return ClusterChannel(prefix) if jax.process_count() > 1 else OwnChannel()


class OwnChannel:
    """Within a process, between threads."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def put(self, name: str, value: bytes) -> None:
        with self._changed:
            self._values[name] = value
            self._changed.notify_all()

    def offer(self, name: str, value: bytes) -> None:
        with self._changed:
            self._values.setdefault(name, value)
            self._changed.notify_all()

    def get(self, name: str, seconds: float) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: name in self._values, seconds)
            return self._values.get(name)

    def look(self, name: str) -> bytes | None:
        with self._changed:
            return self._values.get(name)

    def drop(self, name: str) -> None:
        with self._changed:
            self._values.pop(name, None)


class ClusterChannel:
    """Between the processes of one program, by the store that they started with. Raises ChannelLost once that is gone."""

    def __init__(self, prefix: str = "") -> None:
        self._client: Any = store_client()
        self._root = f"dancemoe/{prefix}"

    def put(self, name: str, value: bytes) -> None:
        with _answered():
            self._client.key_value_set_bytes(self._root + name, value, allow_overwrite=True)

    def offer(self, name: str, value: bytes) -> None:
        with _answered("ALREADY_EXISTS"):
            self._client.key_value_set_bytes(self._root + name, value, allow_overwrite=False)

    def get(self, name: str, seconds: float) -> bytes | None:
        with _answered("DEADLINE_EXCEEDED"):
            return self._client.blocking_key_value_get_bytes(self._root + name, max(1, round(1000 * seconds)))

    def look(self, name: str) -> bytes | None:
        with _answered("NOT_FOUND"):
            return self._client.key_value_try_get_bytes(self._root + name)

    def drop(self, name: str) -> None:
        with suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_delete(self._root + name)


@contextmanager
def _answered(absent: str = "") -> Iterator[None]:
    """Go on without a value where the store says that there is none, or one already."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not absent or absent not in str(error):
            raise ChannelLost(" ".join(str(error).split())) from None
