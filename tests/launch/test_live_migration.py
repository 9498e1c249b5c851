"""Live migration in one process: experts move while requests run, whatever the placement, and nobody notices."""

import dataclasses
import io
import json
import os
import sys
import threading
import time

import jax
import numpy as np
import pytest

import dancemoe_jax.checkpoint.arena
import launch.migration.staging
from dancemoe_jax.checkpoint.arena import Arena, room
from dancemoe_jax.errors import ModelError
from dancemoe_jax.inference.steps import decode_step, prefill
from launch.__main__ import main
from launch.cluster.channel import OwnChannel
from launch.engine.engine import Engine
from launch.engine.host import Host
from launch.engine.loading import Loaded
from launch.engine.request import Request
from launch.engine.token_sample import Sampler, sampled_shape
from launch.migration.command import MigrationCommand
from launch.migration.control import ControlServer, ask
from launch.migration.controller import Controller
from launch.migration.decision import Decision
from launch.migration.record import NAME, read_record, write_record
from launch.migration.requests import Requests
from launch.migration.telemetry import Reporter
from launch.migration.worker import MigrationWorker
from placement import Cluster, InputError, Profile
from placement.migration.adapt import adapt
from placement.migration.decide import Policy
from tests.helpers.cluster_of_devices import CAPACITY, CLUSTER, EXPERT, PROMPTS, Small, placement_of, random_resident

COUNT = 24
SECRET = b"known to the servers of these tests"


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
        self.worker = MigrationWorker(self.loaded, self.host.channel, self.host.wake, **options)
        sampler = Sampler(sampled_shape(profile), half_life=500)
        self.reporter = Reporter(self.engine, self.host.channel, 0.02, sampler, 0.02)
        self.policy = Policy(interval=0, half_life=500, staging_bytes=options.get("staging_bytes", 2**30))
        self.controller = Controller(self.loaded, self.worker, self.host.channel, state, self.policy, {})
        self.host.between = self.between
        self.loop = threading.Thread(target=self.host.run, daemon=True)

    def between(self):
        self.reporter.between()
        return self.worker.between()

    def start(self):
        self.worker.start()
        self.controller.start()
        self.loop.start()

    def stop(self):
        self.host.finish()
        self.loop.join(60)
        self.controller.end()
        self.worker.end()
        self.reporter.end()
        assert not self.loop.is_alive()

    def move(self, resident):
        number = self.worker.send(placement_of(resident), np.zeros((3, resident.shape[1], 3), bool), "test")
        outcome = self.worker.wait(number, 60)
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


class SpoiledArena(Arena):
    """One whose pieces are of no use to a reader that still needs them when they are free."""

    def reset(self):
        for piece in self._taken:
            piece[:] = 255  # NaN in every type
        super().reset()


@pytest.mark.parametrize("staging", [2**30, 3 * EXPERT])
def test_tokens_are_the_reference_s_while_experts_move(serving, rng, staging, monkeypatch):
    monkeypatch.setattr(dancemoe_jax.checkpoint.arena, "LARGE", 0)
    monkeypatch.setattr(launch.migration.staging, "Arena", SpoiledArena)
    small, staged = Small.make(), []

    def into(arena, array):
        copy = room(array.nbytes, arena).view(array.dtype).reshape(array.shape)
        copy[...] = array
        staged.append(copy)
        return copy

    def read(layer, expert, arena=None):
        return jax.tree.map(lambda array: into(arena, array), small.read(layer, expert))

    one = serving(read=read, staging_bytes=staging)
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
        assert (one.worker.placement.resident == resident).all()
        assert (one.worker.slots >= 0).tolist() == resident.tolist()
        assert outcome.rounds >= 1
    ends.set()
    asking.join()
    assert len({array.__array_interface__["data"][0] for array in staged}) < len(staged) / 2
    across = 0
    for stream, i in streams:
        list(stream)
        assert stream.request.output == texts[i]
        across += len(stream.request.epochs) > 1
    assert across > 3
    assert prefill._cache_size() + decode_step._cache_size() == compiled
    if staging < 2**30:
        largest = max(sum(a.nbytes for a in one.small.read(0, 0)[:2]), 1)
        assert one.worker.peak_bytes <= 4 * 3 * largest  # three a server, the last one's share on two devices


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

    def read(layer, expert, arena=None):
        if broken.is_set() and (layer, expert) == (1, 3):
            raise ModelError("experts/00001: expert 3 is damaged (checksum differs); convert the model again")
        return small.read(layer, expert)

    one = serving(read=read, staging_bytes=2 * EXPERT)
    broken.set()
    resident = random_resident(rng)
    before = one.worker.placement.resident
    gains = [d for d in range(4) if not before[d, 1, 3]]
    resident[gains, 1, 3] = True
    for device in gains:
        drop = next(
            tuple(i) for i in np.argwhere(resident[device]) if resident[:, i[0], i[1]].sum() > 1 and tuple(i) != (1, 3)
        )
        resident[device][drop] = resident[device].sum() <= CAPACITY[device]
    outcome = one.move(resident)
    assert "expert 3 is damaged" in outcome.failed
    assert one.worker.placement.resident.any(0).all()
    stream = one.host.submit(Request(2, PROMPTS[2], 8, 0.0))
    assert list(stream) == one.small.reference_text(PROMPTS[2], 8)
    broken.clear()
    assert one.move(resident).failed == ""


