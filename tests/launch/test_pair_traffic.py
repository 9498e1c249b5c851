"""Rows and exchanges by server, against counting one by one; and the calls of single tokens."""

import numpy as np

from launch.engine.request import Request
from launch.serve.pair_traffic import PairTraffic


def test_rows_and_exchanges_are_those_counted_one_by_one():
    rng = np.random.default_rng(0)
    serving = rng.integers(3, size=(4, 8))
    counted = PairTraffic(1, 3, lambda: serving)
    rows, exchanges = np.zeros(3, int), np.zeros(3, int)
    for _ in range(5):
        step = [(Request(1, [1], 4, 0.0, wants_servers=n == 3), rng.integers(8, size=(n, 4, 2))) for n in (1, 3)]
        counted.add(step)
        crossed = set()
        for _, experts in step:
            for token in experts:
                for layer, chosen in enumerate(token):
                    for target in {int(serving[layer, expert]) for expert in chosen} - {1}:
                        rows[target] += 1
                        crossed.add((layer, target))
        for _, target in crossed:
            exchanges[target] += 1
        last = step[1][1][-1]
        by_server = [sum(int(serving[i, e]) == s for i, chosen in enumerate(last) for e in chosen) for s in range(3)]
        assert step[1][0].served_by == by_server
        assert step[0][0].served_by == []
    assert counted.rows.tolist() == rows.tolist()
    assert counted.exchanges.tolist() == exchanges.tolist()
    assert rows[1] == 0 < rows[0]
