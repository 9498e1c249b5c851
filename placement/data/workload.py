"""Workload: what the servers do while they wait for each other, for planners that minimise time. Holds no statistics."""

import math
from dataclasses import dataclass

from placement.files import InputError, show

# Of `launch bench exchange`, one decoded token whose every layer leaves its server: 1.58 ms a layer, of which 0.29 ms are its
# bytes at 500 Mbit/s and 0.1 ms the links' latency (launch/bench/README.md). `launch calibrate` measures links, not this.
EXCHANGE_SECONDS = 1.2e-3
CROWD = 4  # sequences


@dataclass(frozen=True)
class Workload:
    """One prompt chunk of `prefill_tokens` at some server, then `decode_steps` steps of `active` sequences.

    Few decode steps for a long chunk reward few bytes, many reward layers that need no exchange at all.

    Attributes:
        active: sequences that decode at once, each at a server of its own drawing; servers with demand are alike.
        prefill_tokens: tokens of one prompt chunk; 0 leaves prefill out.
        decode_steps: decode steps for each such chunk; 0 leaves decode out.
        exchange_seconds: what an exchange with another server costs, there and back, beyond link latency and bytes.
        assignment_seconds: computing one token in one expert on a device of speed 1; None takes it from the size of the
            experts (`Problem.assignment_seconds`).
        crowd: sequences that a server decodes at once when the cluster is busy; at least `active` are counted.

    Raises:
        InputError: on construction, for numbers below 0, no active sequence, or neither prefill nor decode.
    """

    active: int = 1
    prefill_tokens: int = 256
    decode_steps: int = 128
    exchange_seconds: float = EXCHANGE_SECONDS
    assignment_seconds: float | None = None
    crowd: int = CROWD

    @property
    def most(self) -> int:
        """Sequences that a server decodes at once when the cluster is busy."""
        return max(self.active, self.crowd)

    def __post_init__(self) -> None:
        for key, least in (("active", 1), ("crowd", 1), ("prefill_tokens", 0), ("decode_steps", 0)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
                raise InputError(f"workload.{key} = {show(value)}: must be a whole number from {least}")
        for key in ("exchange_seconds", "assignment_seconds"):
            value = getattr(self, key)
            if value is None and key == "assignment_seconds":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InputError(f"workload.{key} = {show(value)}: must be a number of seconds from 0")
        if not self.prefill_tokens and not self.decode_steps:
            raise InputError("workload.prefill_tokens = 0 and workload.decode_steps = 0: give one of them work")
