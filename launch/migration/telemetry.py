"""What each server has counted, told to the one that plans: totals since the start, now and then, and sampled tokens."""

import io
import threading
import time
from contextlib import suppress
from typing import NamedTuple

import jax
import numpy as np

from launch.cluster.channel import Channel, ChannelLost
from launch.engine.engine import Engine
from launch.engine.token_sample import Sample, Sampler, empty_sample


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
        period: seconds between two reports of counts.
        sampler: takes a sample of the engine's tokens, which is told every `sampled_period` seconds; None takes none.
    """

    def __init__(
        self,
        engine: Engine,
        channel: Channel,
        period: float,
        sampler: Sampler | None = None,
        sampled_period: float = 1.0,
    ) -> None:
        self._engine, self._channel, self._period = engine, channel, period
        self._due, self._taken = 0.0, 0
        self._sampled_due, self._sampled_period = 0.0, sampled_period
        self._found: Counted | None = None
        self._sample: Sample | None = None
        engine.sampler = sampler
        self._news, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._tell, name="reporter", daemon=True)
        self._thread.start()

    def between(self) -> None:
        """Take the totals if it is time."""
        engine, now = self._engine, time.monotonic()
        if now >= self._due and sum(engine.steps.values()) > self._taken:
            self._due, self._taken = now + self._period, sum(engine.steps.values())
            steps, fed = (
                np.array([d["prefill"], d["decode"]], np.int64) for d in (engine.steps, engine.tokens_processed)
            )
            self._found = Counted(engine.counts(), steps, fed)
            if engine.sampler is not None and now >= self._sampled_due:
                self._sampled_due, self._sample = now + self._sampled_period, engine.sampler.take()
            self._news.set()

    def end(self) -> None:
        """Tell nothing more; waits until nothing is on its way."""
        self._ended = True
        self._news.set()
        self._thread.join()

    def _tell(self) -> None:
        with suppress(ChannelLost):  # the first server has gone, which others say
            self._tell_all()

    def _tell_all(self) -> None:
        while self._news.wait() and not self._ended:
            self._news.clear()
            if self._found is not None:
                buffer = io.BytesIO()
                np.savez_compressed(buffer, **self._found._asdict())
                self._channel.put(f"counted/{jax.process_index()}", buffer.getvalue())
            sample, self._sample = self._sample, None
            if sample is not None:
                tell(self._channel, jax.process_index(), sample)


def gather(channel: Channel, empty: Counted) -> Counted:
    """The totals of all processes, as they last told them; steps are everybody's."""
    counts, steps, fed = empty.counts.copy(), empty.steps.copy(), empty.fed.copy()
    for process in range(jax.process_count()):
        data = channel.look(f"counted/{process}")
        if data is not None:
            with np.load(io.BytesIO(data), allow_pickle=False) as found:
                counts += found["counts"]
                steps, fed = np.maximum(steps, found["steps"]), fed + found["fed"]
    return Counted(counts, steps, fed)


def tell(channel: Channel, process: int, sample: Sample) -> None:
    """Have all be able to get a process's sample."""
    buffer = io.BytesIO()
    np.savez(buffer, **sample._asdict())
    channel.put(f"sampled/{process}", buffer.getvalue())


def gather_sample(channel: Channel, processes: int, shape: tuple[int, int, int]) -> Sample:
    """What all processes last told, one after another."""
    layers, experts, top_k = shape
    found = [empty_sample(0, layers, experts, top_k)]
    for process in range(processes):
        data = channel.look(f"sampled/{process}")
        if data is not None:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                found.append(Sample(*(arrays[name] for name in Sample._fields)))
    return Sample(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