def test_a_migration_is_given_up_on_request(serving, rng):
    one = serving(bandwidth=20_000.0)
    resident = random_resident(rng)
    number = one.worker.send(placement_of(resident), np.zeros((3, 3, 3), bool), "test")
    time.sleep(0.3)
    assert one.worker.stage_name.startswith("staging")
    one.worker.give_up(number)
    outcome = one.worker.wait(number, 20)
    assert outcome is not None
    assert outcome.failed == "given up on request"
    stream = one.host.submit(Request(2, PROMPTS[2], 8, 0.0))
    assert list(stream) == one.small.reference_text(PROMPTS[2], 8)


def test_staging_keeps_its_rate(serving, rng):
    size = sum(part.nbytes for part in Small.make().read(0, 0)[:2])
    rate = 40 * size
    one = serving(bandwidth=float(rate))
    outcome = one.move(random_resident(rng))
    assert outcome.staged / outcome.stage_s <= 1.1 * rate
    assert outcome.bytes / outcome.stage_s >= 0.5 * rate


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_staging_gives_way_to_serving(serving, rng):
    small, nice = Small.make(), {}

    def read(layer, expert, arena=None):
        nice[threading.get_ident()] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        return small.read(layer, expert)

    one = serving(read=read)
    nice.clear()
    assert one.move(random_resident(rng)).failed == ""
    assert nice
    assert all(own > os.getpriority(os.PRIO_PROCESS, os.getpid()) for own in nice.values())


def test_an_order_travels(rng):
    present, target = placement_of(random_resident(rng)), placement_of(random_resident(rng))
    likely = rng.random((3, 3, 3)) < 0.5
    order = MigrationCommand.decode(MigrationCommand(7, target, likely, 3, "because").encode(), present)
    assert (order.number, order.epoch, order.reason) == (7, 3, "because")
    assert (order.placement.resident == target.resident).all()
    assert (order.likely == likely).all()


def seen(counts, steps=(50, 400), fed=(200, 800)):
    """What a server has told it counted."""
    buffer = io.BytesIO()
    np.savez(buffer, counts=counts, steps=np.array(steps), fed=np.array(fed))
    return buffer.getvalue()


def used(layers, experts, favourites, times):
    """Assignments where each server's users want other experts than the others'."""
    counts = np.ones((3, layers, experts), np.int64)
    for server, favourite in enumerate(favourites):
        counts[server, :, favourite] += 1000
    return counts * times


def decided(one, counts, began=True):
    """One interval of the controller in which so much more has been counted, whatever steps there were."""
    channel = one.controller.observations.channel = OwnChannel()
    one.total = getattr(one, "total", 0) + counts
    one.steps = getattr(one, "steps", 0) + 1
    one.began = getattr(one, "began", 0) + began
    channel.put("counted/0", seen(one.total, (50 * one.began, 400 * one.steps), (200 * one.began, 800 * one.steps)))
    time.sleep(0.05)
    one.controller.observations.observe()
    return one.controller.decide(Decision(time.time(), "interval"))


