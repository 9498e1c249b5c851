"""`python -m launch serve`: processes that serve together answer as one process does, stream, cancel, sleep and end."""

import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time

import jax
import pytest

from launch.__main__ import main
from launch.cluster.secret import load_secret
from launch.engine.engine import Engine
from launch.engine.host import Host
from launch.engine.request import Request
from launch.migration.control import ask
from launch.migration.record import read_record
from tests.helpers.cluster_of_devices import Small, random_resident
from tests.launch.test_across_servers import NAMES, run

CLUSTER = """
[[server]]
name = "edge-a"
devices = [{ memory = "30MB" }]
[[server]]
name = "edge-b"
devices = [{ memory = "32MB" }]
[[server]]
name = "edge-c"
devices = [{ memory = "30MB" }, { memory = "34MB" }]
"""
REQUESTS = [
    {"id": "a", "server": "edge-a", "prompt": "def main(", "max_tokens": 12},
    {"id": "b", "server": "edge-b", "prompt": "The import statement", "max_tokens": 9},
    {"id": "c", "server": "edge-c", "prompt": "12 + 30 = ", "max_tokens": 10, "temperature": 0.8, "seed": 3},
    {
        "id": "d",
        "server": "edge-c",
        "prompt": "import os",
        "max_tokens": 10,
        "temperature": 1.0,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "seed": 5,
    },
    {"id": "e", "prompt": "x", "max_tokens": -1},
    {"id": "f", "server": "edge-x", "prompt": "x"},
    {"id": "g", "server": "edge-b", "prompt": "for i in range(", "stop": ["\\n"]},
]


@pytest.fixture
def files(tmp_path):
    cluster, requests = tmp_path / "cluster.toml", tmp_path / "requests.jsonl"
    cluster.write_text(CLUSTER)
    requests.write_text("\n".join(map(json.dumps, REQUESTS)) + "\nnot json\n")
    return cluster, requests


def command(cluster, *arguments):
    shape = ["--context", "96", "--sequences", "2", "--max-step-tokens", "16"]
    return [sys.executable, "-m", "launch", "serve", "--cluster", str(cluster), *shape, *map(str, arguments)]


