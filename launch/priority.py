"""Threads that give way to serving where they share cores with it."""

import contextlib
import os
import sys
import threading

_NICE = 10


def give_way() -> None:
    """Lower the calling thread's priority, where the system gives threads one of their own (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
