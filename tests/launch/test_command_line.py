"""The command line as a whole: help at once, versions, one format for what programs say about themselves."""

import dataclasses
import json
import logging
import resource
import subprocess
import sys

import pytest

from dancemoe_jax.training import TrainConfig
from launch import arguments, log
from launch.__main__ import COMMANDS, main
from launch.cluster.processes import ServerFailed
from placement.version import VERSION
from tests.helpers.paths import ROOT


def shell(*command, **options):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_loads_no_jax_and_comes_at_once(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = shell("-X", "importtime", "-m", "launch", *command, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert "usage: launch" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not loaded & {"jax", "jaxlib", "flax", "orbax", "scipy", "rich"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.7


@pytest.mark.parametrize("program", ["launch", "placement"])
def test_programs_say_their_version(program):
    done = shell("-m", program, "--version")
    assert (done.returncode, done.stdout.split()[:2]) == (0, [program, VERSION])


def test_the_flags_of_training_are_its_configuration():
    assert {field.name: field.default for field in dataclasses.fields(TrainConfig)} == arguments.TRAINING


@pytest.fixture
def restored():
    """The process's logging as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for package in ("launch", "placement", "dancemoe_jax"):
        logging.getLogger(package).setLevel(logging.NOTSET)


def test_lines_are_plain_or_json_from_a_level_on(restored, capsys):
    own, other = logging.getLogger("launch.test"), logging.getLogger("other")
    for level, lines in (("info", 2), ("debug", 3), ("error", 0)):
        log.configure(level)
        own.debug("a detail")
        own.info("edge-a: serving after %.1f s", 3.21)
        other.info("nobody asked")
        own.warning("a warning")
        shown = capsys.readouterr().err.splitlines()
        assert len(shown) == lines
        assert not lines or "edge-a: serving after 3.2 s" in shown
        assert not lines or "a warning" in shown
    log.configure("info", as_json=True, server="edge-a")
    own.info("serving after %d s", 3)
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["logger"], line["server"]) == ("info", "launch.test", "edge-a")
    assert line["message"] == "serving after 3 s"


def test_only_python_writes_to_standard_output():
    code = """
import logging, os
from launch import log
log.configure("debug")
log.keep_output_clean()
os.write(1, b"[Gloo] Rank 0 is connected\\n")
print("an answer")
os.system("echo of a child")
import time; time.sleep(0.3)
"""
    done = shell("-c", code)
    assert done.stdout == "an answer\n"
    assert "launch.native: [Gloo] Rank 0 is connected" in done.stderr
    assert "launch.native: of a child" in done.stderr


def test_a_thread_that_fails_says_so_in_one_line():
    code = """
import threading
from launch import log
log.configure()
log.explain_failed_threads()
def fail():
    raise ValueError("no\\nmore")
thread = threading.Thread(target=fail, name="reporter")
thread.start()
thread.join()
"""
    assert shell("-c", code).stderr == "reporter has ended: ValueError: no more\n"


def test_an_unknown_command_or_flag_is_one_line():
    for command in (
        ("bogus",),
        ("serve", "--bogus"),
        ("bench", "bogus"),
        ("serve", "--cluster", "c", "--log-level", "x"),
    ):
        done = shell("-m", "launch", *command)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("status", "expected"), [(-9, 1), (1, 1), (2, 2), (134, 1)])
def test_a_command_whose_server_has_ended_says_so_in_one_line(restored, capsys, monkeypatch, status, expected):
    def lost(args):
        raise ServerFailed("edge-b", status, ["its last words"])

    monkeypatch.setattr("launch.bench.load.run", lost)
    assert main(["bench", "load"]) == expected
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("launch bench: server edge-b ended with ")
    assert err.endswith(": its last words\n")
    assert err.count("\n") == 1
