"""Threads and processes that give way to serving where they share cores with it."""

import contextlib
import os
import sys
import threading

STAGING = 3  # still half of what serving gets: a migration is through sooner, and gaps between tokens are no longer
PLANNING = 10


def give_way(nice: int) -> None:
    """Lower the calling thread's priority, where the system gives threads one of their own (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
