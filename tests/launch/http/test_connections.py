"""How clients connect: by TLS, and no more at once than there is room for."""

import socket
import ssl
import time

import httpx
import openai
import pytest

from launch.http.protocol import CONNECTIONS
from tests.helpers.front_door import Door
from tests.helpers.paths import ROOT

TLS = ROOT / "tests" / "fixtures" / "tls"


def test_tls_with_a_key_of_its_own(tmp_path):
    door = Door(tmp_path, "--tls-cert", str(TLS / "cert.pem"), "--tls-key", str(TLS / "key.pem"))
    door.http.close()
    known = ssl.create_default_context(cafile=str(TLS / "cert.pem"))
    door.url = door.url.replace("http:", "https:")
    door.http = httpx.Client(base_url=door.url, timeout=300, verify=known)
    try:
        door.wait_until_ready()
        with openai.OpenAI(
            base_url=f"{door.url}/v1", api_key="none", http_client=httpx.Client(verify=known, timeout=300)
        ) as client:
            stream = client.completions.create(
                model="tiny-moe", prompt="def main(", max_tokens=8, temperature=0, stream=True
            )
            assert len("".join(chunk.choices[0].text for chunk in stream)) == 8
        with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
            httpx.get(f"{door.url}/health")  # nobody has said that this certificate is good
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"http://127.0.0.1:{door.port}/health")
        with socket.create_connection(("127.0.0.1", door.port)) as bare:
            bare.sendall(b"\x16\x03\x01\xff\xff" + bytes(500))
            assert not bare.recv(4096).startswith(b"HTTP")
        assert door.http.get("/health").status_code == 200
    finally:
        assert door.stop() == 0


def test_connections_that_are_too_many_are_closed(door):
    opened = [socket.create_connection(("127.0.0.1", door.port)) for _ in range(CONNECTIONS + 40)]
    try:
        deadline = time.monotonic() + 10
        while (closed := sum(ended(one) for one in opened)) < 40 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert 40 <= closed < 60  # the test's own client may hold a few
    finally:
        for one in opened:
            one.close()
    found = door.client.completions.create(model="tiny-moe", prompt="def ", max_tokens=2, temperature=0)
    assert found.usage.completion_tokens == 2


def ended(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
