"""Ready when it says so: every shape of a step is compiled, and each kind of step run once, before a server serves."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

import jax

from dancemoe_jax.inference.sampling_params import SamplingParams
from launch.engine.engine import Engine
from launch.engine.programs import check_programs
from launch.engine.request import Request
from placement.scheduling import Wish

log = logging.getLogger(__name__)

_PROMPT, _TOKENS = [0, 0], 2
_SAY_S = 20.0
_KINDS = (("greedy", SamplingParams()), ("sampling", SamplingParams(temperature=1.0)))


def warm_up(engine: Engine, server: str) -> None:
    """Serve small requests on each device's server for each size of a prefill step, one with the likeliest tokens and one
    that samples, and forget them. All processes call it together, before any request has come.

    Args:
        server: name of this one, for progress.

    Raises:
        InputError: the steps do not fit a card, or the servers' programs do not fit together (engine.programs).
    """
    begin = time.monotonic()
    with _saying_that_it_goes_on(server, begin):
        check_programs(engine)
        _serve_small_requests(engine, server, begin)
    engine.forget()
    jax.block_until_ready(engine.state)
    log.info("%s: compiled after %.1f s", server, time.monotonic() - begin)


@contextlib.contextmanager
def _saying_that_it_goes_on(server: str, begin: float) -> Iterator[None]:
    """A line now and then within the block: on a busy machine a first start takes minutes."""
    over = threading.Event()

    def say() -> None:
        while not over.wait(_SAY_S):
            log.info("%s: still compiling after %.0f s", server, time.monotonic() - begin)

    threading.Thread(target=say, name="progress", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _serve_small_requests(engine: Engine, server: str, begin: float) -> None:
    for kind, params in _KINDS:
        log.info("%s: compiling the steps (%s)", server, kind)
        for chunk in engine.chunks:
            for own in sorted({int(engine.device_server[device]) for device in engine.own}):
                engine.submit(Request(own, list(_PROMPT), _TOKENS, begin, params=params))
            engine.wake(Wish(chunk, False))
            while not engine.asleep:
                engine.step()
