"""What `--route` brings on three servers at 500 Mbit/s whose users are at the wrong ones: fewer calls over the links."""

import dataclasses
import json
import re
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import placement
from launch.bench.harness.namespaces import Testbed, missing
from placement.__main__ import main as placement_command
from tests.helpers.machines import NAMES, Machines

DOMAINS = ("code", "prose", "arithmetic")
ELSEWHERE = ("arithmetic", "code", "prose")
TOKEN = "token-of-the-operator"
TOKENS = 48  # of a prompt, and of an answer
RATE = 1.2  # requests a second at each server
SEEN_S, KNOWN_S, SECONDS = 20, 8, 25


@contextmanager
def serving(folder: Path, bed: Testbed, *flags: str) -> Iterator[Machines]:
    folder.mkdir()
    token = folder / "operator"
    token.write_text(TOKEN)
    token.chmod(0o600)
    common = ("--operator-token", str(token), "--kv-cache", "4MB")
    machines = Machines(folder, bed, *common, *flags, memory="24MB")
    try:
        yield machines
    finally:
        statuses = machines.stop()
    assert statuses == [0, 0, 0], machines.log


def load(machines: Machines, domains: Sequence[str], seconds: float, seed: int) -> list[dict[str, Any]]:
    """What `bench requests` says at each server, of users of one domain there."""
    shape = ["--prompt", str(TOKENS), "--output", str(TOKENS), "--rate", str(RATE), "--duration", str(seconds)]
    clients = []
    for name, domain in zip(NAMES, domains, strict=True):
        who = ["--domain", domain, "--user", domain, "--seed", str(seed), "--json"]
        clients.append(machines.client(name, "-m", "launch", "bench", "requests", machines.url(name), *who, *shape))
    found = [json.loads(client.communicate()[0]) for client in clients]
    assert all(one["answered"] == one["requests"] for one in found), machines.log
    return found


def wait_until_ready(machines: Machines) -> None:
    deadline = time.monotonic() + 300
    for name in NAMES:
        while True:
            try:
                machines.ask(name, "/ready", TOKEN)
                break
            except subprocess.CalledProcessError:
                assert time.monotonic() < deadline, machines.log
                time.sleep(0.5)


def totals(machines: Machines) -> Counter[str]:
    """Calls of experts, those that stayed on their server, bytes between servers, and requests that were handed over."""
    time.sleep(1.5)  # until the workers have told what they did
    found: Counter[str] = Counter()
    for name in NAMES:
        for line in machines.ask(name, "/metrics", TOKEN).decode().splitlines():
            metric, _, value = line.rpartition(" ")
            kind = metric.partition("{")[0].removeprefix("dancemoe_")
            if kind in ("expert_calls_total", "pair_bytes_total", "routed_total"):
                found[kind] += round(float(value))
            if kind == "expert_calls_total" and set(re.findall(r"edge-\w", metric)) == {name}:
                found["local"] += round(float(value))
    return found


def planned(folder: Path, bed: Testbed) -> Path:
    """A file of the plan for what the users of each server call, each at the server of their own domain."""
    with serving(folder / "seen", bed) as machines:
        wait_until_ready(machines)
        for name in NAMES:
            machines.ask(name, "/profile", TOKEN, {"action": "start"})
        load(machines, DOMAINS, SEEN_S, 1)
        time.sleep(1.5)
        files = [machines.folder / f"{name}.npz" for name in NAMES]
        for name, file in zip(NAMES, files, strict=True):
            file.write_bytes(machines.ask(name, "/profile", TOKEN))
    seen = [placement.Profile.load(file) for file in files]
    whole, plan = folder / "profile.npz", folder / "plan.json"
    dataclasses.replace(seen[0], counts=sum(one.counts for one in seen)).save(whole)
    given = ["--profile", str(whole), "--cluster", str(machines.cluster), "--strategy", "dance", "--out", str(plan)]
    assert placement_command(["plan", *given]) == 0
    return plan


def served(folder: Path, bed: Testbed, *flags: str) -> tuple[Counter[str], list[dict[str, Any]]]:
    """What was done for users that are all at another server than their experts, and what they say of it."""
    with serving(folder, bed, *flags) as machines:
        wait_until_ready(machines)
        load(machines, ELSEWHERE, KNOWN_S, 2)  # so that it is known what each user calls
        before = totals(machines)
        said = load(machines, ELSEWHERE, SECONDS, 3)
        return totals(machines) - before, said


@pytest.mark.slow
def test_users_at_the_wrong_servers_are_handed_to_the_right_ones(tmp_path, capsys):
    assert missing() is None
    with Testbed(NAMES, 500e6) as bed:
        given = ("--placement", str(planned(tmp_path, bed)))
        without, without_said = served(tmp_path / "without", bed, *given)
        routed, routed_said = served(tmp_path / "routed", bed, *given, "--route")
    for way, found, said in (("without", without, without_said), ("--route", routed, routed_said)):
        requests = sum(one["requests"] for one in said)
        each, whole = (statistics.mean(one[kind]["p50"] for one in said) for kind in ("each_s", "whole_s"))
        with capsys.disabled():
            print(
                f"{way}: {found['routed_total']} of {requests} handed over, {found['local'] / found['expert_calls_total']:.0%}"
                f" of the calls local, {found['pair_bytes_total'] / requests / 1e3:.0f} kB a request between servers,"
                f" {1e3 * each:.1f} ms a token, {whole:.2f} s an answer"
            )
    assert (without["routed_total"], routed["routed_total"]) == (0, sum(one["requests"] for one in routed_said))
    assert routed["local"] > 1.3 * without["local"]
    assert routed["pair_bytes_total"] < 0.8 * without["pair_bytes_total"]
