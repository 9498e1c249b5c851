"""Messages over sockets: bounded, in time, of known fields, and only from somebody who knows the cluster's secret."""

import json
import os
import queue
import socket
import stat
import threading
import time
from contextlib import suppress

import pytest

from launch.cluster.addresses import listen
from launch.cluster.framing import LINE_BYTES, Connection, Listener, MessageError, OtherSecret, connect, parse
from launch.cluster.secret import load_secret
from placement import InputError

SECRET = b"known to the servers of these tests"
FIELDS = {"server": str, "count?": int}


@pytest.fixture
def pair():
    """Two connected ends, the right one of which reads messages."""
    left, right = socket.socketpair()
    with left, right:
        yield left, Connection(right)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"GET / HTTP/1.1\r", "not a line of JSON"),
        (b"", "not a line of JSON"),
        (b"\xff\xfe", "not a line of JSON"),
        (b"[" * 20000, "not a line of JSON"),
        (b'{"server": NaN}', "not a line of JSON"),
        (b'{"server": "a", "count": ' + b"9" * 5000 + b"}", "not a line of JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"server": "a", "more": 1}', "field 'more' is unknown"),
        (b"{}", "field 'server' is missing"),
        (b'{"server": 1}', "field 'server' is missing or of another type"),
        (b'{"server": "a", "count": true}', "field 'count' is missing or of another type"),
    ],
)
def test_a_line_of_another_form_is_refused(pair, line, problem):
    left, right = pair
    left.sendall(line + b"\n")
    with pytest.raises(MessageError, match=problem) as refused:
        right.receive(FIELDS, 5.0)
    assert "\n" not in str(refused.value)


def test_messages_and_payloads_arrive_in_order(pair):
    left, right = pair
    data = memoryview(os.urandom(3_000_000))
    sender = threading.Thread(target=Connection(left).send, args=({"server": "a", "count": 1}, data))
    sender.start()
    assert right.receive(FIELDS, 5.0) == {"server": "a", "count": 1}
    got = bytearray(len(data))
    right.receive_into(memoryview(got), 5.0)
    assert got == data
    sender.join()
    left.sendall(b'{"server": "b"}\n{"server": "c"}\n')
    assert [right.receive(FIELDS, 5.0)["server"] for _ in range(2)] == ["b", "c"]


def test_a_line_has_to_end_in_time_however_slowly_it_comes(pair):
    left, right = pair
    over = threading.Event()

    def drip():
        while not over.wait(0.05):
            left.sendall(b"x")

    dripping = threading.Thread(target=drip)
    dripping.start()
    begin = time.monotonic()
    with pytest.raises(MessageError, match=r"no whole message within 0\.5 s"):
        right.receive(FIELDS, 0.5)
    assert time.monotonic() - begin < 3
    over.set()
    dripping.join()


def test_a_line_is_no_longer_than_its_bound(pair):
    left, right = pair
    threading.Thread(target=left.sendall, args=(b"x" * 3 * LINE_BYTES,), daemon=True).start()
    with pytest.raises(MessageError, match=f"more than {LINE_BYTES} bytes"):
        right.receive(FIELDS, 5.0)
    assert len(right._buffer) <= 3 * LINE_BYTES
    right.close()


def test_parse_takes_any_object_where_no_fields_are_given():
    assert parse(b'{"x": [1, null]}', None) == {"x": [1, None]}


@pytest.fixture
def listener():
    """A listener that answers with what it was sent, and its address."""
    handled: queue.SimpleQueue[dict] = queue.SimpleQueue()

    def echo(connection):
        with connection:
            message = connection.receive(FIELDS, 2.0)
            handled.put(message)
            connection.send(message)

    listening = listen("127.0.0.1", 0, "test")
    with Listener(listening, SECRET, "test", echo):
        yield listening.getsockname()[:2], handled


def asks(address, secret=SECRET, purpose="test"):
    with connect(address, secret, purpose, 5.0) as connection:
        connection.send({"server": "a"})
        return connection.receive(FIELDS, 5.0)


def test_who_knows_the_secret_is_answered(listener):
    address, _ = listener
    assert asks(address) == {"server": "a"}


