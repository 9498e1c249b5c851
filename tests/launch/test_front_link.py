"""What a worker says to its front door, and when."""

import queue
import socket
from typing import Any

import pytest

from launch.cluster.framing import Connection, Listener
from launch.engine.request import Request
from launch.serve import front_link
from launch.serve.front_messages import LONGEST, PURPOSE, ROLE, TO_FRONT

SECRET = b"0123456789abcdef"
SOON, A_WHILE = 10.0, 0.3  # seconds


@pytest.fixture
def said(tmp_path, monkeypatch):
    """A link, and the messages that come from it; what may wait in it waits for ever."""
    monkeypatch.setattr(front_link, "_TOGETHER_S", 1e6)
    monkeypatch.setattr(front_link, "_BEAT_S", 1e6)
    monkeypatch.setattr(front_link, "leave_at_once", lambda: None)
    messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def take(connection: Connection) -> None:
        role = connection.receive(ROLE, SOON)["role"]
        while role == "tokens":
            messages.put(connection.receive(TO_FRONT, None, LONGEST))
        connection.receive({}, None)

    path = str(tmp_path / "front.sock")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    with Listener(listening, SECRET, PURPOSE, take):
        no_grammars: Any = None  # no request is submitted
        link = front_link.FrontLink(path, SECRET, no_grammars)
        assert messages.get(timeout=SOON) == {"beat": {"steps": 0}}
        yield link, messages


def test_tokens_wait_for_others_but_first_ones_and_ends_for_nothing(said):
    link, messages = said
    link.given(1, 50, first=True)
    assert messages.get(timeout=SOON) == {"tokens": [[1, 50]]}
    link.given(1, 51, first=False)
    with pytest.raises(queue.Empty):
        messages.get(timeout=A_WHILE)
    link.given(2, 60, [-0.5, []], first=True)
    assert messages.get(timeout=SOON) == {"tokens": [[1, 51]], "detailed": [[2, 60, [-0.5, []]]]}
    link.given(1, 52, first=False)
    link.ended(1, Request(0, [1], 3, 0.0, reason="length"))
    assert messages.get(timeout=SOON) == {"tokens": [[1, 52]], "ended": [[1, "length", ""]]}
