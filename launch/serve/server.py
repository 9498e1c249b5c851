"""One server of a model, in one JAX program after another: joins, loads, serves, and moves on where the cluster grows.

Who asks for answers is not known here, nor what a cluster grows for (`launch.elastic.grow`).
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dancemoe_jax.checkpoint.reader import ExpertFile
from dancemoe_jax.kernels.library import Kernels
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.model.experts import ExpertWeights
from launch.cluster.channel import ChannelLost
from launch.cluster.jax_runtime import is_of_exchange, leave_at_once, leave_program
from launch.cluster.join import join
from launch.elastic.newcomer import report
from launch.elastic.process_group import GroupChange, ProcessGroup
from launch.engine.host import Host
from launch.engine.loading import Loaded, load
from launch.engine.memory import sizes
from launch.migration.record import Record
from launch.migration.worker import MigrationWorker
from launch.serve.attach_migration import Start, migrating, resumed
from launch.serve.drain import Drain
from launch.serve.warm_up import warm_up
from placement import Cluster, InputError
from placement.migration.decide import Policy

log = logging.getLogger(__name__)

_LATER_S = 0.5  # than the server that has gone: whatever started all is to see that one end first
_SETTLE_S = 1.5  # for what was taken to be answered, once nothing is served any more
_LOSS_S = 3.0  # between a step that fails and the word that another server has ended
_REFORM_S = 30.0  # for the others to come to the next program: all have said that they are ready


@dataclass(eq=False)
class Server:
    """What one process serves, and how.

    Attributes:
        name: of this server; path: of the model, and config: its shape; options: dtype, int8 and sequences of `load`, chunk
            and kernels: its too.
        facts: what every server has to serve with too, fingerprints by what they are of; secret: of the cluster.
        policy: how experts migrate, None if they do not; state: on the first server, the folder of the record.
        begin: called once, with the host, before its loop starts; changed: with the cluster of every later program.
        drain: ends serving on request; settle: takes no more requests, and waits so many seconds until those that were
            taken are answered.
        phase: called with what it does on its way to serving; failed_step: with why a step has failed that no other
            server's end explains; patience: seconds for the first server's port to become free.
        watch: called with what each program serves, before its loop starts.
    """

    name: str
    path: Path
    config: ModelConfig
    options: Mapping[str, Any]
    chunk: int
    wide: bool | None
    kernels: Kernels
    facts: Mapping[str, str]
    secret: bytes
    timeout: float
    policy: Policy | None
    state: Path | None
    begin: Callable[[Host, Cluster], None]
    changed: Callable[[Cluster], None]
    drain: Drain
    settle: Callable[[float], None]
    phase: Callable[[str], None] = field(default_factory=lambda: _ignore, init=False)
    failed_step: Callable[[str], None] = field(default_factory=lambda: _ignore, init=False)
    watch: Callable[[Host, Loaded, MigrationWorker | None], None] | None = field(default=None, init=False)
    patience: float = field(default=0.0, init=False)
    host: Host | None = field(default=None, init=False)
    _gone: threading.Event = field(default_factory=threading.Event, init=False)  # whether another server has ended
    _since: float = field(default=0.0, init=False)  # when it began to load, or to serve nobody

    def serve(self, group: ProcessGroup, given: str, record: Record | None = None) -> None:
        """Serve until all agree to end.

        Args:
            given: fingerprint of the placement that was given, the same on all servers.
            record: what to come back to, on the first server; the placement of the world goes for where there is none.

        Raises:
            InputError, ModelError: the servers do not come together, or the model cannot be loaded.
        """
        self._go_on(self._program(group, record, {"placement": given}))

    def join_serving(self, address: str, cluster: Cluster) -> None:
        """Serve as a new server of a cluster that serves, which waits for it at the address.

        Raises:
            InputError, ModelError: it does not take in this server, or the model cannot be loaded.
        """
        assert self.policy is not None
        file = ExpertFile(self.path, jnp.dtype(self.options["dtype"]), self.options["int8"], self.facts["model"])
        group, read = report(
            address, cluster, self.name, self.facts, file.read, self.policy.staging_bytes, self.timeout, self.secret
        )
        self._go_on(self._program(group, read=read))

    def _go_on(self, group: ProcessGroup | None) -> None:
        while group is not None:
            leave_program()
            try:
                group = self._program(group)
            except _NotTogether as error:
                if group.back is None:
                    raise InputError(str(error)) from None
                log.warning("placement: %s; all go on as before", error)
                group = group.back

    def _program(
        self,
        group: ProcessGroup,
        record: Record | None = None,
        also: Mapping[str, str] | None = None,
        read: Callable[[int, int], ExpertWeights] | None = None,
    ) -> ProcessGroup | None:
        """Be one server of one program; the next one, if there is to be one.

        Args:
            also: facts of this program alone; read: reads experts where not straight from the checkpoint.
        """
        cluster, first = group.cluster, self.host is None and read is None
        with contextlib.ExitStack() as stack:
            self.phase("joining the other servers")
            devices = self._join(stack, group, also or {})
            self.phase("loading the model")
            self._since = self._since or time.monotonic()
            loaded, epoch = self._load(group, devices, record, read)
            self.phase("compiling")
            warm_up(loaded.engine, self.name)
            host = self._moved(loaded, cluster)
            stack.enter_context(self.drain.watching(host))
            change = GroupChange(host, cluster)
            stack.callback(change.end)
            worker = None
            if self.policy is not None:
                start = Start(epoch, group.reason, group.limits, self.facts, group.coordinator, self.secret)
                worker = stack.enter_context(migrating(host, loaded, self.policy, self.state, start))
            if self.watch is not None:
                self.watch(host, loaded, worker)
            log.info("%s: serving after %.1f s", self.name, time.monotonic() - self._since)
            if first or read is not None:
                self.begin(host, cluster)
            try:
                moves = host.run()
            except Exception as error:
                if is_of_exchange(error) or isinstance(error, ChannelLost):
                    self._failed(error, alone=len(cluster.names) == 1)
                else:
                    self.failed_step(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
                raise
            if not moves:
                return None
            self._since = time.monotonic()
            loaded.engine.release()
            return change.group

    def _load(
        self,
        group: ProcessGroup,
        devices: list[Any],
        record: Record | None,
        read: Callable[[int, int], ExpertWeights] | None,
    ) -> tuple[Loaded, int]:
        """This server's share of the model, and the number of its placement."""
        profile = sizes(self.path, self.config, group.cluster, **self.options)
        placed, epoch, fits = group.placement, group.epoch, False
        if self.host is None and read is None:
            placed, epoch, fits = resumed(record, placed, profile, group.cluster)
        planned = {"placed": placed, "profile": profile, "fits": fits, "kernels": self.kernels}
        loaded = load(
            self.path,
            self.config,
            group.cluster,
            devices,
            chunk=self.chunk,
            wide=self.wide,
            read=read,
            fingerprint=self.facts["model"],
            **planned,
            **self.options,
        )
        return loaded, epoch

    def _join(self, stack: contextlib.ExitStack, group: ProcessGroup, also: Mapping[str, str]) -> list[Any]:
        """All devices of a program, which the stack leaves. Raises _NotTogether where others serve on without it."""
        joined = join(
            group.cluster,
            self.name,
            coordinator=group.coordinator,
            agree={**self.facts, **also},
            timeout=self.timeout if self.host is None else _REFORM_S,
            secret=self.secret,
            lost=self._lost,
            absent=lambda names: self.phase(
                f"waiting for {', '.join(names)}" if names else "joining the other servers"
            ),
            patience=self.patience,
        )
        try:
            return stack.enter_context(joined)
        except InputError as error:
            if self.host is None:
                raise
            raise _NotTogether(str(error)) from None

    def _moved(self, loaded: Loaded, cluster: Cluster) -> Host:
        """The host of this process, with what has been loaded for this program."""
        if self.host is None:
            self.host = Host(loaded.engine, cluster.names.index(self.name))
        else:
            self.host.move(loaded.engine)
            self.changed(cluster)
        return self.host

    def _lost(self, name: str) -> None:
        """Another server has ended (the log says which): no step can be taken any more, so this one ends too, once all
        that was asked of it is answered."""
        self._gone.set()
        self.phase(f"ending: server {name} has ended or cannot be reached")
        if self.host is not None:
            self.host.close()
            self.settle(_SETTLE_S)
        time.sleep(_LATER_S)
        leave_at_once()

    def _failed(self, error: Exception, alone: bool) -> None:
        """End because a step has failed: mostly because another server has ended, which is then said elsewhere."""
        if alone:
            self.failed_step(" ".join(str(error).split())[:500])
        elif self._gone.wait(_LOSS_S):
            time.sleep(2 * _SETTLE_S)
        log.error(
            "server %s: a step has failed (%s); see what the other servers say, then start all again",
            self.name,
            " ".join(str(error).split())[:500],
        )
        self.settle(_SETTLE_S)
        leave_at_once()


class _NotTogether(Exception):
    """The servers of the next program have not come together."""


def _ignore(_: str) -> None:
    """Where nobody wants to know."""
