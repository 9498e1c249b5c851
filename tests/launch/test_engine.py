"""The engine: continuous batching changes nobody's text; requests stay at their server; counters add up."""

from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from dancemoe_jax import RequestError, migrate
from dancemoe_jax.inference.sampling import SamplingParams
from launch.engine import engine as engine_module
from launch.engine import step_counters
from launch.engine.engine import Engine
from launch.engine.request import Request
from launch.engine.token_sample import Sampler
from tests.dancemoe_jax.test_finite import prompts_around_an_expert, with_expert_that_overflows
from tests.helpers.cluster_of_devices import Small, random_resident


def make_engine(small, rng, sequences=2):
    slots, weights = small.place(random_resident(rng))
    engine = Engine(small.config, small.layout, small.mesh, weights, small.device_server, sequences, chunk=4)
    return engine, slots


def test_texts_equal_the_reference_however_requests_join_and_experts_move(rng):
    small = Small.make()
    engine, slots = make_engine(small, rng)
    lengths = rng.integers(1, 14, 11)
    requests = [
        Request(int(rng.integers(3)), rng.integers(0, 64, n).tolist(), int(rng.integers(1, 12)), float(i))
        for i, n in enumerate(lengths)
    ]
    waiting, finished = list(requests), []
    for step in range(400):
        if waiting and step % 4 == 0:
            engine.submit(waiting.pop(0))
        if step % 9 == 5:
            weights = engine.weights
            pool, slots = migrate(
                weights.pool, slots, random_resident(rng), small.read, layout=small.layout, mesh=small.mesh
            )
            engine.adopt(weights._replace(pool=pool, tables=small.tables(slots)))
        finished += engine.step()
        if not waiting and engine.idle:
            break
    assert len(finished) == len(requests)
    assert any(len(request.epochs) > 2 for request in requests)
    for request in requests:
        assert request.output == small.reference_text(request.prompt, request.max_tokens)


def test_requests_run_on_their_servers_devices_and_wait_when_full(rng):
    small = Small.make()
    engine, _ = make_engine(small, rng, sequences=2)
    for i in range(7):
        engine.submit(Request(2, [1, 2, 3], 4, float(i)))
    engine.step()
    assert [sum(r is not None for r in row) for row in engine.batch.running] == [0, 0, 2, 2]
    assert len(engine.batch.waiting[2]) == 3
    while not engine.idle:
        engine.step()
    counts = engine.counts()
    assert counts[:2].sum() == 0
    # Each request: 3 prompt tokens and 3 of its 4 outputs went through the model, in every layer, k experts each.
    assert counts[2].sum() == 7 * (3 + 3) * small.config.num_layers * small.config.top_k


def test_counters_count_every_assignment_once_and_starts_anew(rng):
    small = Small.make()
    engine, _ = make_engine(small, rng)
    for server in range(3):
        engine.submit(Request(server, [5, 6, 7, 8, 9], 5, 0.0))
    while not engine.idle:
        engine.step()
    counters = engine.take_counters()
    np.testing.assert_array_equal((counters.local + counters.remote).sum(0), engine.counts().sum((0, 2)))
    assert counters.layer_steps == counters.steps * small.config.num_layers
    assert 0 < counters.layer_steps_crossing <= counters.layer_steps
    assert engine.take_counters().steps == 0


def test_all_that_a_step_gives_is_on_its_way_before_any_of_it_is_waited_for(rng, monkeypatch):
    engine = make_engine(Small.make(), rng)[0]
    engine.submit(Request(0, [1, 2, 3], 2, 0.0))
    kind, events = type(jnp.zeros(1)), []
    send, read = kind.copy_to_host_async, step_counters.own_rows
    monkeypatch.setattr(engine_module, "on_cpu", lambda mesh: False)
    monkeypatch.setattr(kind, "copy_to_host_async", lambda array: (events.append("sent"), send(array))[1])
    for module in (step_counters, engine_module):
        monkeypatch.setattr(module, "own_rows", lambda array: (events.append("read"), read(array))[1])
    engine.step()
    each = 7  # tokens, control words, finite layers, four counters
    assert events[: 2 * each] == ["sent"] * 2 * each  # of the step, and of the next one
    assert events[2 * each :] == ["read"] * len(events[2 * each :])
    assert len(events) > 2 * each


