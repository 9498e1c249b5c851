"""A worker that is killed, frozen or fails under load: no accepted request is lost, changed or answered twice."""

import os
import signal
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.front_door import Door, front_door
from tests.helpers.paths import ROOT

MODEL = "tiny-moe"
KINDS = (
    {"temperature": 0},
    {"temperature": 0.9, "top_p": 0.9, "seed": 7},
    {"temperature": 1.0, "extra_body": {"repetition_penalty": 1.3, "top_k": 40}, "seed": 11},
)


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    with front_door(tmp_path_factory.mktemp("door"), "--stuck", "4", "--hold", "120") as opened:
        yield opened


def streamed(door: Door, number: int, begun: threading.Event | None = None) -> tuple[str, str | None, float]:
    """Text and reason of a long answer, and the longest time without more of it; begun: is set once there is some."""
    text, reason, pause, last = "", None, 0.0, time.monotonic()
    stream = door.client.completions.create(
        model=MODEL, prompt=f"def f{number}(", max_tokens=110, stream=True, **KINDS[number % len(KINDS)]
    )
    for chunk in stream:
        pause, last = max(pause, time.monotonic() - last), time.monotonic()
        if begun is not None:
            begun.set()
        text += chunk.choices[0].text
        reason = chunk.choices[0].finish_reason or reason
    return text, reason, pause


def whole(door: Door, number: int) -> str:
    kind = KINDS[number % len(KINDS)]
    return door.client.completions.create(model=MODEL, prompt=f"def f{number}(", max_tokens=110, **kind).choices[0].text


def disturbed(door: Door, disturb) -> list[float]:
    """Pauses of eight streams, and as many whole answers, with a worker that is disturbed under them: none may differ
    from an undisturbed one."""
    numbers = range(8)
    expected = [whole(door, number) for number in numbers]
    before = door.ready()["restarts"]
    with ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(streamed, door, number) for number in numbers]
        wholes = [pool.submit(whole, door, number) for number in numbers]
        time.sleep(0.15)
        disturb(door.worker())
        found = [stream.result(200) for stream in streams]
        assert [one.result(200) for one in wholes] == expected
    assert [text for text, _, _ in found] == expected
    assert {reason for _, reason, _ in found} <= {"length", "stop"}
    door.wait_until_ready()
    assert door.ready()["restarts"] == before + 1
    assert door.ready()["requests"] == 0
    return [pause for _, _, pause in found]


def test_a_killed_worker_makes_streams_pause_and_nothing_else(door):
    pauses = disturbed(door, lambda pid: os.kill(pid, signal.SIGKILL))
    assert max(pauses) > 0.5  # it was killed while they ran
    assert "requests wait for the next one" in door.log


def test_a_frozen_worker_is_replaced(door):
    seen = []

    def freeze(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        threading.Thread(target=lambda: [seen.append(door.ready()) or time.sleep(0.2) for _ in range(30)]).start()

    assert max(disturbed(door, freeze)) > 4
    assert "no step has ended for" in door.log
    assert {True, False} == {found["ready"] for found in seen}
    assert {reason["code"] for found in seen for reason in found["reasons"]} <= {"worker", "stuck"}


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A front door whose worker fails where a prompt asks for it."""
    paths = (str(ROOT / "tests/helpers/broken_worker"), str(ROOT))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    with front_door(tmp_path, "--hold", "120") as opened:
        yield opened


def test_a_step_that_fails_fails_its_requests_alone(broken):
    expected = whole(broken, 0)
    with ThreadPoolExecutor(4) as pool:
        begun = [threading.Event() for _ in range(3)]
        running, *waiting = (pool.submit(streamed, broken, n, own) for n, own in zip((1, 0, 0), begun, strict=True))
        assert all(own.wait(60) for own in begun)  # a step that reads several prompts fails all of them
        failed = broken.http.post("/v1/completions", json={"prompt": "FAIL", "max_tokens": 4})
        assert failed.status_code == 500
        assert "a step that fails" in failed.json()["error"]["message"]
        # Those that were in no such step go on in the next worker.
        assert [one.result(200)[0] for one in waiting] == [expected, expected]
        assert running.result(200)[1] in ("length", "stop")
    assert whole(broken, 0) == expected


def test_a_request_that_ends_every_worker_is_given_up(broken):
    expected = whole(broken, 0)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(whole, broken, 0)
        found = broken.http.post("/v1/completions", json={"prompt": "DIE", "max_tokens": 4}, timeout=300)
        assert found.status_code == 500
        assert "3 workers have ended" in found.json()["error"]["message"]
        assert other.result(200) == expected
    assert whole(broken, 0) == expected


@pytest.mark.slow
def test_ten_kills_and_ten_freezes(door, capsys):
    pauses: dict[str, list[float]] = {"killed": [], "frozen": []}
    for _ in range(10):
        pauses["killed"] += disturbed(door, lambda pid: os.kill(pid, signal.SIGKILL))
        pauses["frozen"] += disturbed(door, lambda pid: os.kill(pid, signal.SIGSTOP))
    with capsys.disabled():
        for how, found in pauses.items():
            words = f"median {statistics.median(found):.1f} s, worst {max(found):.1f} s"
            print(f"{how}: the longest pause of each of {len(found)} streams: {words}")
