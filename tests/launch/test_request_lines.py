"""Request lines: every line that is read gets exactly one answer, whatever is on it, within limits that cost nothing."""

import io
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from dancemoe_jax.checkpoint.bundled import bundled_model
from dancemoe_jax.checkpoint.families import read_config
from dancemoe_jax.inference.finite import not_finite
from dancemoe_jax.text.tokenizer import load_tokenizer_bundle
from launch.engine.host import Stream
from launch.serve.json_lines import Feeder
from launch.serve.lines import LONGEST, open_lines, read_lines
from launch.serve.requests import LONGEST_STOP, MOST_STOPS, RequestMaker
from placement import Cluster, InputError
from tests.helpers.paths import ROOT

CLUSTER = Cluster.from_dict({"server": [{"name": f"edge-{x}", "devices": [{"memory": 1}]} for x in "abc"]})
GOOD = {"prompt": "a", "max_tokens": 3}
DEEP, LARGE = b"[" * 100_000, 10**400


def line(**fields):
    return json.dumps({**GOOD, **fields}).encode()


# What is wrong with each, as its answer says it.
BROKEN = {
    DEEP: "JSON nested",
    b'{"a":' * 100_000: "JSON nested",
    b'{"prompt": "trailing comma",}': "not JSON",
    b"not json": "not JSON",
    b'{"prompt": "caf\xe9"}': "not UTF-8 (byte 16)",
    b"[1, 2]": "must be a JSON object",
    b"null": "must be a JSON object",
    b'"text"': "must be a JSON object",
    b"{}": "must have either a text prompt or a list messages",
    line(temperature=LARGE): "temperature: a number of 401 digits",
    line(top_p=LARGE): "top_p: a number of 401 digits",
    line(min_p=LARGE): "min_p: a number of 401 digits",
    line(repetition_penalty=LARGE): "repetition_penalty: a number of 401 digits",
    line(seed=LARGE): "seed",
    b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}": "not JSON",
    line(max_tokens=-1): "max_tokens = -1",
    line(temperature=float("nan")): "temperature",
    line(temperature=float("inf")): "temperature",
    line(temperature="0.7"): "temperature",
    line(stop=[""]): "stop",
    line(stop=[1]): "stop",
    line(stop={"a": 1}): "stop",
    line(stop=["x"] * 100_000): f"stop: at most {MOST_STOPS} texts",
    line(stop=["x" * 100_000]): f"of {LONGEST_STOP} characters",
    line(stop_tokens=list(range(100_000))): "stop_tokens: 100000 of them",
    line(stop_tokens=["x"]): "stop_tokens",
    line(prompt=["hi"]): "must have either",
    line(prompt={}): "must have either",
    line(messages=[{"role": "user", "content": "x"}]): "must have either",
    line(unknown=1): "'unknown' is unknown",
    line(id=[1]): "id: must be a text or an integer",
    line(id="x" * 5000): "id: must be a text or an integer of at most",
    line(server="edge-zz"): "server 'edge-zz' is unknown",
    line(server=["edge-a"]): "is unknown",
    line(server=7): "is unknown",
    line(prompt="x" * 4_000_000): "a prompt of 4000000 characters",
    b"{" + b" " * LONGEST + b"}": "longer than",
}


class InstantHost:
    """A host that answers every request with the tokens that it asks for, at once."""

    def __init__(self, server=0, delay=0.0):
        self.server, self.delay = server, delay
        self.finished, self.stopped = 0, 0

    def submit(self, request):
        stream = Stream(request)
        time.sleep(self.delay)
        for _ in range(request.max_tokens):
            request.output.append(97)
            if stream._take(97):
                break
        request.reason = "length"
        stream.close()
        return stream

    def finish(self):
        self.finished += 1

    def stop(self):
        self.stopped += 1


@pytest.fixture(scope="module")
def maker():
    config = read_config(bundled_model())
    return RequestMaker(load_tokenizer_bundle(bundled_model(), config), config)


def answers_to(maker, data, capsys, server=0, shared=False, **options):
    """The answers to lines, by one server."""
    host = InstantHost(server)
    feeder = Feeder(maker, io.BytesIO(data), shared, **options)
    feeder.start(host, CLUSTER)
    assert feeder.finished.wait(60)
    assert host.finished
    assert not feeder.problem
    return [json.loads(answer) for answer in capsys.readouterr().out.splitlines()]


