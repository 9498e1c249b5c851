"""How well each server would suit the users here: by label, how often their tokens would leave it for an expert.

Counted from the experts of every step's tokens; a label is what a request's `user` says.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from launch.engine.request import Request

_MOST_LABELS = 256
_MEMORY = 4096  # tokens of a label, beyond which all count half
_FEWEST = 48  # tokens, before anything is said of a label


class Fits:
    """Calls of experts by label, of this server's users.

    Args:
        layers, experts: of the model.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self._shape = (layers, experts)
        self._counts: OrderedDict[str, tuple[np.ndarray, list[int]]] = OrderedDict()

    def add(self, step: Sequence[tuple[Request, np.ndarray]]) -> None:
        """Count a step; its requests, each with the experts of its tokens, int [tokens, layers, k]."""
        for request, chosen in step:
            if request.label:
                counts, tokens = self._of(request.label)
                np.add.at(
                    counts, (np.arange(self._shape[0])[:, None], chosen.swapaxes(0, 1).reshape(len(counts), -1)), 1
                )
                tokens[0] += len(chosen)
                if tokens[0] > _MEMORY:
                    counts //= 2
                    tokens[0] //= 2

    def _of(self, label: str) -> tuple[np.ndarray, list[int]]:
        if label not in self._counts:
            self._counts[label] = np.zeros(self._shape, np.int64), [0]
            if len(self._counts) > _MOST_LABELS:
                self._counts.popitem(last=False)
        self._counts.move_to_end(label)
        return self._counts[label]

    def report(self, serving: np.ndarray, per_token: int) -> dict[str, list[float]]:
        """By label, for each server: layers in which a token that entered there would need another server, expected.

        Args:
            serving: who serves the calls of each server, int [servers, layers, experts].
            per_token: experts that a token calls in a layer, each counted as if by itself.
        """
        own = serving == np.arange(len(serving))[:, None, None]
        found = {}
        for label, (counts, tokens) in list(self._counts.items()):
            if tokens[0] >= _FEWEST:
                local = (own * counts).sum(2) / np.maximum(counts.sum(1), 1)  # [servers, layers]
                found[label] = (1 - local**per_token).sum(1).round(4).tolist()
        return found