A, B = (slice(0, 3), slice(3, 6), slice(5, 8)), (slice(5, 8), slice(0, 3), slice(3, 6))


def test_a_steady_workload_migrates_once_and_is_recorded(serving, tmp_path):
    one = serving()
    verdicts = [decided(one, used(3, 8, A, 5)).verdict for _ in range(6)]
    assert verdicts.count("adopted") == 1
    assert verdicts.index("adopted") == 1  # the first interval alone convinces nobody
    record = read_record(tmp_path)
    assert record is not None
    assert record.epoch == 1
    assert (record.placement.resident == one.worker.placement.resident).all()
    lines = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert [line["verdict"] for line in lines] == verdicts
    adopted = lines[1]
    assert adopted["saving_s"] > adopted["cost_s"] > 0
    assert adopted["planned_step_s"] < adopted["step_s"]
    verdicts = [decided(one, used(3, 8, B, 5)).verdict for _ in range(6)]
    assert verdicts.count("adopted") == 1  # a lasting shift moves experts again


def test_a_workload_that_alternates_moves_nothing_once_the_plan_is_for_both(serving):
    one = serving()
    verdicts = [decided(one, used(3, 8, (A, B)[i % 2], 5)).verdict for i in range(10)]
    assert verdicts[:2] == ["kept", "kept"]  # a plan for the one does not pay with the other
    assert verdicts.count("adopted") <= 1
    assert set(verdicts[3:]) == {"kept"}


def test_an_interval_in_which_nobody_was_served_says_nothing(serving):
    one = serving()
    one.controller.policy = dataclasses.replace(one.policy, confirm=3)
    counts = used(3, 8, A, 5)
    verdicts = [decided(one, given).verdict for given in (counts, counts, 0 * counts, counts)]
    assert verdicts == ["kept", "kept", "kept", "adopted"]  # of the first, proven in the second and the fourth


def test_a_plan_is_proven_by_other_requests(serving):
    one = serving()
    counts = used(3, 8, A, 5)
    verdicts = [decided(one, counts, began=began).verdict for began in (True, False, False, True)]
    assert verdicts == ["kept", "kept", "kept", "adopted"]


def test_plans_are_made_in_another_process(serving):
    one = serving()
    counts = used(3, 8, A, 5)
    assert decided(one, counts).why.startswith("has yet to pay")
    first = one.controller._planning._process
    assert os.getpriority(os.PRIO_PROCESS, first.pid) > os.getpriority(os.PRIO_PROCESS, os.getpid())
    first.kill()
    with pytest.raises(InputError, match="process that plans has gone"):
        decided(one, counts)
    assert decided(one, counts).verdict == "adopted"  # in the next one; the plan itself was not lost
    second = one.controller._planning._process
    assert second is not first
    one.controller.end()
    assert second.returncode is not None
    with pytest.raises(InputError, match="serving ends"):
        decided(one, counts)


def test_plans_are_made_from_the_tokens_that_were_served(serving):
    one = serving()
    for server, prompt in enumerate(PROMPTS[:3]):
        list(one.host.submit(Request(server, prompt, COUNT, 0.0)))
    time.sleep(0.1)
    list(one.host.submit(Request(0, PROMPTS[0], 2, 0.0)))  # reports come with steps
    time.sleep(0.3)
    one.controller.observations.observe()
    profile = one.controller.observations.profile(one.engine.counts())
    assert profile.ids is not None
    assert profile.server is not None
    for server in range(3):
        own = profile.ids[profile.server == server]
        found = [np.bincount(own[:, layer].ravel(), minlength=8) for layer in range(3)]
        assert np.sum(found) >= 0.9 * one.engine.counts()[server].sum()
        assert (np.array(found) <= one.engine.counts()[server]).all()
    assert one.controller.observations.profile(one.engine.counts(), since=time.time()).ids is None


