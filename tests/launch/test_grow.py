"""A cluster that serves takes in a server: requests go on, in another program, with the tokens that they would have had."""

import argparse
import contextlib
import dataclasses
import json
import queue
import socket
import subprocess
import threading
import time

import numpy as np
import pytest

from dancemoe_jax.checkpoint.bundled import bundled_model
from dancemoe_jax.errors import ModelError
from dancemoe_jax.inference.sampling_params import SamplingParams
from launch import arguments
from launch.__main__ import main
from launch.cluster.framing import Connection, MessageError, connect
from launch.cluster.rendezvous import handshake
from launch.cluster.secret import load_secret
from launch.commands.serve import policy_of
from launch.elastic.grow import Growth, _wait_until_staged
from launch.elastic.newcomer import PURPOSE, described, report
from launch.engine.engine import Engine
from launch.engine.host import Host
from launch.engine.request import Request
from launch.migration.control import ask
from launch.migration.record import read_record
from launch.model_flags import read_shape
from launch.serve.process import facts_of
from placement import Cluster, InputError
from placement.files import read_toml
from tests.helpers.cluster_of_devices import CAPACITY, DEVICE_SERVER, PROMPTS, Small, random_resident
from tests.launch.test_serve import command

CLUSTER = """
[[server]]
name = "edge-a"
devices = [{ memory = "50MB" }]
[[server]]
name = "edge-b"
devices = [{ memory = "32MB" }, { memory = "34MB" }]
"""
NEW = '[[server]]\nname = "edge-c"\ndevices = [{ memory = "30MB" }]\n'
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, repetition_penalty=1.3, seed=7)


def engine_of(small, rng):
    _, weights = small.place(
        random_resident(rng) if len(small.device_server) == len(DEVICE_SERVER) else one_copy(small)
    )
    return Engine(small.config, small.layout, small.mesh, weights, small.device_server, 2, chunk=4)


def one_copy(small):
    """Expert e of every layer on device e modulo their number."""
    shape = (len(small.device_server), small.config.num_moe_layers, small.config.num_experts)
    return (np.arange(shape[2]) % shape[0] == np.arange(shape[0])[:, None])[:, None].repeat(shape[1], 1)


def test_requests_go_on_in_another_engine_with_the_tokens_they_have(rng):
    small = Small.make()
    larger = Small.make(capacity=(*CAPACITY, 12), device_server=(*DEVICE_SERVER, max(DEVICE_SERVER) + 1))
    alone = Host(engine_of(small, rng), 0)
    threading.Thread(target=alone.run, daemon=True).start()
    given = [(prompt, params) for prompt in PROMPTS[:4] for params in (SamplingParams(), SAMPLED)]
    expected = [list(alone.submit(Request(0, p, 20, 0.0, params=s))) for p, s in given]
    alone.finish()

    host, tokens = Host(engine_of(small, rng), 0), queue.SimpleQueue()
    requests = [Request(0, p, 20, 0.0, params=s, on_token=lambda t: bool(tokens.put(t))) for p, s in given]
    streams = [host.submit(request) for request in requests]
    loop = threading.Thread(target=lambda: tokens.put(host.run()))
    loop.start()
    for _ in range(25):
        tokens.get()
    host.engine.reform = True
    loop.join(60)
    assert not loop.is_alive()
    had = [len(request.output) for request in requests]
    assert max(had) > 0
    assert min(had) < 20  # some under way, some still waiting
    late = host.submit(Request(0, PROMPTS[0], 5, 0.0))  # while there is no program
    host.engine.release()
    host.move(engine_of(larger, rng))
    host.finish()
    assert host.run() is False
    assert [list(stream) for stream in streams] == expected
    assert [stream.reason for stream in streams] == ["length"] * len(streams)
    assert list(late) == expected[0][:5]


@pytest.fixture
def files(tmp_path):
    """Cluster files of two and of three servers, and requests that take a while."""
    two, three, requests = (tmp_path / name for name in ("two.toml", "three.toml", "requests.jsonl"))
    two.write_text(CLUSTER)
    three.write_text(CLUSTER + NEW)
    prompts = ["def main(", "The import statement"]
    lines = [{"id": f"{i % 2}/{i}", "prompt": prompts[i % 2], "max_tokens": 30} for i in range(80)]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return two, three, requests, prompts


