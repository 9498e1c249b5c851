"""A host whose experts migrate: migration worker and telemetry on every server, controller and control on the first."""

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax

import placement
from launch.cluster.channel import open_channel
from launch.cluster.secret import load_secret
from launch.elastic.grow import Growth
from launch.engine.host import Host
from launch.engine.loading import Loaded
from launch.engine.token_sample import Sampler, sampled_shape
from launch.migration.control import ControlServer
from launch.migration.controller import Controller
from launch.migration.peers import OwnModel, reading
from launch.migration.record import NAME, Record, clear_leftovers
from launch.migration.requests import Requests
from launch.migration.telemetry import Reporter
from launch.migration.worker import MigrationWorker
from placement import Cluster, InputError, Placement, Profile
from placement.files import parse_json
from placement.migration.adapt import adapt, fitted
from placement.migration.decide import Policy

log = logging.getLogger(__name__)

_STRATEGY = "latency"  # of the first placement
_START_S = 600.0  # until the first server has said what is in force


def resumed(
    record: Record | None, placed: Placement | None, profile: Profile, cluster: Cluster
) -> tuple[Placement, int, bool]:
    """What the cluster starts with: the first server's record where it has one, the placement that was given, or a plan for
    users who are all alike. Every server calls it.

    Returns:
        The placement, its epoch, and whether it has been fitted to the profile here.
    """
    channel = open_channel()
    if jax.process_index() == 0:
        found, epoch = placed, 0
        if record is not None:
            found, epoch = _fit(record.placement, profile, cluster), record.epoch
            log.info("placement: epoch %d resumed, %s, recorded for: %s", epoch, record.hash[:12], record.reason)
        elif found is None:
            begin = time.monotonic()
            found = placement.plan(profile, cluster, _STRATEGY)
            log.info("placement: planned for users who are all alike (%s, %.1f s)", _STRATEGY, time.monotonic() - begin)
        message = {"epoch": epoch, "placement": found.to_dict()}
        channel.put("start", json.dumps(message).encode())
        return found, epoch, record is not None
    data = channel.get("start", _START_S)
    if data is None:
        raise InputError(
            f"server {cluster.names[0]} has not said what is where within {_START_S:g} s; see what it says"
        )
    message = parse_json(data, "start")
    return Placement.from_dict(message["placement"], NAME), message["epoch"], False


def _fit(placement: Placement, profile: Profile, cluster: Cluster) -> Placement:
    """A recorded placement, carried over to the cluster where that has changed since."""
    try:
        return fitted(placement, profile, cluster)
    except InputError as error:
        carried = adapt(placement, cluster)
        log.warning("placement: carried over to a cluster that has changed (%s)", error)
        return fitted(carried, profile, cluster)


@dataclasses.dataclass(frozen=True)
class Start:
    """What migrations start from.

    Attributes:
        epoch: of the placement in force; reason: why it is.
        limits: memory of devices in bytes, where less is to be used than the cluster file says.
        facts: what a server that is added has to serve with too, and coordinator: where this program has met; servers can
            be added only where they are given.
        secret: of the cluster; None takes that of `load_secret()`.
    """

    epoch: int = 0
    reason: str = "start"
    limits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, str] | None = None
    coordinator: str = ""
    secret: bytes | None = None


@contextmanager
def migrating(
    host: Host, loaded: Loaded, policy: Policy, state: Path | None, start: Start
) -> Iterator[MigrationWorker]:
    """Experts of this host migrate within the block.

    Args:
        state: on the first server, the folder of the record and of control; None elsewhere.
    """
    start = dataclasses.replace(start, secret=load_secret() if start.secret is None else start.secret)
    assert start.secret is not None
    with ExitStack() as stack:
        own = OwnModel(loaded.read, (start.facts or {}).get("model", ""), loaded.check)
        read = stack.enter_context(reading(loaded.cluster, host.server, host.channel, own, start.secret))
        loaded = dataclasses.replace(loaded, read=read)
        yield stack.enter_context(_migrating(host, loaded, policy, state, start))


@contextmanager
def _migrating(
    host: Host, loaded: Loaded, policy: Policy, state: Path | None, start: Start
) -> Iterator[MigrationWorker]:
    worker = MigrationWorker(
        loaded,
        host.channel,
        host.wake,
        staging_bytes=policy.staging_bytes,
        bandwidth=policy.bandwidth,
        epoch=start.epoch,
    )
    period = policy.interval / 4 if policy.interval else 1.0
    sampler = Sampler(sampled_shape(loaded.profile), policy.half_life, host.server)
    reporter = Reporter(loaded.engine, host.channel, min(1.0, period), sampler, period)

    def between() -> bool:
        reporter.between()
        return worker.between()

    with ExitStack() as stack:
        if state is not None:
            assert start.secret is not None
            controller = Controller(loaded, worker, host.channel, state, policy, start.limits)
            answer = Requests(controller).answer
            if start.facts is not None:
                growth = Growth(controller, host, start.facts, start.coordinator, start.secret, answer)
                stack.callback(growth.end)
                answer = growth.answer
            server = ControlServer(state, start.secret, answer)
            stack.callback(server.close)
            clear_leftovers(state)  # the folder is ours from here on
            stack.callback(controller.end)
            controller.start(start.reason)
        stack.callback(worker.end)
        stack.callback(reporter.end)
        host.between = between
        worker.start()
        yield worker
