"""Ready when it says so: every shape of a step is compiled, and each kind of step run once, before a server serves."""

import logging
import time

import jax

from dancemoe_jax.inference.sampling_params import SamplingParams
from launch.engine.engine import Engine
from launch.engine.programs import check_programs
from launch.engine.request import Request
from placement.scheduling import Wish

log = logging.getLogger(__name__)

_PROMPT, _TOKENS = [0, 0], 2
_KINDS = (("greedy", SamplingParams()), ("sampling", SamplingParams(temperature=1.0)))


def warm_up(engine: Engine, server: str) -> None:
    """Serve small requests on each device's server for each width of a prefill step, one with the likeliest tokens and one
    that samples, and forget them. All processes call it together, before any request has come.

    Args:
        server: name of this one, for progress.

    Raises:
        InputError: the steps do not fit a card, or the servers' programs do not fit together (engine.programs).
    """
    begin = time.monotonic()
    check_programs(engine)
    for kind, params in _KINDS:
        log.info("%s: compiling the steps (%s)", server, kind)
        for width in engine.widths:
            for own in sorted({int(engine.device_server[device]) for device in engine.own}):
                engine.submit(Request(own, list(_PROMPT), _TOKENS, begin, params=params))
            engine.wake(Wish(width.chunk, width.prompts, False))
            while not engine.asleep:
                engine.step()
    engine.forget()
    jax.block_until_ready(engine.state)
    log.info("%s: compiled after %.1f s", server, time.monotonic() - begin)
