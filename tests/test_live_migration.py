"""Live migration in one process: experts move while requests run, whatever the placement, and nobody notices."""

import threading
import time

import numpy as np
import pytest
from cluster_of_devices import CAPACITY, PROMPTS, Small, random_resident

from dancemoe_jax.config import ModelError
from dancemoe_jax.generate import decode_step, prefill
from launch.controller import Controller, Policy
from launch.engine import Engine, Request
from launch.hosting import Host, Loaded
from launch.mover import Mover, Order
from launch.reports import Reporter
from placement import Cluster, Placement, Profile

EXPERT = 1000
CLUSTER = Cluster.from_dict({
    "server": [
        {"name": "a", "devices": [{"memory": CAPACITY[0] * EXPERT}]},
        {"name": "b", "devices": [{"memory": CAPACITY[1] * EXPERT}]},
        {"name": "c", "devices": [{"memory": CAPACITY[2] * EXPERT}, {"memory": CAPACITY[3] * EXPERT}]},
    ],
    "network": {"bandwidth": "500Mbps", "latency": "1ms"},
})  # fmt: skip
COUNT = 24


def placement_of(resident, source="test"):
    layers, experts = resident.shape[1:]
    model = {
        "name": "small",
        "layers": layers,
        "experts": experts,
        "top_k": 3,
        "expert_bytes": EXPERT,
        "reserved_bytes": 0,
    }
    return Placement(resident, CLUSTER.device_names, "random", model, source=source)


class Serving:
    """A small model that is served, with experts that can be ordered about."""

    def __init__(self, rng, state, read=None, **options):
        self.small = small = Small.make()
        resident = random_resident(rng)
        slots, weights = small.place(resident)
        self.engine = Engine(small.config, small.layout, small.mesh, weights, small.device_server, 2, chunk=4)
        counts = np.ones((3, *resident.shape[1:]), np.int64)
        profile = Profile(counts, CLUSTER.names, model="small", top_k=3, hidden_size=32, expert_bytes=EXPERT)
        self.loaded = Loaded(self.engine, CLUSTER, placement_of(resident), slots, profile, read or small.read)
        self.host = Host(self.engine, 0)
        self.mover = Mover(self.loaded, self.host.channel, self.host.ring, **options)
        self.reporter = Reporter(self.engine, self.host.channel, 0.02)
        self.policy = Policy(interval=0, half_life=5, staging_bytes=options.get("staging_bytes", 2**30))
        self.controller = Controller(self.loaded, self.mover, self.host.channel, state, self.policy, {})
        self.host.between = self.between
        self.loop = threading.Thread(target=self.host.run, daemon=True)

    def between(self):
        self.reporter.between()
        return self.mover.between()

    def start(self):
        self.mover.start()
        self.controller.start()
        self.loop.start()

    def stop(self):
        self.host.finish()
        self.loop.join(60)
        self.mover.end()
        self.reporter.end()
        assert not self.loop.is_alive()

    def move(self, resident):
        number = self.mover.send(placement_of(resident), np.zeros((3, resident.shape[1], 3), bool), "test")
        outcome = self.mover.wait(number, 60)
        assert outcome is not None
        return outcome


@pytest.fixture
def serving(rng, tmp_path):
    made = []

    def make(**options):
        made.append(Serving(rng, tmp_path, **options))
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.mark.parametrize("staging", [2**30, 3 * EXPERT])
def test_tokens_are_the_reference_s_while_experts_move(serving, rng, staging):
    one = serving(staging_bytes=staging)
    texts = [one.small.reference_text(prompt, COUNT) for prompt in PROMPTS]
    streams = [(one.host.submit(Request(i % 3, p, COUNT, 0.0)), i) for i, p in enumerate(PROMPTS)]
    list(streams[0][0])  # compiled
    compiled = prefill._cache_size() + decode_step._cache_size()
    ends = threading.Event()

    def keep_asking():
        while not ends.is_set():
            for i, prompt in enumerate(PROMPTS):
                streams.append((one.host.submit(Request(i % 3, prompt, COUNT, 0.0)), i))
            list(streams[-1][0])

    asking = threading.Thread(target=keep_asking)
    asking.start()
    for _ in range(6):
        resident = random_resident(rng)
        outcome = one.move(resident)
        assert outcome.failed == ""
        assert (one.mover.placement.resident == resident).all()
        assert (one.mover.slots >= 0).tolist() == resident.tolist()
        assert outcome.rounds >= 1
    ends.set()
    asking.join()
    across = 0
    for stream, i in streams:
        list(stream)
        assert stream.request.output == texts[i]
        across += len(stream.request.epochs) > 1
    assert across > 3
    assert prefill._cache_size() + decode_step._cache_size() == compiled
    if staging < 2**30:
        largest = max(sum(a.nbytes for a in one.small.read(0, 0)[:2]), 1)
        assert one.mover.peak_bytes <= 4 * 3 * largest  # three a server, the last one's share on two devices


