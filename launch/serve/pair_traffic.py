"""Which servers the tokens that enter here need: rows and exchanges by server, and the calls of single tokens.

Counted on the host from the experts of every step's tokens, since devices do not count by target.
"""

from collections.abc import Callable, Sequence

import numpy as np

from launch.engine.request import Request


class PairTraffic:
    """Totals of one server's users, who are those of this process.

    Args:
        server: index of this one; serving: says which server serves its calls of each expert, int [layers, experts], at
            this moment.
        servers: how many there are.

    Attributes:
        rows: that tokens here needed from each server, one for each token and layer that called any expert there.
        exchanges: pairs (step, layer) in which at least one row went to each server.
    """

    def __init__(self, server: int, servers: int, serving: Callable[[], np.ndarray]) -> None:
        self._server, self._serving = server, serving
        self.rows = np.zeros(servers, np.int64)
        self.exchanges = np.zeros(servers, np.int64)

    def add(self, step: Sequence[tuple[Request, np.ndarray]]) -> None:
        """Count a step; its requests, each with the experts of its tokens, int [tokens, layers, k]."""
        serving = self._serving()
        layers, servers = np.arange(len(serving))[:, None], np.arange(len(self.rows))
        targets = serving[layers, np.concatenate([experts for _, experts in step])]
        needs = (targets[..., None] == servers).any(2)  # [tokens, layers, servers]
        needs[..., self._server] = False
        self.rows += needs.sum((0, 1))
        self.exchanges += needs.any(0).sum(0)
        for request, experts in step:
            if request.wants_servers:
                request.served_by = np.bincount(serving[layers, experts[-1]].ravel(), minlength=len(servers)).tolist()
