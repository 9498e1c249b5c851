"""Put before a front door's PYTHONPATH: its worker fails a step, or dies, where a prompt asks for it."""

import os
import sys

if "--front-door" in sys.argv:
    from launch.engine.engine import Engine

    give = Engine._give

    def _give(self, flight):
        for rows, request in flight.members:
            text = bytes(request.prompt)
            if text.startswith(b"FAIL") and rows.start == 0:
                raise ValueError("a step that fails")
            if text.startswith(b"DIE"):
                os._exit(70)
        return give(self, flight)

    Engine._give = _give
