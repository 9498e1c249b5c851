"""Requests that mean nothing: answered with 4xx or a closed connection, never a hang, and the next good one is served."""

import contextlib
import copy
import json
import random
import socket
import time
from typing import Any

import httpx
import pytest

from launch.http import protocol
from tests.helpers.front_door import Door

SEED = 20
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": "tiny-moe",
        "prompt": "a",
        "max_tokens": 1,
        "temperature": 0,
        "n": 1,
        "stop": ["x"],
        "seed": 1,
        "logprobs": 1,
        "stream": False,
        "top_p": 0.5,
        "stop_token_ids": [3],
        "return_servers": True,
    },
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "a"}],
        "max_completion_tokens": 1,
        "logprobs": True,
        "top_logprobs": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"a": 1},
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": "auto",
    },
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/profile": {"action": "stop"},
    "/migrations": {"what": "plan"},
}
ODD = [
    None,
    True,
    -1,
    0,
    1.5,
    2**70,
    -(2**70),
    1e308,
    "",
    "x" * 3000,
    "\ud800",
    "\x00",
    [],
    {},
    [[]],
    [None],
    [1, "a"],
    {"a": {}},
    [{"role": "user"}],
    [{"role": 1}],
    {"role": "user", "content": [{"type": "image_url"}]},
    {"type": "json_schema", "json_schema": {"schema": {"type": "strin", "items": {"enum": []}}}},
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "#", "multipleOf": 1e300}}},
    {"type": "function", "function": {"name": "f", "parameters": []}},
    [2**40],
    ["", ""],
    "NaN",
]
RAW = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET / HTTX/1.1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 9\r\n\r\n{}",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20_000 + b"\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]


def mutated(rng: random.Random) -> tuple[str, bytes]:
    """A path, and a body in which something is odd."""
    path = rng.choice(list(GOOD))
    body = copy.deepcopy(GOOD[path])
    for _ in range(rng.randint(1, 3)):
        body[rng.choice([*body, "n", "tools", "response_format", "x" * rng.randint(1, 9)])] = copy.deepcopy(
            rng.choice(ODD)
        )
    data = json.dumps(body).encode()
    if rng.random() < 0.3:
        at = rng.randrange(len(data))
        data = data[:at] + rng.choice([b"", bytes([rng.randrange(256)]), b"\xff\xfe", b"[" * 50]) + data[at + 1 :]
    return path, data


def serves(door: Door) -> str:
    return door.client.completions.create(model="tiny-moe", prompt="def ", max_tokens=4, temperature=0).choices[0].text


def send_raw(door: Door, data: bytes) -> bytes:
    """What a connection brings back before it is closed, or nothing more comes for a while."""
    with socket.create_connection(("127.0.0.1", door.port), 30) as connection:
        connection.settimeout(20)
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(2**16)
        except (ConnectionError, TimeoutError) as error:
            assert not isinstance(error, TimeoutError), data[:100]
            return b""


def survive(door: Door, count: int) -> None:
    expected, rng = serves(door), random.Random(SEED)
    seen: dict[int, int] = {}
    for number in range(count):
        path, data = mutated(rng)
        found = door.http.post(path, content=data, headers={"content-type": "application/json"})
        seen[found.status_code] = seen.get(found.status_code, 0) + 1
        assert found.status_code < 500, (path, data, found.text)
        if number % 10 == 0:
            raw = rng.choice([*RAW, rng.randbytes(rng.randint(1, 2000))])
            answer = send_raw(door, raw)
            assert not answer or answer.startswith(b"HTTP/1.1 4"), (raw[:100], answer[:100])
        if number % 500 == 0:
            assert serves(door) == expected
    assert serves(door) == expected
    assert sum(n for status, n in seen.items() if status >= 400) > count / 4
    assert door.ready()["requests"] == 0
    assert door.ready()["restarts"] == 0


def test_malformed_requests_are_refused(door):
    survive(door, 300)


@pytest.mark.slow
def test_ten_thousand_malformed_requests_are_refused(door):
    survive(door, 10_000)


def test_a_head_that_does_not_come_is_not_waited_for(door):
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", door.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: ")
        connection.settimeout(protocol.HEAD_SECONDS + 20)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(100) == b""
    assert protocol.HEAD_SECONDS - 1 < time.monotonic() - begin < protocol.HEAD_SECONDS + 15
    assert httpx.get(f"{door.url}/health").status_code == 200
