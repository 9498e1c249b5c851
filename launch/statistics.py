"""Activation counts of the recent past: each second's counts fade with a half-life."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class DecayingWindow:
    """Exponentially decaying counts [servers, layers, experts].

    Attributes:
        half_life_s: age at which an observation counts half.
    """

    half_life_s: float
    total: np.ndarray
    at_s: float
    counts: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self):
        self.counts = np.zeros(self.total.shape)

    def observe(self, total: np.ndarray, now_s: float) -> None:
        """Take in the running total at `now_s`; what came since the last call enters with full weight."""
        self.counts = self.counts * 0.5 ** ((now_s - self.at_s) / self.half_life_s) + (total - self.total)
        self.total, self.at_s = total, now_s
