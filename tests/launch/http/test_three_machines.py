"""Three servers in network namespaces, joined at 500 Mbit/s, with clients at each: as `generate`, whichever of them ends."""

import json
import os
import signal
import statistics
import subprocess
import time

import pytest

from launch.bench.harness.namespaces import Testbed, missing
from tests.helpers.machines import NAMES, Machines

STUCK_S = 12
LENGTH = 118
KINDS = ({"temperature": 0}, {"temperature": 0.9, "top_p": 0.9, "seed": 7})


def answers(client: subprocess.Popen) -> list[list]:
    with client:
        lines = client.stdout.read().splitlines()
    assert client.returncode == 0
    return json.loads(lines[-1])


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    assert missing() is None
    with Testbed(NAMES, 500e6) as bed:
        opened = Machines(tmp_path_factory.mktemp("machines"), bed, "--stuck", str(STUCK_S), "--hold", "500")
        try:
            yield opened
        finally:
            statuses = opened.stop()
        assert statuses == [0, 0, 0], opened.log


def requests_at(server: int) -> list[dict]:
    return [
        {"model": "tiny-moe", "prompt": f"def f{server}(", "max_tokens": LENGTH, **KINDS[i % len(KINDS)]}
        for i in range(4)
    ]


def served(machines: Machines, disturb=None) -> tuple[list, list[float]]:
    """Texts and reasons of twelve streams, and their pauses, with something done in their midst."""
    clients = [machines.start_clients(name, requests_at(i)) for i, name in enumerate(NAMES)]
    if disturb is not None:
        assert [client.stdout.readline() for client in clients] == ["begun\n"] * 3
        time.sleep(0.2)
        disturb()
    found = [answer for client in clients for answer in answers(client)]
    return [answer[:2] for answer in found], [answer[2] for answer in found]


@pytest.mark.slow
def test_ten_kills_and_ten_freezes_of_three_machines(machines, generated, capsys):
    kinds = [{**kind, "max_tokens": LENGTH} for kind in KINDS]
    expected = [
        [found["text"], found["finish_reason"]]
        for i in range(3)
        for found in [generated(f"def f{i}(", **kind) for kind in kinds] * 2
    ]
    assert served(machines)[0] == expected, machines.log
    pauses: dict[str, list[float]] = {"killed": [], "frozen": []}
    for number in range(10):
        for how, sent in (("killed", signal.SIGKILL), ("frozen", signal.SIGSTOP)):
            name = NAMES[number % 3]
            worker = machines.worker(name)
            found, seconds = served(machines, lambda worker=worker, sent=sent: os.kill(worker, sent))
            assert found == expected, (number, how, name, machines.log)
            assert max(seconds) > 1  # it was ended while they ran
            assert machines.worker(name) != worker
            pauses[how] += seconds
            with capsys.disabled():
                print(f"{name} {how}: longest pauses {min(seconds):.1f} to {max(seconds):.1f} s", flush=True)
    with capsys.disabled():
        for how, seconds in pauses.items():
            words = f"median {statistics.median(seconds):.1f} s, worst {max(seconds):.1f} s"
            print(f"{how}: the longest pause of each of {len(seconds)} streams: {words}")