def test_a_request_that_the_engine_ends_with_an_error_is_answered_with_it(maker, capsys, monkeypatch):
    served = InstantHost.submit

    def submit(host, request):
        stream = served(host, request)
        if len(request.prompt) == 3:
            request.reason, request.error = "error", not_finite(read_config(bundled_model()), 4)
        return stream

    monkeypatch.setattr(InstantHost, "submit", submit)
    lines = b'{"id": "bad", "prompt": "abc", "max_tokens": 2}\n{"id": "good", "prompt": "abcd", "max_tokens": 2}\n'
    bad, good = sorted(answers_to(maker, lines, capsys), key=lambda answer: answer["id"])
    assert bad.keys() == {"id", "error"}
    assert bad["error"].startswith("line 1: its numbers are NaN or infinity from layer 4 on")
    assert good["tokens"] == [97, 97]


def test_a_newline_alone_splits_lines_and_a_mark_before_the_first_is_none_of_it():
    text = '\ufeff{"prompt": "a\u2028b"}\r\n\n  \n{"prompt": "c\u0085d\fe"}\n{"prompt": "last"}'
    found = list(read_lines(io.BytesIO(text.encode())))
    assert [(line.number, line.given and line.given["prompt"]) for line in found[::2]] == [(1, "a\u2028b"), (5, "last")]
    assert found[1].problem.startswith("not JSON")  # a form feed has to be escaped in JSON
    found = list(read_lines(io.BytesIO('{"prompt": "next\u0085line"}\n'.encode())))
    assert [line.given["prompt"] for line in found] == ["next\u0085line"]


READS = """
import threading, time
from launch.serve.lines import open_lines, read_lines
lines = read_lines(open_lines("-"))
print(next(lines).number, flush=True)
threading.Thread(target=next, args=(lines,), daemon=True).start()
time.sleep(0.5)
"""


