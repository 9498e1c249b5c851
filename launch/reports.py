"""What each server has counted, told to the one that plans: totals since the start, now and then."""

import io
import threading
import time
from typing import NamedTuple

import jax
import numpy as np

from launch.channel import Channel
from launch.engine import Engine


class Counted(NamedTuple):
    """Totals since the start.

    Attributes:
        counts: assignments of each server's tokens, int64 [servers, layers, experts].
        steps, fed: prefill and decode steps taken, and tokens in them, int64 [2].
    """

    counts: np.ndarray
    steps: np.ndarray
    fed: np.ndarray


class Reporter:
    """Tells what this process has counted.

    `between` has to be called between two steps: then nobody writes to what is read.

    Args:
        period: seconds between two reports.
    """

    def __init__(self, engine: Engine, channel: Channel, period: float) -> None:
        self._engine, self._channel, self._period = engine, channel, period
        self._due, self._taken = 0.0, 0
        self._found: Counted | None = None
        self._news, self._ended = threading.Event(), False
        threading.Thread(target=self._tell, name="reporter", daemon=True).start()

    def between(self) -> None:
        """Take the totals if it is time."""
        engine, now = self._engine, time.monotonic()
        if now >= self._due and sum(engine.steps.values()) > self._taken:
            self._due, self._taken = now + self._period, sum(engine.steps.values())
            steps, fed = (np.array([d["prefill"], d["decode"]], np.int64) for d in (engine.steps, engine.fed))
            self._found = Counted(engine.counts(), steps, fed)
            self._news.set()

    def end(self) -> None:
        """Tell nothing more."""
        self._ended = True
        self._news.set()

    def _tell(self) -> None:
        while self._news.wait() and not self._ended:
            self._news.clear()
            if self._found is not None:
                buffer = io.BytesIO()
                np.savez_compressed(buffer, **self._found._asdict())
                self._channel.put(f"counted/{jax.process_index()}", buffer.getvalue())


def gather(channel: Channel, empty: Counted) -> Counted:
    """The totals of all processes, as they last told them; steps are everybody's."""
    counts, steps, fed = empty.counts.copy(), empty.steps.copy(), empty.fed.copy()
    for process in range(jax.process_count()):
        data = channel.get(f"counted/{process}", 0.001)
        if data is not None:
            with np.load(io.BytesIO(data), allow_pickle=False) as found:
                counts += found["counts"]
                steps, fed = np.maximum(steps, found["steps"]), fed + found["fed"]
    return Counted(counts, steps, fed)
