"""What servers have counted: a decaying window, the pace of serving, and sampled tokens. Decides nothing."""

import dataclasses
import time

import jax
import numpy as np

from launch.cluster.channel import Channel
from launch.engine.token_sample import sampled_shape
from launch.migration.decision import pace
from launch.migration.telemetry import Counted, gather, gather_sample
from placement import DecayingCounts, Profile, Workload


class Observations:
    """The activations that a placement is planned from.

    Args:
        sizes: the model's sizes.
        half_life: seconds after which an activation counts half.

    Attributes:
        latest: what the last interval counted; None where no request began in it.
        workload: a prompt chunk and its decode steps, and chunks: of them in a second.
    """

    def __init__(self, sizes: Profile, channel: Channel, half_life: float) -> None:
        self.channel = channel
        self.latest: Profile | None = None
        self.workload, self.chunks = Workload(), 0.0
        self._sizes = sizes
        shape = sizes.counts.shape
        self._empty = Counted(np.zeros(shape, np.int64), np.zeros(2, np.int64), np.zeros(2, np.int64))
        self._before, self._began = self._empty, time.monotonic()
        self._window = DecayingCounts(half_life, self._empty.counts, self._began)
        # Steps and tokens of both kinds, and the seconds in which they were.
        self._pace = DecayingCounts(half_life, np.zeros(5), self._began)
        self._observed_at = time.time()
        self.peek()

    def observe(self) -> None:
        """End an interval: take what the servers have counted since the last time into the window."""
        now, counted = time.monotonic(), self.peek()
        new = counted.counts - self._before.counts
        began = counted.fed[0] > self._before.fed[0] and new.any()
        self._before = counted
        self.latest = self.profile(new, since=self._observed_at) if began else None
        self._observed_at = time.time()
        self._pace = self._pace.observe(np.array([*counted.steps, *counted.fed, now - self._began]), now)
        self.workload, self.chunks = pace(self._pace.counts)

    def peek(self) -> Counted:
        """Have the window hold the newest counts, and the sample the newest tokens, without ending an interval."""
        counted = gather(self.channel, self._empty)
        self._window = self._window.observe(counted.counts, time.monotonic())
        self._sample = gather_sample(self.channel, jax.process_count(), sampled_shape(self._sizes))
        return counted

    def window(self) -> Profile:
        """What users activate, the newest most."""
        return self.profile(self._window.counts)

    @property
    def assignments(self) -> float:
        """In the window."""
        return float(self._window.counts.sum())

    def profile(self, counts: np.ndarray, since: float = 0.0) -> Profile:
        """Counts with the sizes of the model, and the tokens that have been sampled since then (seconds since 1970)."""
        sample = self._sample
        new = sample.at >= since
        tokens = {"ids": sample.ids[new], "server": sample.server[new], "sequence": np.arange(new.sum())}
        return dataclasses.replace(
            self._sizes, counts=np.rint(counts).astype(np.int64), **(tokens if new.any() else {})
        )