def test_a_process_ends_well_while_a_thread_waits_for_a_line():
    """As a server does that is told to end while somebody could still send it lines."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", READS], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        process.stdin.write(b"{}\n")
        process.stdin.flush()
        assert process.wait(60) == 0
        assert (process.stdout.read(), process.stderr.read()) == (b"1\n", b"")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--requests .*absent: cannot be read"):
        open_lines(str(tmp_path / "absent"))


@pytest.mark.parametrize("broken", BROKEN, ids=[f"{i}-{problem[:24]}" for i, problem in enumerate(BROKEN.values())])
def test_a_broken_line_gets_one_answer_that_says_what_is_wrong(maker, capsys, broken):
    begin = time.monotonic()
    found = answers_to(maker, broken + b"\n" + line(id="good") + b"\n", capsys)
    assert len(found) == 2
    good = next(answer for answer in found if answer["id"] == "good")
    assert good["tokens"] == [97] * 3
    (bad,) = [answer for answer in found if answer["id"] != "good"]
    assert bad["id"] == 1
    assert bad["error"].startswith("line 1: ")
    assert BROKEN[broken] in bad["error"]
    assert len(bad["error"]) < 700
    assert time.monotonic() - begin < 10


def test_fields_as_clients_write_them_are_taken(maker, capsys):
    lines = (
        line(stop="zz"),
        line(stop=None, seed=None, temperature=None, messages=None),
        line(server=None),
        line(top_p=1),
    )
    found = answers_to(maker, b"\n".join(lines), capsys)
    assert [answer["finish_reason"] for answer in found] == ["length"] * 4


def test_lines_of_standard_input_are_for_this_server_alone(maker, capsys):
    lines = [line(id=f"unnamed{i}") for i in range(3)] + [
        line(id="other", server="edge-a"),
        line(id="unknown", server="x"),
    ]
    found = {answer["id"]: answer for answer in answers_to(maker, b"\n".join(lines), capsys, server=1)}
    assert len(found) == 5
    assert all(found[f"unnamed{i}"]["server"] == "edge-b" for i in range(3))
    assert "is another than edge-b" in found["other"]["error"]
    assert "'x' is unknown" in found["unknown"]["error"]


def test_of_lines_that_all_servers_read_each_is_answered_by_one(maker, capsys):
    lines = [line(id=i) for i in range(10)] + [line(id=10 + i, server=f"edge-{x}") for i, x in enumerate("abcz")]
    lines += [b"broken", DEEP, line(server=3, id=14)]
    found = [answers_to(maker, b"\n".join(lines), capsys, server, shared=True) for server in range(3)]
    assert sum(map(len, found)) == len(lines)
    assert len({answer["id"] for own in found for answer in own}) == len(lines)
    for server, name in enumerate(CLUSTER.names):
        assert all(answer.get("server", name) == name for answer in found[server])
    late = answers_to(maker, b"\n".join(lines), capsys, 2, shared=True, shares=False)
    assert [answer["id"] for answer in late] == [12]


def test_half_of_a_thousand_lines_broken_in_every_way_and_a_thousand_answers(maker, capsys):
    small = [broken for broken in BROKEN if len(broken) < 3_000_000]
    lines = [line(id=f"good{i}") if i % 2 else small[i // 2 % len(small)] for i in range(1000)]
    found = answers_to(maker, b"\n".join(lines) + b"\n", capsys)
    assert len(found) == 1000
    assert {answer["id"] for answer in found if "error" not in answer} == {f"good{i}" for i in range(1, 1000, 2)}
    assert sum("error" in answer for answer in found) == 500


def test_a_reader_that_fails_says_so_and_ends(maker, capsys, caplog):
    class Failing(io.BytesIO):
        def readline(self, size=-1):
            if self.tell():
                raise OSError(5, "Input/output error")
            return super().readline(size)

    host, feeder = InstantHost(), Feeder(maker, Failing(line(id="first") + b"\n"), shared=False)
    feeder.start(host, CLUSTER)
    assert feeder.finished.wait(30)
    assert "requests cannot be read any more (OSError" in feeder.problem
    assert feeder.problem in caplog.text
    assert host.stopped == 1
    assert [json.loads(answer)["id"] for answer in capsys.readouterr().out.splitlines()] == ["first"]


def test_answers_that_nobody_reads_end_serving(maker, monkeypatch, caplog):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    host, feeder = InstantHost(), Feeder(maker, io.BytesIO(line() + b"\n" + line()), shared=False)
    feeder.start(host, CLUSTER)
    assert feeder.finished.wait(30)
    assert "answers cannot be written any more (Broken pipe)" in feeder.problem
    assert host.stopped >= 1
    assert caplog.text.count("answers cannot be written") == 1


def test_closing_takes_no_more_lines_and_answers_those_that_were_read(maker, capsys):
    reading, writing = os.pipe()
    host = InstantHost(delay=0.3)
    with open(reading, "rb") as stream, open(writing, "wb", buffering=0) as lines:
        feeder = Feeder(maker, stream, shared=False)
        feeder.start(host, CLUSTER)
        lines.write(line(id=1) + b"\n" + line(id=2) + b"\n")
        deadline = time.monotonic() + 20
        while feeder.pending < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not feeder.finished.is_set()
        feeder.close()
        assert feeder.finished.wait(20)
        assert feeder.pending == 0
        assert sorted(json.loads(answer)["id"] for answer in capsys.readouterr().out.splitlines()) == [1, 2]
        lines.close()
        for thread in threading.enumerate():
            if thread.name == "requests":
                thread.join(10)


@pytest.mark.slow
def test_a_cluster_gives_a_thousand_answers_to_a_thousand_lines(tmp_path):
    cluster, requests = tmp_path / "cluster.toml", tmp_path / "requests.jsonl"
    servers = "".join(f'[[server]]\nname = "edge-{x}"\ndevices = [{{ memory = "32MB" }}]\n' for x in "abc")
    cluster.write_text(servers)
    small = [broken for broken in BROKEN if len(broken) < 3_000_000]
    lines = [line(id=f"good{i}") if i % 2 else small[i // 2 % len(small)] for i in range(1000)]
    requests.write_bytes(b"\n".join(lines) + b"\n")
    flags = ["--requests", str(requests), "--context", "96", "--sequences", "2", "--max-step-tokens", "16"]
    command = [sys.executable, "-m", "launch", "serve", "--cluster", str(cluster), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(answer) for answer in done.stdout.splitlines()]
    assert len(found) == 1000
    assert {answer["id"] for answer in found if "error" not in answer} == {f"good{i}" for i in range(1, 1000, 2)}
    assert "Traceback" not in done.stderr
