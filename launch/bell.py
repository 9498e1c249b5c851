"""What wakes a sleeping cluster: any process rings, all hear it. Holds no engine."""

import threading
from contextlib import suppress
from typing import Any, Protocol

import jax
from jax._src import distributed  # its key-value store is how processes of one program reach each other beside a step


class Bell(Protocol):
    """One ring for every nap, counted from 0; ringing twice is ringing once."""

    def ring(self, nap: int) -> None: ...

    def wait(self, nap: int, seconds: float) -> bool:
        """Whether the bell for this nap has been rung, waiting at most so long."""
        ...


class OwnBell:
    """Within a process, between threads."""

    def __init__(self) -> None:
        self._rung, self._condition = -1, threading.Condition()

    def ring(self, nap: int) -> None:
        with self._condition:
            self._rung = max(self._rung, nap)
            self._condition.notify_all()

    def wait(self, nap: int, seconds: float) -> bool:
        with self._condition:
            return self._condition.wait_for(lambda: self._rung >= nap, seconds)


class ClusterBell:
    """Between the processes of one program, by the store that they started with."""

    def __init__(self) -> None:
        self._client: Any = distributed.global_state.client
        self._index = jax.process_index()

    def ring(self, nap: int) -> None:
        self._client.key_value_set(f"dancemoe/nap/{nap}", "over", allow_overwrite=True)

    def wait(self, nap: int, seconds: float) -> bool:
        try:
            self._client.blocking_key_value_get(f"dancemoe/nap/{nap}", round(1000 * seconds))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            return False
        # All have heard the one before the last, or they could not be napping again.
        if self._index == 0 and nap > 1:
            with suppress(jax.errors.JaxRuntimeError):
                self._client.key_value_delete(f"dancemoe/nap/{nap - 2}")
        return True
