"""One of three servers that sleep and are woken by the last: sleeping_server.py NAME COORDINATOR ROUNDS. Prints the moments."""

import sys
import time

from launch.cluster.channel import ClusterChannel
from launch.cluster.join import join
from placement import Cluster

SERVERS = [{"name": f"edge-{x}", "devices": [{"memory": 1}]} for x in "abc"]
server, coordinator, rounds = sys.argv[1:]
with join(Cluster.from_dict({"server": SERVERS}), server, coordinator=coordinator, timeout=60):
    channel = ClusterChannel()
    for number in range(int(rounds)):
        assert channel.get(f"sleep/{number}", 0.05) is None
        if server == "edge-c":
            time.sleep(0.1)
            print("waking", time.time(), flush=True)
            channel.put(f"sleep/{number}", b"over")
        while channel.get(f"sleep/{number}", 0.2) is None:
            pass
        print("woke", time.time(), flush=True)
        time.sleep(0.1)
