"""Front doors of a cluster: every server answers its own users, and all go on when a worker of any of them ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from launch.cluster.addresses import free_port
from tests.helpers.paths import ROOT
from tests.launch.test_serve import CLUSTER

NAMES = ("edge-a", "edge-b", "edge-c")


class Cluster:
    """Three front doors, started at once."""

    def __init__(self, folder, *flags: str) -> None:
        file = folder / "cluster.toml"
        file.write_text(CLUSTER)
        self.port, self.log_file = free_port(), folder / "log"
        given = [sys.executable, "-m", "launch", "serve", "--cluster", str(file), "--http", f"127.0.0.1:{self.port}"]
        shape = ["--context", "128", "--sequences", "4", "--max-step-tokens", "16"]
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen(
                [*given, *shape, *flags], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT
            )

    def ready(self, server: int) -> dict:
        return httpx.get(f"http://127.0.0.1:{self.port + server}/ready", timeout=30).json()

    def wait_until_ready(self, seconds: float = 900.0) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log_file.read_text()
            try:
                if all(self.ready(server)["ready"] for server in range(3)):
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise AssertionError(self.log_file.read_text())

    def text(self, server: int, prompt: str, tokens: int = 60, **given: str) -> str:
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port + server}/v1", api_key="none", max_retries=0
        ) as client:
            found = client.completions.create(
                model="tiny-moe", prompt=prompt, max_tokens=tokens, temperature=0, timeout=300, **given
            )
        return found.choices[0].text


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    opened = Cluster(tmp_path_factory.mktemp("cluster"), "--stuck", "15", "--hold", "300", "--route")
    try:
        opened.wait_until_ready()
        yield opened
    finally:
        opened.process.send_signal(signal.SIGTERM)
        try:
            status = opened.process.wait(90)
        finally:
            opened.process.kill()
            opened.process.wait()
    assert status == 0, opened.log_file.read_text()


def test_each_server_answers_what_generate_does(cluster, generated):
    prompts = ["def main(", "The import statement", "12 + 30 = "]
    expected = [generated(prompt, max_tokens=60)["text"] for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(cluster.text, range(3), prompts)) == expected


@pytest.mark.parametrize("server", [0, 2])
def test_all_go_on_when_a_worker_ends(cluster, server):
    prompts = ["def main(", "The import statement", "12 + 30 = "] * 2
    expected = [cluster.text(i % 3, prompt, 110) for i, prompt in enumerate(prompts)]
    before = [cluster.ready(i)["restarts"] for i in range(3)]
    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(cluster.text, i % 3, prompt, 110) for i, prompt in enumerate(prompts)]
        time.sleep(0.3)
        os.kill(cluster.ready(server)["worker"]["pid"], signal.SIGKILL)
        time.sleep(1.0)
        others = [cluster.ready(i) for i in range(3) if i != server]
        assert [one.result(400) for one in running] == expected
    assert all(not found["ready"] for found in others)
    assert all(any(NAMES[server] in reason["message"] for reason in found["reasons"]) for found in others)
    cluster.wait_until_ready()
    assert all(cluster.ready(i)["restarts"] > before[i] for i in range(3))


def test_a_users_requests_are_served_where_their_experts_are_with_the_same_text(cluster):
    def handed() -> int:
        pattern = re.compile(r'^dancemoe_routed_total\{outcome="there"\} (.*)$', re.M)
        found = [httpx.get(f"http://127.0.0.1:{cluster.port + i}/metrics", timeout=30).text for i in range(3)]
        return sum(int(float(count)) for text in found for count in pattern.findall(text))

    prompts = [f"{number} + 30 = " for number in range(12, 15)]
    expected = [cluster.text(i, prompt, 100) for i, prompt in enumerate(prompts)]
    assert handed() == 0  # nobody said who they are
    assert [cluster.text(i, prompt, 100, user="arithmetic") for i, prompt in enumerate(prompts)] == expected
    deadline = time.monotonic() + 30
    while not (count := handed()) and time.monotonic() < deadline:
        assert [cluster.text(i, prompt, 100, user="arithmetic") for i, prompt in enumerate(prompts)] == expected
    assert count > 0
    with ThreadPoolExecutor(6) as pool:  # a worker that ends takes none with it, wherever they are served
        running = [pool.submit(cluster.text, i % 3, prompts[i % 3], 100, user="arithmetic") for i in range(6)]
        time.sleep(0.2)
        os.kill(cluster.ready(1)["worker"]["pid"], signal.SIGKILL)
        assert [one.result(400) for one in running] == [*expected, *expected]
    cluster.wait_until_ready()


def test_traffic_by_pair_and_who_served_each_token(cluster):
    url = f"http://127.0.0.1:{cluster.port}"
    body = {"prompt": "def main(", "max_tokens": 20, "temperature": 0, "return_servers": True}
    found = httpx.post(f"{url}/v1/completions", json=body, timeout=300).json()
    served_by = found["choices"][0]["served_by"]
    assert len(served_by) == 20
    assert all(len(calls) == 3 and sum(calls) == 6 * 4 for calls in served_by)  # layers x experts of a token
    streamed = httpx.post(f"{url}/v1/completions", json={**body, "stream": True}, timeout=300).text.split("\n\n")[:-2]
    pieces = [json.loads(event.removeprefix("data: "))["choices"][0] for event in streamed]
    assert [piece["served_by"] for piece in pieces if piece["served_by"]] == [
        [calls] for calls in served_by
    ]  # one by one
    assert "".join(piece["text"] for piece in pieces) == found["choices"][0]["text"]
    expected = sum(calls[1] for calls in served_by) > 0
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        text = httpx.get(f"{url}/metrics", timeout=30).text
        pairs = dict(re.findall(r'^dancemoe_pair_bytes_total\{source="edge-a",target="(.*)"\} (.*)$', text, re.M))
        if float(pairs["edge-b"]) > 0 or not expected:
            break
        time.sleep(0.2)
    assert pairs.keys() == set(NAMES)
    assert float(pairs["edge-a"]) == 0 < float(pairs["edge-c"]) + float(pairs["edge-b"])
    exchanges = re.findall(r'^dancemoe_pair_exchanges_total\{source="edge-a",target="edge-[bc]"\} (.*)$', text, re.M)
    assert sum(map(float, exchanges)) > 0
    assert (
        "served_by" not in httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=300).json()["choices"][0]
    )
