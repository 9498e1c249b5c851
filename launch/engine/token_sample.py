"""A bounded sample of tokens with all their experts: counts alone do not show which experts are used together."""

import time
from typing import NamedTuple

import numpy as np

from placement import Profile

_MOST_TOKENS = 1024  # that a process keeps
_MOST_IDS = 2**18  # in them: reports of 256 kB, for models of up to 256 experts


class Sample(NamedTuple):
    """Tokens drawn at random.

    Attributes:
        ids: their experts, unsigned [tokens, layers, k]; server: where they entered, int64 [tokens].
        at: when their steps were taken, seconds since 1970, float64 [tokens].
    """

    ids: np.ndarray
    server: np.ndarray
    at: np.ndarray


class Sampler:
    """A sample in which a token's chance halves with every `half_life` seconds, of bounded size.

    A token is forgotten at a moment that is drawn when it comes, by exponential decay. Where there is no room for all that
    have not been forgotten, those that stay longest are kept. Of old tokens the part kept halves with every half-life.

    Args:
        shape: layers, experts, experts per token.
        half_life: seconds.
    """

    def __init__(self, shape: tuple[int, int, int], half_life: float, seed: int = 0) -> None:
        layers, experts, top_k = shape
        size = max(1, min(_MOST_TOKENS, _MOST_IDS // (layers * top_k)))
        self._sample = empty_sample(size, layers, experts, top_k)
        # Clocks that nobody sets: when each came, and when it is forgotten.
        self._came, self._until = np.zeros(size), np.full(size, -np.inf)
        self._mean_s, self._rng = half_life / np.log(2), np.random.default_rng(seed)

    def add(self, server: int, ids: np.ndarray) -> None:
        """Offer tokens that entered at a server to the sample, int [tokens, layers, k]."""
        now = time.monotonic()
        for until, own in zip(now + self._rng.exponential(self._mean_s, len(ids)), ids, strict=True):
            index = int(self._until.argmin())
            if until > self._until[index]:
                self._until[index], self._came[index] = until, now
                self._sample.ids[index], self._sample.server[index] = own, server

    def take(self) -> Sample:
        """A copy of the sample as it is now; its times are by the clock of this moment."""
        now = time.monotonic()
        kept = self._until > now
        return Sample(self._sample.ids[kept], self._sample.server[kept], time.time() - (now - self._came[kept]))


def sampled_shape(profile: Profile) -> tuple[int, int, int]:
    """Layers, experts and experts per token of a model."""
    _, layers, experts = profile.counts.shape
    return layers, experts, profile.top_k


def empty_sample(size: int, layers: int, experts: int, top_k: int) -> Sample:
    kind = np.uint8 if experts <= 256 else np.uint16
    return Sample(np.zeros((size, layers, top_k), kind), np.zeros(size, np.int64), np.zeros(size))