def test_a_sleeping_cluster_migrates_too(serving, rng):
    one = serving()
    list(one.host.submit(Request(0, [5], 2, 0.0)))
    resident = random_resident(rng)
    assert one.move(resident).failed == ""
    assert one.host.submit(Request(1, PROMPTS[0], 8, 0.0)) is not None
    stream = one.host.submit(Request(2, PROMPTS[2], 8, 0.0))
    assert list(stream) == one.small.reference_text(PROMPTS[2], 8)


def test_a_checkpoint_that_cannot_be_read_leaves_a_placement_that_serves(serving, rng):
    broken = threading.Event()
    small = Small.make()

    def read(layer, expert):
        if broken.is_set() and (layer, expert) == (1, 3):
            raise ModelError("experts/00001: expert 3 is damaged (checksum differs); convert the model again")
        return small.read(layer, expert)

    one = serving(read=read, staging_bytes=2 * EXPERT)
    broken.set()
    resident = random_resident(rng)
    before = one.mover.placement.resident
    gains = [d for d in range(4) if not before[d, 1, 3]]
    resident[gains, 1, 3] = True
    for device in gains:
        drop = next(
            tuple(i) for i in np.argwhere(resident[device]) if resident[:, i[0], i[1]].sum() > 1 and tuple(i) != (1, 3)
        )
        resident[device][drop] = resident[device].sum() <= CAPACITY[device]
    outcome = one.move(resident)
    assert "expert 3 is damaged" in outcome.failed
    assert one.mover.placement.resident.any(0).all()
    stream = one.host.submit(Request(2, PROMPTS[2], 8, 0.0))
    assert list(stream) == one.small.reference_text(PROMPTS[2], 8)
    broken.clear()
    assert one.move(resident).failed == ""


def test_a_migration_is_given_up_on_request(serving, rng):
    one = serving(bandwidth=20_000.0)
    resident = random_resident(rng)
    number = one.mover.send(placement_of(resident), np.zeros((3, 3, 3), bool), "test")
    time.sleep(0.3)
    assert one.mover.stage_name.startswith("staging")
    one.mover.give_up(number)
    outcome = one.mover.wait(number, 20)
    assert outcome is not None
    assert outcome.failed == "given up on request"
    stream = one.host.submit(Request(2, PROMPTS[2], 8, 0.0))
    assert list(stream) == one.small.reference_text(PROMPTS[2], 8)


def test_staging_keeps_its_rate(serving, rng):
    size = sum(part.nbytes for part in Small.make().read(0, 0)[:2])
    rate = 40 * size
    one = serving(bandwidth=float(rate))
    outcome = one.move(random_resident(rng))
    assert outcome.bytes / outcome.stage_s <= 1.1 * rate
    assert outcome.bytes / outcome.stage_s >= 0.5 * rate


def test_an_order_travels(rng):
    present, target = placement_of(random_resident(rng)), placement_of(random_resident(rng))
    likely = rng.random((3, 3, 3)) < 0.5
    order = Order.decode(Order(7, target, likely, 3, "because").encode(), present)
    assert (order.number, order.epoch, order.reason) == (7, 3, "because")
    assert (order.placement.resident == target.resident).all()
    assert (order.likely == likely).all()