def test_three_processes_answer_what_one_does(files, capsys):
    cluster, requests = files
    assert len(jax.devices()) >= 4  # before `generate` below makes fewer do
    done = subprocess.run(command(cluster, "--requests", requests), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "planned for users who are all alike (latency" in done.stderr
    for name in NAMES:  # ready when it says so
        own = [line for line in done.stderr.splitlines() if line.startswith(f"[{name}] ")]
        steps = [
            next(i for i, line in enumerate(own) if words in line) for words in ("compiled after", "serving after")
        ]
        assert steps == sorted(steps)
    answers = {answer["id"]: answer for answer in map(json.loads, done.stdout.splitlines())}
    assert len(answers) == len(REQUESTS) + 1
    for given in REQUESTS:
        answer = answers[given["id"]]
        if given["id"] in "ef":
            assert "max_tokens = -1" in answer["error"] or "'edge-x' is unknown" in answer["error"]
            continue
        assert answer["server"] == given["server"]
        flags = [
            f"--{key.replace('_', '-')}={value}" for key, value in given.items() if key not in ("id", "server", "stop")
        ]
        flags += [f"--stop={text}" for text in given.get("stop", [])]
        assert main(["generate", "--json", "--context", "96", *flags]) == 0
        alone = json.loads(capsys.readouterr().out)
        assert (answer["text"], answer["tokens"]) == (alone["text"], alone["tokens"])
        assert answer["finish_reason"] == alone["finish_reason"]
    assert "not JSON" in answers[len(REQUESTS) + 1]["error"]


@contextlib.contextmanager
def busy(cluster, tokens, *flags):
    """A cluster with more requests than it will serve, of so many tokens each, once it has answered one: its process."""
    endless = cluster.with_name("endless.jsonl")
    endless.write_text("".join(json.dumps({"prompt": "def ", "max_tokens": tokens}) + "\n" for _ in range(3000)))
    process = subprocess.Popen(
        command(cluster, "--requests", endless, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        assert json.loads(first)["finish_reason"] in ("length", "stop")
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_signal_drains_all_servers(files):
    with busy(files[0], 12, "--drain", "300") as process:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    assert 0 < len(answers) < 1000
    assert {answer["finish_reason"] for answer in answers} <= {"length", "stop"}
    assert all(f"{name}: draining: " in err for name in NAMES)
    assert "Traceback" not in err
    assert "ended with" not in err


def test_a_second_signal_cancels(files):
    with busy(files[0], 80, "--drain", "300") as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "cancelled" in {json.loads(line)["finish_reason"] for line in out.splitlines()}
    assert "cancelled by a second signal" in err
    assert "Traceback" not in err


@pytest.fixture
def host(rng):
    small = Small.make()
    _, weights = small.place(random_resident(rng))
    engine = Engine(small.config, small.layout, small.mesh, weights, small.device_server, 2, chunk=4)
    host = Host(engine, 1)
    loop = threading.Thread(target=host.run, daemon=True)
    loop.start()
    yield host, small
    host.finish()
    loop.join(60)
    assert not loop.is_alive()


def test_tokens_stream_and_a_cancelled_request_leaves_its_place(host):
    host, small = host
    streams = [host.submit(Request(1, [3, 1, 4], 30, 0.0)) for _ in range(3)]
    first = []
    for token in streams[0]:
        first.append(token)
        if len(first) == 3:
            streams[0].cancel()
    assert 3 <= len(first) < 30
    assert streams[0].reason == "cancelled"
    expected = small.reference_text([3, 1, 4], 30)
    assert first == expected[: len(first)]
    assert [list(stream) for stream in streams[1:]] == [expected, expected]
    assert [stream.reason for stream in streams[1:]] == ["length", "length"]
    assert host.engine.in_flight == []


def test_a_request_after_the_end_is_cancelled_and_waits_for_nothing(host):
    host, _ = host
    host.stop()
    list(host.submit(Request(1, [5], 50, 0.0)))
    late = host.submit(Request(1, [5], 50, 0.0))
    reader = threading.Thread(target=list, args=(late,), daemon=True)
    reader.start()
    reader.join(10)
    assert not reader.is_alive()
    assert late.reason == "cancelled"


def test_a_sleeping_engine_takes_no_steps_and_wakes_for_a_request(host):
    host, _ = host
    list(host.submit(Request(1, [5], 2, 0.0)))
    time.sleep(0.3)
    before = host.engine._counters.steps
    time.sleep(0.5)
    assert host.engine._counters.steps == before
    seconds = []
    for _ in range(5):
        begin = time.monotonic()
        list(host.submit(Request(1, [5], 1, 0.0)))
        seconds.append(time.monotonic() - begin)
        time.sleep(0.05)
    assert statistics.median(seconds) < 0.15  # a step and the waking, not the time between two looks


def test_a_ring_wakes_all_servers_within_10_ms():
    lines = run("sleeping_server.py", 20, timeout=120)
    waking = [float(line.split()[1]) for line in lines["edge-c"] if line.startswith("waking")]
    for name in NAMES:
        woke = [float(line.split()[1]) for line in lines[name] if line.startswith("woke")]
        assert statistics.median(w - r for w, r in zip(woke, waking, strict=True)) < 0.010


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--server", "edge-x"], "server edge-x: not in"),
        (["--requests", "absent.jsonl"], "--requests absent.jsonl: cannot be read"),
        (["--sequences", "0"], "--sequences 0: must be greater than 0"),
        (["--half-life", "0s"], "--half-life 0s: must be greater than 0s"),
        (["--join", "10.0.0.1:99"], "--join: give --server, and --state"),
        (
            ["--join", "127.0.0.1:9", "--server", "edge-c", "--state", "d"],
            "--join 127.0.0.1:9: nobody takes in servers",
        ),
        (["--server", "edge-b", "--timeout", "1"], "edge-a"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(files, arguments, message):
    cluster, _ = files
    done = subprocess.run(
        [*command(cluster), *arguments], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_for_the_record_stops_migrations_not_serving(tmp_path, rng, capsys):
    cluster, requests, state = tmp_path / "cluster.toml", tmp_path / "requests.jsonl", tmp_path / "state"
    cluster.write_text('server = [{ name = "a", devices = [{ memory = "50MB" }, { memory = "64MB" }] }]')
    given = {"prompt": "The import statement", "max_tokens": 40}
    requests.write_text((json.dumps(given) + "\n") * 150)
    state.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "small", state], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    flags = ["--requests", requests, "--state", state, "--interval", "0s", "--server", "a"]
    said = tmp_path / "stderr"
    with open(said, "w") as log:
        process = subprocess.Popen(command(cluster, *flags), stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    try:
        answers = [json.loads(process.stdout.readline())]
        before = read_record(state)
        assert before is not None
        with contextlib.suppress(OSError), open(state / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        replies = []
        for _ in range(2):
            resident = rng.random(before.placement.resident.shape) < 0.3
            resident[rng.integers(2), ~resident.any(0)] = True
            target = dataclasses.replace(before.placement, resident=resident)
            replies.append(ask(state, {"what": "to", "placement": target.to_dict(), "source": "x.json"}, load_secret()))
        assert [reply["verdict"] for reply in replies] == ["adopted", "kept"]
        assert "No space left on device" in replies[1]["why"]
        assert "No space left on device" in ask(state, {"what": "status"}, load_secret())["disabled"]
        answers += [json.loads(line) for line in process.stdout]
        assert process.wait(200) == 0
        assert "no more migrations" in said.read_text()
        assert "Traceback" not in said.read_text()
        after = read_record(state)
        assert after is not None
        assert (after.epoch, after.hash) == (0, before.hash)  # whole, as it was
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        subprocess.run(["umount", state], check=True)
    assert len(answers) == 150
    flags = [f"--prompt={given['prompt']}", f"--max-tokens={given['max_tokens']}"]
    assert main(["generate", "--json", "--context", "96", *flags]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert all(answer["tokens"] == tokens for answer in answers)


def test_experts_migrate_over_three_processes_and_a_restart_resumes(files, rng, capsys):
    cluster, _ = files
    state, requests = cluster.with_name("state"), cluster.with_name("same.jsonl")
    given = [r for r in REQUESTS if r["id"] in "abc" and "temperature" not in r]
    lines = [{**r, "id": f"{r['id']}{i}"} for i in range(400) for r in given]
    requests.write_text("\n".join(map(json.dumps, lines)) + "\n")
    flags = ["--requests", requests, "--state", state, "--interval", "0s", "--staging-memory", "1MB"]
    process = subprocess.Popen(command(cluster, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    answers = [json.loads(process.stdout.readline())]
    for epoch in (1, 2):
        record = read_record(state)
        assert record is not None
        resident = rng.random(record.placement.resident.shape) < 0.35
        resident[rng.integers(4), ~resident.any(0)] = True
        target = dataclasses.replace(record.placement, resident=resident)
        done = ask(state, {"what": "to", "placement": target.to_dict(), "source": "x.json"}, load_secret())
        assert (done["verdict"], done["epoch"]) == ("adopted", epoch)
        assert done["rounds"] > 1
    process.send_signal(signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    answers += [json.loads(line) for line in out.splitlines() if line.endswith("}")]
    for one in given:
        assert (
            main(
                [
                    "generate",
                    "--json",
                    "--context",
                    "96",
                    f"--prompt={one['prompt']}",
                    f"--max-tokens={one['max_tokens']}",
                ]
            )
            == 0
        )
        tokens = json.loads(capsys.readouterr().out)["tokens"]
        own = [a for a in answers if a["id"].startswith(one["id"]) and a["finish_reason"] != "cancelled"]
        assert own
        assert all(answer["tokens"] == tokens for answer in own)
    requests.write_text("\n".join(map(json.dumps, given)) + "\n")
    again = subprocess.run(command(cluster, *flags), capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert "epoch 2 resumed" in again.stderr
    assert len(again.stdout.splitlines()) == len(given)