def test_a_record_that_cannot_be_written_ends_migrations_not_serving(serving, rng, tmp_path, monkeypatch):
    one = serving()

    def full(*_):
        raise InputError("placement-in-force.json: cannot be written: No space left on device")

    monkeypatch.setattr("launch.migration.journal.write_record", full)
    verdicts = [decided(one, used(3, 8, A, 5)) for _ in range(3)]
    assert verdicts[1].verdict == "adopted"
    verdicts = [decided(one, used(3, 8, B, 5)) for _ in range(4)]
    assert {v.verdict for v in verdicts} == {"kept"}
    assert "No space left" in verdicts[-1].why
    stream = one.host.submit(Request(2, PROMPTS[2], 8, 0.0))
    assert list(stream) == one.small.reference_text(PROMPTS[2], 8)


def test_migrations_go_on_once_the_record_can_be_written_again(serving, tmp_path, monkeypatch, rng):
    one, full = serving(), [True]

    def write(*given):
        if full:
            raise InputError("placement-in-force.json: cannot be written: No space left on device")
        return write_record(*given)

    monkeypatch.setattr("launch.migration.journal.write_record", write)
    answer = Requests(one.controller).answer

    def move():
        target = placement_of(random_resident(rng))
        return answer({"what": "to", "placement": target.to_dict(), "source": "x.json"})

    assert move()["verdict"] == "adopted"
    assert "No space left" in move()["why"]
    assert "No space left" in answer({"what": "status"})["disabled"]
    full.clear()
    again = move()
    assert (again["verdict"], again["epoch"]) == ("adopted", 2)
    assert answer({"what": "status"})["disabled"] == ""
    record = read_record(tmp_path)
    assert record is not None
    assert (record.epoch, record.hash) == (2, answer({"what": "status"})["hash"])


def test_a_migration_that_failed_is_not_success(monkeypatch, tmp_path, capsys):
    for verdict, status in (("failed", 1), ("adopted", 0), ("kept", 0)):
        reply = dataclasses.asdict(Decision(0.0, "migrate to", verdict, "edge-a: not readable"))
        monkeypatch.setattr("launch.commands.migrate.ask", lambda *_, reply=reply: reply)
        assert main(["migrate", "--state", str(tmp_path), "--plan"]) == status
        assert verdict in capsys.readouterr().out


def test_what_migrate_says_fits_80_columns(monkeypatch, tmp_path, capsys):
    outcome = {"seconds": 1.25, "longest_stall_s": 0.004}
    why = "has yet to pay in an interval that it was not planned from"
    figures = {"step_s": 0.1279, "planned_step_s": 0.0253, "saving_s": 139.27, "cost_s": 0.02, "copies": 376}
    decision = dataclasses.asdict(Decision(0.0, "revise", "kept", why, outcome=outcome, **figures))
    status = {"epoch": 3, "strategy": "latency", "hash": "0" * 64, "record": "/some/where/placement-in-force.json"}
    status |= {"moving": False, "limits": {}, "disabled": "No space left on device: " + "x " * 60, "last": decision}
    waiting = {"waiting": ["edge-d"], "address": "10.0.0.1:8500"}
    for reply, given in ((decision, "--plan"), (status, "--status"), (waiting, "--add=larger.toml")):
        monkeypatch.setattr("launch.commands.migrate.ask", lambda *_, reply=reply: reply)
        monkeypatch.setattr("launch.commands.migrate.request", lambda _: {})
        assert main(["migrate", "--state", str(tmp_path), given]) == 0
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 80
        if given.startswith("--add"):
            assert "--state DIR --join 10.0.0.1:8500" in shown