def test_prompts_that_do_not_fit_are_refused_before_they_are_queued(rng):
    small = Small.make()
    engine, _ = make_engine(small, rng)
    with pytest.raises(RequestError, match="context of 48"):
        engine.submit(Request(0, [1] * 48, 4, 0.0))
    assert engine.idle
    assert engine.step() == []


def replay(small, resident, requests, sampler=None):
    _, weights = small.place(resident)
    engine = Engine(small.config, small.layout, small.mesh, weights, small.device_server, 2, chunk=4, replays=True)
    engine.sampler = sampler
    served = [Request(server, prompt, 5, 0.0, routed=routed) for server, prompt, routed in requests]
    for request in served:
        engine.submit(request)
    while not engine.idle:
        engine.step()
    return engine, [request.output for request in served]


def test_given_routing_is_what_is_counted_and_gives_the_same_under_two_placements(rng):
    small = Small.make()
    layers, experts, k = small.config.num_moe_layers, small.config.num_experts, small.config.top_k
    requests, expected = [], np.zeros((3, layers, experts), np.int64)
    for server in (0, 1, 2, 2, 2, 2, 2):
        fed = int(rng.integers(2, 12)) + 4
        ids = rng.random((fed, layers, experts)).argsort(-1)[..., :k].astype(np.int32)
        weights = rng.random(ids.shape).astype(np.float32)
        requests.append((server, rng.integers(0, 64, fed - 4).tolist(), (ids, weights)))
        for layer in range(layers):
            expected[server, layer] += np.bincount(ids[:, layer].ravel(), minlength=experts)
    sampler = Sampler((layers, experts, k), half_life=1e9)
    engine, outputs = replay(small, random_resident(rng), requests, sampler)
    np.testing.assert_array_equal(engine.counts(), expected)
    sample = sampler.take()
    sampled = Counter((int(server), own.tobytes()) for server, own in zip(sample.server, sample.ids, strict=True))
    assert sampled == Counter(
        (server, own.astype(np.uint8).tobytes()) for server, _, (ids, _) in requests for own in ids
    )
    assert all(len(output) == 5 for output in outputs)
    assert replay(small, random_resident(rng), requests)[1] == outputs


def test_given_routing_that_does_not_fit_is_refused(rng):
    small = Small.make()
    plain, _ = make_engine(small, rng)
    shape = (7, small.config.num_moe_layers, small.config.top_k)
    ids, weights = np.zeros(shape, np.int32), np.ones(shape, np.float32)
    with pytest.raises(RequestError, match="replays=True"):
        plain.submit(Request(0, [1, 2, 3], 5, 0.0, routed=(ids, weights)))
    for routed, message in (
        (None, "with each"),
        ((ids[:6], weights[:6]), "7 tokens are fed"),
        ((ids + 999, weights), "outside"),
    ):
        with pytest.raises(RequestError, match=message):
            replay(small, random_resident(rng), [(0, [1, 2, 3], routed)])


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, seed=3)])
def test_a_request_that_is_not_finite_ends_with_an_error_and_the_others_go_on(rng, params):
    small = Small.make()
    expert, choosing, others = prompts_around_an_expert(small, rng)

    def serve():
        engine, _ = make_engine(small, np.random.default_rng(3))
        # A queue that is longer than the batch slots: later ones take the place of the one that ended.
        requests = [
            Request(2, prompt, 1, float(i), params=params) for i, prompt in enumerate([*others[:6], *others[:6]])
        ]
        requests.insert(2, Request(2, choosing, 1, 1.5, params=params))
        for request in requests:
            engine.submit(request)
        finished = []
        while not engine.idle:
            finished += engine.step()
        assert {id(request) for request in finished} == {id(request) for request in requests}
        return requests

    healthy = serve()
    with_expert_that_overflows(small, expert)
    bad = serve()
    assert (bad[2].reason, bad[2].output) == ("error", [])
    assert "from layer 1 on" in bad[2].error
    del healthy[2], bad[2]
    assert [request.output for request in bad] == [request.output for request in healthy]
    assert {request.reason for request in bad} == {"length"}