def test_another_secret_or_purpose_is_refused_before_anything_is_read(listener):
    address, handled = listener
    for secret, purpose in ((b"another one of these", "test"), (SECRET, "other")):
        with pytest.raises(OtherSecret, match="another cluster secret; give all the same --secret-file"):
            asks(address, secret, purpose)
    assert handled.empty()


def test_the_secret_never_travels_and_a_recorded_greeting_opens_nothing(listener):
    address, handled = listener
    seen = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as between:  # somebody who passes all on, and remembers it

        def pass_on():
            client, _ = between.accept()
            with client, socket.create_connection(address) as server:
                sides = {client: server, server: client}

                def one_way(source):
                    with suppress(OSError):  # the other side has ended
                        while data := source.recv(4096):
                            seen.extend(data)
                            sides[source].sendall(data)

                back = threading.Thread(target=one_way, args=(server,), daemon=True)
                back.start()
                one_way(client)

        threading.Thread(target=pass_on, daemon=True).start()
        assert asks(between.getsockname()[:2]) == {"server": "a"}
    assert SECRET not in seen
    greeting = next(line for line in bytes(seen).split(b"\n") if b"nonce" in line and b"proof" in line)
    handled.get()
    with socket.create_connection(address) as replay:
        replay.sendall(greeting + b'\n{"server": "a"}\n')
        replay.settimeout(5)
        received = b""
        while data := replay.recv(4096):
            received += data
    assert b"refused" in received
    assert handled.empty()


def test_strangers_end_only_their_own_connections(listener):
    address, _ = listener
    held = []
    for junk in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"[1]\n",
        b"\xff\n",
        b"[" * 5000 + b"\n",
        b"x" * 5000,
        b"",
        b'{"server": "a"}\n',
    ):
        held.append(socket.create_connection(address, 5))
        held[-1].sendall(junk)  # and then silence
    held += [socket.create_connection(address, 5) for _ in range(100)]
    begin = time.monotonic()
    assert asks(address) == {"server": "a"}
    assert time.monotonic() - begin < 2
    for connection in held:
        connection.close()


def test_something_else_that_listens_is_no_cluster():
    with socket.create_server(("127.0.0.1", 0)) as other:

        def speak():
            client, _ = other.accept()
            with client:
                client.sendall(b"220 mail.example ESMTP\r\n")
                client.recv(1)

        threading.Thread(target=speak, daemon=True).start()
        with pytest.raises(MessageError, match="not a line of JSON"):
            asks(other.getsockname()[:2])


def test_the_secret_is_made_once_for_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(load_secret())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file = tmp_path / "cache" / "dancemoe" / "secret"
    assert len(found) == 8
    assert set(found) == {file.read_bytes().strip()}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert [path.name for path in file.parent.iterdir()] == ["secret"]
    assert load_secret(tmp_path / "given") == load_secret(tmp_path / "given") != found[0]


def test_a_secret_that_is_none_is_refused(tmp_path):
    (tmp_path / "short").write_text("abc\n")
    with pytest.raises(InputError, match="holds 3 bytes, must be 16 to"):
        load_secret(tmp_path / "short")
    with pytest.raises(InputError, match=r"--secret-file .*: cannot be read"):
        load_secret(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made at"):
        load_secret(tmp_path / "file" / "secret")


@pytest.mark.parametrize(("mode", "warned"), [(0o600, 0), (0o400, 0), (0o440, 0), (0o444, 1), (0o460, 1), (0o602, 1)])
def test_a_secret_that_others_can_read_or_change_draws_a_warning(tmp_path, caplog, mode, warned):
    file = tmp_path / "secret"
    file.write_text("x" * 32)
    file.chmod(mode)
    assert load_secret(file) == b"x" * 32
    assert len(caplog.records) == warned


def test_a_listener_is_nowhere_but_at_its_address():
    with listen("127.0.0.1", 0, "test") as listening:
        port = listening.getsockname()[1]
        other = next((a[4][0] for a in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)), "127.0.0.1")
        for host in {"127.0.0.2", other} - {"127.0.0.1"}:
            with pytest.raises(OSError, match=r"refused|unreachable|timed out"):
                socket.create_connection((host, port), 2)


def test_json_is_one_line():
    left, right = socket.socketpair()
    with left, right:
        Connection(left).send({"server": "a\nb\u2028c"})
        assert json.loads(right.recv(1000).split(b"\n")[0])["server"] == "a\nb\u2028c"
