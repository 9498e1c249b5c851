"""The engine, the replay of traces and the lock-step simulator take the same steps, row by row, for the same arrivals."""

import numpy as np
import pytest

import launch.engine.engine
from launch.bench.harness.replay import Replay, Spent
from launch.bench.harness.trace import ReplayRequest
from launch.engine.engine import Engine
from launch.engine.request import Request
from placement.data.arrivals import Arrivals
from placement.scheduling import chunks_of
from placement.simulation.lockstep.serve import serve
from tests.helpers.cluster_of_devices import DEVICE_SERVER, Small, random_resident

SEQUENCES, CHUNK = 2, 4


def drawn(seed, count=24):
    """Arrivals at three servers of one, one and two devices: prompts of up to four chunks, queues, pauses, equal times."""
    rng = np.random.default_rng(seed)
    seconds = np.sort(np.round(rng.uniform(0, 3, count), 1)) + (np.arange(count) >= 2 * count // 3) * 20
    return Arrivals(seconds, rng.integers(0, 3, count), rng.integers(1, 15, count), rng.integers(1, 9, count))


def cost(prefill, rows):
    """Computing and network of a step; rows: (device, batch slot, request, start, count) each."""
    return 0.05 + 0.05 * prefill + 0.01 * len(rows), 0.002 * sum(count for *_, count in rows)


def simulated(arrivals, chunks):
    """Kind and rows of every step, and when each request ended."""
    steps = []

    def step(prefill, members):
        rows = [tuple(member) for member in members]
        steps.append((prefill, rows))
        return cost(prefill, rows)

    served = serve(arrivals, DEVICE_SERVER.tolist(), step, sequences=SEQUENCES, chunks=chunks)
    return steps, served.latency + arrivals.seconds


class Recorder:
    """Stands before the engine's steps on the devices, and writes down which rows they are given."""

    def __init__(self, monkeypatch):
        self.steps = []
        for name in ("prefill", "decode_step"):
            take = getattr(launch.engine.engine, name)
            monkeypatch.setattr(launch.engine.engine, name, self._recorded(name == "prefill", take))

    def of(self, engine, requests):
        self.engine, self.number = engine, {id(request): i for i, request in enumerate(requests)}
        return self

    def _recorded(self, prefill, take):
        def recorded(weights, state, tokens, *rest, **shapes):
            given = [np.asarray(part) for part in rest[: 3 if prefill else 2]]
            rows = []
            for device, row in enumerate(self.engine.batch.running):
                if prefill:
                    each = zip(*(part[device].tolist() for part in given), strict=True)
                    found = [(slot, start, count) for slot, start, count in each if count]
                else:
                    positions, active = given
                    found = [(int(slot), int(positions[device, slot]), 1) for slot in np.flatnonzero(active[device])]
                rows += [(device, slot, self.number[id(row[slot])], start, count) for slot, start, count in found]
            self.steps.append((prefill, rows))
            return take(weights, state, tokens, *rest, **shapes)

        return recorded


@pytest.mark.parametrize("seed", [6, 7])
def test_the_engine_takes_the_steps_of_the_simulator(seed, rng, monkeypatch):
    arrivals, small, recorder = drawn(seed), Small.make(), Recorder(monkeypatch)
    _, weights = small.place(random_resident(rng))
    engine = Engine(small.config, small.layout, small.mesh, weights, small.device_server, SEQUENCES, CHUNK, wide=True)
    requests = [
        Request(int(server), rng.integers(0, 64, prompt).tolist(), int(output), float(at))
        for at, server, prompt, output in zip(*vars(arrivals).values(), strict=True)
    ]
    recorder.of(engine, requests)
    now, coming, read, count = 0.0, list(requests), 0, engine._count

    def arrive():
        while coming and coming[0].arrival_s <= now:
            engine.submit(coming.pop(0))

    def take_time(flight):
        """A step is under way, and the next one may have begun already; meanwhile requests arrive."""
        nonlocal now, read
        now += sum(cost(*recorder.steps[read]))
        read += 1
        arrive()
        count(flight)

    monkeypatch.setattr(engine, "_count", take_time)
    while coming or not engine.idle:
        if engine.idle:
            now = max(now, coming[0].arrival_s)
        arrive()
        for request in engine.step():
            request.finished_s = now
    steps, ended = simulated(arrivals, chunks_of(CHUNK, small.config.max_position))
    assert recorder.steps == steps
    assert any(count > CHUNK for _, rows in steps for *_, count in rows)
    assert any(len(rows) > len({device for device, *_ in rows}) for prefill, rows in steps if prefill)
    np.testing.assert_allclose([request.finished_s for request in requests], ended)
    assert [len(request.output) for request in requests] == arrivals.output.tolist()
    _assert_worth_comparing(steps, arrivals)


@pytest.mark.parametrize("seed", range(8))
def test_the_replay_takes_the_steps_of_the_simulator(seed):
    arrivals, steps = drawn(seed, 60), []
    requests = []
    for number, (at, server, prompt, output) in enumerate(zip(*vars(arrivals).values(), strict=True)):
        # Its number is where the routing of its tokens says which request a row belongs to.
        routing = np.full((prompt + output, 1, 1), number, np.int32)
        requests.append(ReplayRequest(int(server), float(at), routing, routing.astype(np.float32), int(prompt)))

    def step(rows):
        found = []
        for device in range(len(DEVICE_SERVER)):
            for slot in np.unique(rows.sequence[device][rows.active[device]]):
                own = np.flatnonzero(rows.active[device] & (rows.sequence[device] == slot))
                (number,) = np.unique(rows.ids[device, own])
                start = rows.position[device, own[0]]
                assert rows.position[device, own].tolist() == list(range(start, start + len(own)))
                found.append((device, int(slot), int(number), int(start), len(own)))
        steps.append((rows.prefill, found))
        return Spent(*cost(rows.prefill, found))

    Replay(requests, DEVICE_SERVER.tolist(), SEQUENCES, CHUNK).run(step)
    expected, ended = simulated(arrivals, (CHUNK,))
    assert steps == expected
    np.testing.assert_allclose([request.finished_s for request in requests], ended)
    _assert_worth_comparing(steps, arrivals)


def _assert_worth_comparing(steps, arrivals):
    """Prompts of several chunks, turns of both kinds, devices that are full while others are idle, and a rest."""
    assert any(count == CHUNK and start >= CHUNK for _, rows in steps for *_, start, count in rows)
    assert {prefill for prefill, _ in steps} == {True, False}
    alternating = [prefill for prefill, _ in steps]
    assert any(alternating[i : i + 4] == [True, False, True, False] for i in range(len(steps)))
    busy = [{device for device, *_ in rows} for _, rows in steps]
    assert len({frozenset(own) for own in busy}) > 4
    # More requests of a server at once than its devices have batch slots.
    span = np.bincount(arrivals.server[: len(arrivals) // 2], minlength=3)
    assert (span > SEQUENCES * np.bincount(DEVICE_SERVER)).any()
