"""A step begins before the one before it has been read: nobody's text, pages or counts show it."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from dancemoe_jax import SamplingParams
from dancemoe_jax.expert_parallel.migrate import migrate
from launch.engine import engine as engine_module
from launch.engine.engine import Engine
from launch.engine.pages import least_pages
from launch.engine.request import Request
from tests.helpers.cluster_of_devices import Small, random_resident

END = 5  # ends every text


class EvenTokens:
    """In the place of a grammar: no token whose number is odd, nor the same one twice."""

    def __init__(self) -> None:
        self._last = -1

    def allowed(self):
        return np.packbits([n % 2 == 0 and n != self._last for n in range(64)], bitorder="little").view(np.uint32)

    def take(self, token):
        assert token % 2 == 0
        assert token != self._last
        self._last = token
        return None


def drawn(rng, count):
    for number in range(count):
        params = SamplingParams(
            temperature=float(number % 3 == 1), seed=number, repetition_penalty=1.4 if number % 6 == 5 else 1.0
        )
        yield {
            "server": int(rng.integers(3)) if number % 4 == 0 else 0,
            "prompt": rng.integers(6, 64, int(rng.integers(1, 40))).tolist(),
            "max_tokens": int(rng.integers(1, 56)),
            "arrival_s": float(number),
            "params": params,
            "stop_token_ids": frozenset(range(0, 64, 9)) if number % 8 == 3 else frozenset(),
            "logprobs": 2 if number % 5 == 0 else None,
        }


def make_request(fields: dict[str, Any], number: int, seen: dict[int, list[Any]]) -> Request:
    request = Request(**fields, label=str(number))
    if number % 7 == 6:
        request.grammar = EvenTokens()  # pyright: ignore[reportAttributeAccessIssue]
    own = seen.setdefault(number, [])

    def on_token(token: int) -> bool:
        own.append((token, request.last_logprobs))
        return number % 8 == 4 and len(own) > 6  # a text that ends it

    request.on_token = on_token
    return request


def serve(engine, drawn_fields, rng, leave=frozenset()):
    """All requests, that come now and then; what each was given, and the requests."""
    seen: dict[int, list[Any]] = {}
    requests = [make_request(fields, number, seen) for number, fields in enumerate(drawn_fields)]
    coming = list(requests)
    while coming or not engine.idle:
        for _ in range(int(rng.integers(0, 4))):
            if coming:
                engine.submit(coming.pop(0))
        for request in engine.in_flight:
            if int(request.label) in leave and len(request.output) > 3:
                request.cancelled = True
        engine.step()
    return seen, requests


@pytest.mark.parametrize("pages", [None, "few"])
def test_texts_are_those_of_steps_that_wait_for_each_other(rng, pages):
    small = Small.make(max_position=96)
    small = dataclasses.replace(small, config=dataclasses.replace(small.config, eos_token=END))
    _, weights = small.place(random_resident(rng))
    least = least_pages(small.config.layer_windows, 96, 8)
    fields = list(drawn(rng, 50))
    given = {}
    for hold in (True, False):
        engine = Engine(
            small.config, small.layout, small.mesh, weights, small.device_server, 3, 8, pages=pages and least
        )
        engine.hold = hold
        given[hold] = serve(engine, fields, np.random.default_rng(1))[0]
        while not engine.asleep:
            engine.step()
        assert all(own.used == 0 for own in engine.batch.pages.values())
        assert pages is None or engine.batch.preempted
    assert given[True] == given[False]
    assert any(tokens and tokens[-1][0] == END for tokens in given[False].values())


def test_who_leaves_is_given_nothing_more_and_takes_nobody_s_pages(rng):
    small = Small.make(max_position=96)
    _, weights = small.place(random_resident(rng))
    fields = [dict(own, stop_token_ids=frozenset()) for own in drawn(rng, 30)]
    leave = frozenset(range(0, 30, 4))
    given = {}
    for who in (frozenset[int](), leave):
        engine = Engine(small.config, small.layout, small.mesh, weights, small.device_server, 2, 8)
        given[bool(who)], requests = serve(engine, fields, np.random.default_rng(2), who)
    for number, tokens in given[True].items():
        assert tokens == given[False][number][: len(tokens)]
        if number not in leave:
            assert len(tokens) == len(given[False][number])
    assert any(request.reason == "cancelled" for request in requests)
    assert all(not request.coming for request in requests if request.reason != "cancelled")


def test_the_next_step_begins_before_what_one_gives_is_read(rng, monkeypatch):
    small = Small.make()
    _, weights = small.place(random_resident(rng))
    engine = Engine(small.config, small.layout, small.mesh, weights, small.device_server, 2, 4)
    engine.submit(Request(0, [1, 2, 3], 4, 0.0))
    events, begin, read = [], engine_module.decode_step, engine_module.own_rows
    monkeypatch.setattr(engine_module, "decode_step", lambda *a, **k: (events.append("begin"), begin(*a, **k))[1])
    monkeypatch.setattr(engine_module, "own_rows", lambda array: (events.append("read"), read(array))[1])
    while not engine.idle:
        events.append("step")
        engine.step()
    # A prefill step gives the first token, three decode steps the others; the last is not followed by another.
    expected = ["step", "begin", "read", "read", "step", "begin", "read", "read", "step", "begin", "read", "read"]
    assert events == [*expected, "step", "read", "read"]
    assert engine.steps == {"prefill": 1, "decode": 3}


def test_nothing_begins_before_the_caller_s_turn_where_a_process_holds(rng):
    small = Small.make()
    slots, weights = small.place(random_resident(rng))
    engine = Engine(small.config, small.layout, small.mesh, weights, small.device_server, 2, 4)
    engine.hold = True
    request = Request(0, [1, 2, 3], 12, 0.0)
    engine.submit(request)
    while not engine.idle:
        engine.step()
        pool, slots = migrate(
            engine.weights.pool, slots, random_resident(rng), small.read, layout=small.layout, mesh=small.mesh
        )
        engine.adopt(engine.weights._replace(pool=pool, tables=small.tables(slots)))
    assert request.output == small.reference_text(request.prompt, 12)
    # One step of prefill and eleven of decoding, each under a placement of its own.
    assert request.epochs == set(range(12))