@contextlib.contextmanager
def serving(two, requests, state):
    """The cluster of two servers, once it has answered a request: its process, answers, and lines on standard error."""
    flags = ["--requests", requests, "--state", state, "--interval", "0s"]
    process = subprocess.Popen(command(two, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    answers, errors, first = [], [], threading.Event()

    def read():
        with process.stdout as lines:  # pyright: ignore[reportOptionalContextManager]
            for line in lines:
                answers.append(json.loads(line))
                first.set()

    def read_errors():
        with process.stderr as lines:  # pyright: ignore[reportOptionalContextManager]
            errors.extend(lines)

    readers = [threading.Thread(target=target) for target in (read, read_errors)]
    for reader in readers:
        reader.start()
    try:
        assert first.wait(120)
        yield process, answers, errors
    finally:
        process.kill()
        for reader in readers:
            reader.join()
        process.wait()


def facts_by_flags(cluster_file, state):
    """What a server has to serve with to be taken in, as `serve` makes it out of its flags."""
    parser = argparse.ArgumentParser()
    arguments.serve(parser)
    args = parser.parse_args([*command(cluster_file)[4:], "--state", str(state), "--interval", "0s"])
    args.devices = 1
    path = bundled_model()
    return facts_of(args, path, read_shape(path, args), policy_of(args))


def check(answers, expected, prompts, capsys):
    """All of them are there, each what one process answers."""
    assert sorted(answer["id"] for answer in answers) == sorted(expected)
    for index, prompt in enumerate(prompts):
        assert main(["generate", "--json", "--context", "96", f"--prompt={prompt}", "--max-tokens=30"]) == 0
        alone = json.loads(capsys.readouterr().out)
        own = [answer for answer in answers if answer["id"].startswith(f"{index}/")]
        assert own
        assert all((a["tokens"], a["finish_reason"]) == (alone["tokens"], alone["finish_reason"]) for a in own)


@pytest.mark.slow
def test_a_server_is_added_while_requests_run(files, tmp_path, capsys):
    two, three, requests, prompts = files
    state, named = tmp_path / "state", tmp_path / "named.jsonl"
    named.write_text(
        "".join(
            json.dumps({"id": f"{i}/c", "server": "edge-c", "prompt": p, "max_tokens": 30}) + "\n"
            for i, p in enumerate(prompts)
        )
    )
    with serving(two, requests, state) as (process, answers, errors):
        question = {"what": "add", "cluster": read_toml(three), "source": "three.toml"}
        dry = ask(state, {**question, "dry": True}, load_secret())
        assert (dry["verdict"], dry["epoch"]) == ("adopted", 0)
        assert dry["copies"] > 0
        waiting = ask(state, question, load_secret())
        assert waiting["waiting"] == ["edge-c"]
        with pytest.raises(InputError, match="are being added already"):
            ask(state, question, load_secret())
        flags = ["--server", "edge-c", "--state", tmp_path / "c", "--interval", "0s", "--join", waiting["address"]]
        other = subprocess.run(
            [*command(three, "--requests", named, *flags), "--sequences", "3"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert other.returncode == 2
        assert "server edge-c has another flags than edge-a" in other.stderr
        joined = subprocess.run(
            command(three, "--requests", named, *flags), capture_output=True, text=True, timeout=240
        )
        assert joined.returncode == 0, joined.stderr
        assert process.wait(120) == 0, errors
    record = read_record(state)
    assert record is not None
    assert (record.epoch, record.reason) == (1, "edge-c added")
    assert ("edge-c", 0) in record.placement.devices
    assert record.placement.resident[-1].any()
    assert not any("Traceback" in line for line in errors)
    answers += [json.loads(line) for line in joined.stdout.splitlines() if line.startswith("{")]
    given = [json.loads(line)["id"] for line in requests.read_text().splitlines()]
    check(answers, [*given, "0/c", "1/c"], prompts, capsys)


def until_idle(state):
    """Wait until no server is being added."""
    while ask(state, {"what": "status"}, load_secret())["growth"]:
        time.sleep(0.1)


def lacking(layer, expert):
    raise ModelError(f"layer {layer} expert {expert}: absent")


@pytest.mark.slow
def test_a_server_that_cannot_read_or_does_not_come_leaves_all_as_it_was(files, tmp_path, capsys):
    two, three, requests, prompts = files
    state = tmp_path / "state"
    cluster = Cluster.from_toml(three)
    facts = facts_by_flags(two, state)
    lines = [{"id": f"{i % 2}/{i}", "prompt": prompts[i % 2], "max_tokens": 30} for i in range(300)]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with serving(two, requests, state) as (process, answers, errors):
        question = {"what": "add", "cluster": read_toml(three), "source": "three.toml"}
        address = ask(state, question, load_secret())["address"]
        assert ask(state, {"what": "abort"}, load_secret()) == {"aborted": "growth"}
        with pytest.raises(InputError, match="nobody takes in servers there"):
            report(address, cluster, "edge-c", facts, lambda *_: None, 0, 5.0, load_secret())
        address = ask(state, question, load_secret())["address"]
        host, _, port = address.rpartition(":")
        with connect((host, int(port)), load_secret(), PURPOSE, 5.0) as client:  # reports, and goes
            client.send({"server": "edge-c", "facts": described(cluster, facts)})
            assert "edge-c" in json.dumps(client.receive(None, 60.0, 2**26)["cluster"])

        def slowly(layer, expert):
            time.sleep(0.1)
            return weights

        # One that is given up while it stages.
        until_idle(state)
        weights, refused = Small.make().read(0, 0), []
        address = ask(state, question, load_secret())["address"]

        def come():
            try:
                report(address, cluster, "edge-c", facts, slowly, 0, 5.0, load_secret())
            except InputError as error:
                refused.append(str(error))

        client = threading.Thread(target=come)
        client.start()
        while "staging" not in ask(state, {"what": "status"}, load_secret())["growth"]:
            time.sleep(0.1)
        assert ask(state, {"what": "abort"}, load_secret()) == {"aborted": "growth"}
        assert ask(state, {"what": "status"}, load_secret())["growth"] == ""
        client.join(60)
        assert "takes in nobody any more" in refused[0]

        # One whose checkpoint lacks an expert, and one that reads and then never comes to the next program.
        until_idle(state)
        address = ask(state, question, load_secret())["address"]
        with pytest.raises(ModelError):
            report(address, cluster, "edge-c", facts, lacking, 0, 5.0, load_secret())
        until_idle(state)
        address = ask(state, question, load_secret())["address"]
        group, _ = report(address, cluster, "edge-c", facts, lambda *_: weights, 0, 5.0, load_secret())
        assert group.epoch == 1
        assert process.wait(240) == 0, errors
    assert any("edge-c has gone while it was staging" in line for line in errors)
    assert any("not added: server edge-c: layer 0 expert" in line for line in errors)
    assert any("all go on as before" in line for line in errors)
    record = read_record(state)
    assert record is not None
    assert (record.epoch, record.reason) == (0, "edge-c did not come")
    check(answers, [json.loads(line)["id"] for line in requests.read_text().splitlines()], prompts, capsys)


def test_cluster_files_that_change_what_serves_are_refused(tmp_path):
    two, three = tmp_path / "two.toml", tmp_path / "three.toml"
    two.write_text(CLUSTER)
    three.write_text(CLUSTER.replace("32MB", "33MB") + NEW)

    @dataclasses.dataclass
    class Present:
        """A controller as far as its cluster goes."""

        cluster: Cluster

        @property
        def loaded(self):
            return self

    growth = Growth(Present(Cluster.from_toml(two)), None, {}, "127.0.0.1:8476", b"", dict)  # pyright: ignore
    for file, message in ((three, "is not edge-b as it serves now"), (two, "no server that does not serve already")):
        with pytest.raises(InputError, match=message):
            growth.answer({"what": "add", "cluster": read_toml(file), "source": str(file)})


def test_a_client_that_is_no_server_is_sent_away():
    left, right = socket.socketpair()
    with left, right:
        left.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises(MessageError, match="not a line of JSON"):
            handshake(Connection(right))


def test_a_server_that_is_stopped_while_it_stages_blocks_nobody_for_long(monkeypatch):
    monkeypatch.setattr("launch.elastic.grow._SILENT_S", 0.3)
    left, right = socket.socketpair()
    with left, right:
        Connection(left).send({"bytes": 1})  # still there
        with pytest.raises(InputError, match=r"server edge-c has gone while it was staging .*no whole message within"):
            _wait_until_staged("edge-c", Connection(right))
        Connection(left).send({"problem": "layer 0 expert 1: absent"})
        with pytest.raises(InputError, match="server edge-c: layer 0 expert 1: absent"):
            _wait_until_staged("edge-c", Connection(right))