def test_control_drains_a_server_and_takes_it_back(serving, rng, tmp_path):
    one = serving()
    server = ControlServer(tmp_path, SECRET, Requests(one.controller).answer)
    try:
        status = ask(tmp_path, {"what": "status"}, SECRET)
        assert (status["epoch"], status["moving"]) == (0, None)
        dry = ask(tmp_path, {"what": "memory", "memory": {"a": 0}, "dry": True}, SECRET)
        assert dry["verdict"] == "adopted"
        assert one.worker.epoch == 0
        assert one.controller.limits == {}
        done = ask(tmp_path, {"what": "memory", "memory": {"a": 0}}, SECRET)
        assert done["verdict"] == "adopted"
        assert not one.worker.placement.resident[0].any()
        record = read_record(tmp_path)
        assert record is not None
        assert record.limits == {"a/0": 0}
        target = random_resident(rng)
        for wrong, message in (
            (placement_of(target), "over its memory"),
            (placement_of(np.ones_like(target[:, :, :4])), "model.experts = 4"),
            (placement_of(np.zeros_like(target)), "is on no device"),
        ):
            with pytest.raises(InputError, match=message):
                ask(tmp_path, {"what": "to", "placement": wrong.to_dict(), "source": "x.json"}, SECRET)
        ask(tmp_path, {"what": "memory", "memory": {"a": None}}, SECRET)
        done = ask(tmp_path, {"what": "to", "placement": placement_of(target).to_dict(), "source": "x.json"}, SECRET)
        assert done["verdict"] == "adopted"
        assert (one.worker.placement.resident == target).all()
        with pytest.raises(InputError, match="no migration is under way"):
            ask(tmp_path, {"what": "abort"}, SECRET)
        with pytest.raises(InputError, match="no such server"):
            ask(tmp_path, {"what": "memory", "memory": {"z": 0}}, SECRET)
        stream = one.host.submit(Request(2, PROMPTS[2], 8, 0.0))
        assert list(stream) == one.small.reference_text(PROMPTS[2], 8)
    finally:
        server.close()


def test_no_cluster_serves_with_a_folder(tmp_path, capsys):
    assert main(["migrate", "--state", str(tmp_path)]) == 2
    assert "no cluster serves with it" in capsys.readouterr().err


def test_a_record_that_was_changed_is_refused(rng, tmp_path):
    write_record(tmp_path, placement_of(random_resident(rng)), 3, "test", {})
    assert read_record(tmp_path) is not None
    parsed = json.loads((tmp_path / NAME).read_text())
    parsed["placement"]["devices"][0]["experts"][0] = []
    (tmp_path / NAME).write_text(json.dumps(parsed))
    with pytest.raises(InputError, match="hash"):
        read_record(tmp_path)
    (tmp_path / NAME).write_text("{")
    with pytest.raises(InputError, match="move it away"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("epoch", value) for value in ("-1", "1e999", "1.5", "null", "true", "1" * 30)),
        *(("time", value) for value in ("NaN", "null", '"x"', "[]")),
        *(("limits", value) for value in ("[]", "null", '{"a/0": null}', '{"a/0": -1}', '{"a/0": 1e3}', '{"z/9": 5}')),
        ("reason", "7"),
    ],
)
def test_a_record_s_other_fields_are_checked_too(rng, tmp_path, field, value):
    write_record(tmp_path, placement_of(random_resident(rng)), 3, "test", {"a/0": 5000})
    record = read_record(tmp_path)
    assert record is not None
    assert (record.epoch, record.limits) == (3, {"a/0": 5000})
    parsed = json.loads((tmp_path / NAME).read_text())
    text = json.dumps(parsed | {field: "HERE"}).replace('"HERE"', value)
    (tmp_path / NAME).write_text(text)
    with pytest.raises(InputError, match="move it away") as refused:
        read_record(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("sizes", [(7, 10, 8, 16), (3, 5, 8, 16), (6, 6, 6, 6), (30, 30, 30, 30)])
def test_a_placement_is_carried_over_to_other_memory_and_servers(rng, sizes):
    before = placement_of(random_resident(rng))
    servers = [("b", sizes[:1]), ("new", sizes[1:2]), ("c", sizes[2:])]
    cluster = Cluster.from_dict(
        {
            "server": [{"name": n, "devices": [{"memory": size * EXPERT} for size in own]} for n, own in servers],
        }
    )
    after = adapt(before, cluster)
    after.validate(cluster)
    assert after.resident.any(0).all()
    if min(sizes) == 30:
        assert (after.resident[0] >= before.resident[1]).all()
