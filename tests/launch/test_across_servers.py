"""Three servers, each a process with its own devices, are one program: point to point, and the dense model's tokens."""

import json
import sys

import pytest

from launch.cluster.addresses import free_port
from launch.cluster.processes import start
from tests.helpers.cluster_of_devices import PROMPTS, Small
from tests.helpers.paths import HELPERS, ROOT

NAMES = ("edge-a", "edge-b", "edge-c")


def run(script, *arguments, timeout=500):
    """Lines that three servers print, by server."""
    lines = {name: [] for name in NAMES}

    def output(server, stream, line):
        if stream == "stdout":
            lines[server].append(line)

    program = str(HELPERS / script)
    coordinator = f"127.0.0.1:{free_port()}"
    commands = {name: [sys.executable, program, name, coordinator, *map(str, arguments)] for name in NAMES}
    env = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with start(commands, env=env, output=output) as processes:
        assert processes.wait(timeout)
    return lines


@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_tokens_are_the_dense_models_under_random_placements(count):
    small = Small.make()
    expected = {str(n): small.reference_text(prompt, 8) for n, prompt in enumerate(PROMPTS)}
    lines = run("generating_server.py", count, timeout=1500)
    texts = [[json.loads(line[6:]) for line in lines[name] if line.startswith("texts ")] for name in NAMES]
    for placement in zip(*texts, strict=True):
        assert {key: text for own in placement for key, text in own.items()} == expected
    assert len(texts[0]) == count
    for name in NAMES:
        # One program each for prefill and decode, whatever the placement.
        assert lines[name][-1] == "compiled 2"


@pytest.mark.parametrize(("calls", "layers"), [(10, 100), pytest.param(1000, 100, marks=pytest.mark.slow)])
def test_random_needs_neither_hang_nor_go_astray(calls, layers):
    for lines in run("exchanging_server.py", calls, layers, timeout=1500).values():
        _, worst, sent, compiled = lines[-1].split()
        assert float(worst) < 1e-5
        assert int(sent) > calls * layers
        assert compiled == "1"
