"""How long a newcomer would wait for its turn, and how long it may, from what requests have taken lately. Has no clock."""

from collections import deque

import numpy as np

_ROUNDS = 4  # turns of all batch slots that show how fast requests are served now
_USUAL = 256  # requests that show what is usual
_FEWEST = 8  # of them, before anything is known
_WITHIN = 1.4  # times the usual, as what is expected is not quite what comes
_BUNCH = 5.0  # times a request's serving that it may wait in a bunch
_GUESS_S = 1.0  # for serving a request, before one has been served


class Pace:
    """Of the requests of one server.

    Without a limit in seconds a newcomer may wait as long as its answer will be there within twice the usual time: the 95th
    percentile of those that came when nobody was refused. While all is calm it may wait for as long as serving five takes, as
    real requests come in bunches, and a bunch is soon over. Before anything is known, as many as are served at once may wait.

    Args:
        slots: requests that it serves at once; longest: seconds that a newcomer may be expected to wait, instead.
    """

    def __init__(self, slots: int, longest: float | None = None) -> None:
        self._slots, self._longest = slots, longest
        self._lately: deque[float] = deque(maxlen=_ROUNDS * slots)
        self._usual: deque[float] = deque(maxlen=_USUAL)

    def served(self, seconds: float, whole: float | None) -> None:
        """A request has been answered.

        Args:
            seconds: since it had a slot; whole: since it came, None where that says nothing of what is usual.
        """
        self._lately.append(seconds)
        if whole is not None:
            self._usual.append(whole)

    def longest(self, calm: bool) -> float:
        """Seconds that a newcomer may be expected to wait; calm: nobody has been refused for a while."""
        if self._longest is not None:
            return self._longest
        if len(self._usual) < _FEWEST:
            return self._serving
        # By serving alone: what waits because of it must not make it longer.
        bunch = _BUNCH * self._serving if calm else 0.0
        return max(bunch, _WITHIN * _p95(self._usual) - _p95(self._lately))

    @property
    def _serving(self) -> float:
        """Seconds that a request has had a slot lately, mean."""
        return sum(self._lately) / len(self._lately) if self._lately else _GUESS_S

    def wait(self, waiting: int, running: int, oldest: float) -> float:
        """Seconds that a newcomer would wait for its turn.

        Args:
            waiting: requests before it that have no slot; running: those that have one; oldest: seconds that the first of those
                that wait has waited.
        """
        serving = self._serving
        # Where memory for keys and values is short, slots stay free while requests wait.
        slots = self._slots if oldest <= serving else max(1, min(running, self._slots))
        return max(0, waiting + running + 1 - slots) * serving / slots


def _p95(seconds: deque[float]) -> float:
    return float(np.percentile(seconds, 95))
