"""What operators see: metrics that a dashboard names, status, placement, profile; and who is let in."""

import contextlib
import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request as HttpRequest

from launch.__main__ import main
from launch.http.access import Access
from launch.http.book import Refused
from placement import InputError, Placement, Profile
from tests.helpers.paths import ROOT

MODEL = "tiny-moe"


def samples(door) -> dict[str, float]:
    families = text_string_to_metric_families(door.http.get("/metrics").text)
    found: dict[str, float] = {}
    for family in families:
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


@pytest.fixture(scope="module")
def served(door):
    """A front door that has answered something, and whose worker has told of it."""
    assert door.http.post("/profile", json={"action": "start"}).json() == {"recording": True}
    door.client.completions.create(model=MODEL, prompt="def main(", max_tokens=20, temperature=0)
    assert door.http.post("/v1/completions", json={"prompt": 3}).status_code == 400
    for _ in range(200):
        if samples(door).get("dancemoe_step_tokens_total", 0) >= 28:
            return door
        # Totals are taken between two steps, once a second.
        door.client.completions.create(model=MODEL, prompt="def main(", max_tokens=20, temperature=0)
    raise AssertionError(samples(door))


def test_every_metric_of_the_dashboard_exists(served):
    dashboard = json.loads((ROOT / "launch/http/grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = {name for text in expressions for name in re.findall(r"dancemoe_\w+", text)}
    found = samples(served)
    assert len(named) > 20
    assert named <= found.keys()
    published = {name for name in found if not name.endswith(("_created", "_sum", "_count"))}
    assert published <= named  # and the dashboard shows all there are


def test_metrics_count_what_was_done(served):
    found = samples(served)
    assert found["dancemoe_generation_tokens_total"] % 20 == 0
    assert found["dancemoe_prompt_tokens_total"] == found["dancemoe_generation_tokens_total"] / 20 * 9
    assert found["dancemoe_time_to_first_token_seconds_count"] == found["dancemoe_generation_tokens_total"] / 20
    assert 'dancemoe_requests_total{outcome="400"} 1.0' in served.http.get("/metrics").text
    assert found["dancemoe_coverage"] == 1.0
    # One server serves all calls of its users itself: layers x experts per token for every token of a step.
    assert found["dancemoe_expert_calls_total"] == 6 * 4 * found["dancemoe_step_tokens_total"]
    assert served.http.get("/status").json()["stats"]["bytes_exchanged"] == 0


def test_placement_and_profile_are_files_of_the_planner(served, tmp_path):
    reply = served.http.get("/placement").json()
    placed = Placement.from_dict(reply["placement"], "the reply")
    assert placed.resident.shape == (1, 6, 32)
    assert placed.resident.all()
    assert served.http.post("/profile", json={"action": "stop"}).json() == {"recording": False}
    file = tmp_path / "profile.npz"
    file.write_bytes(served.http.get("/profile").content)
    profile = Profile.load(file)
    assert profile.counts.sum() % (6 * 4) == 0
    assert profile.counts.sum() > 0
    assert served.http.post("/profile", json={"action": "burn"}).status_code == 400


def test_migrations_need_a_state(served):
    found = served.http.get("/migrations")
    assert found.status_code == 409
    assert "--state" in found.json()["error"]["message"]


def test_the_page_asks_nobody_else(served):
    page = served.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|@import", page.text)
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_a_name_that_leads_here_from_elsewhere_is_no_operator(served):
    assert served.http.get("/status", headers={"host": "evil.example"}).status_code == 403
    assert served.http.get("/status", headers={"host": "localhost:1"}).status_code == 200


def http_request(token: str | None = None, client: str = "127.0.0.1", host: str = "localhost") -> HttpRequest:
    headers = [(b"host", host.encode())] + ([(b"authorization", token.encode())] if token else [])
    return HttpRequest({"type": "http", "method": "GET", "path": "/", "headers": headers, "client": (client, 1)})


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    users, operator = tmp_path / "users", tmp_path / "operator"
    users.write_text("# users\nfirst-token-of-16\nsecond-token-of-16\n")
    operator.write_text("operators-token-16\n")
    for file in (users, operator):
        file.chmod(0o600)
    return users, operator


def status(check, request: HttpRequest) -> int:
    try:
        check(request)
    except Refused as refused:
        return refused.status
    return 200


def test_tokens_open_what_they_are_for(files):
    access = Access(*files)
    users = {
        None: 401,
        "Bearer first-token-of-16": 200,
        "bearer second-token-of-16": 200,
        "Bearer operators-token-16": 200,
    }
    users |= {"Bearer ": 401, "Bearer first-token-of-1": 401, "Basic first-token-of-16": 401, "Bearer é": 401}
    assert {token: status(access.check_user, http_request(token)) for token in users} == users
    operators = {None: 401, "Bearer first-token-of-16": 401, "Bearer operators-token-16": 200}
    assert {token: status(access.check_operator, http_request(token)) for token in operators} == operators


def test_without_an_operators_token_operators_come_from_here():
    access = Access(None, None)
    assert status(access.check_user, http_request(client="10.0.0.9", host="edge-a")) == 200
    places = {("127.0.0.1", "localhost"): 200, ("::1", "[::1]:8000"): 200, ("::ffff:127.0.0.1", "127.0.0.1"): 200}
    places |= {("10.0.0.9", "localhost"): 403, ("127.0.0.1", "edge-a:8000"): 403, ("127.0.0.1", ""): 403}
    assert {at: status(access.check_operator, http_request(client=at[0], host=at[1])) for at in places} == places


@pytest.mark.parametrize("text", ["", "# only words\n", "short\n"])
def test_a_file_without_tokens_is_refused(tmp_path, text):
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(InputError, match="must hold tokens of at least 16 characters"):
        Access(file, None)
    with pytest.raises(InputError, match="cannot be read"):
        Access(None, tmp_path / "absent")


def test_the_schema_describes_every_path(served):
    schema = served.http.get("/openapi.json").json()
    assert schema["openapi"].startswith("3.1")
    for path, operations in schema["paths"].items():
        for method in operations:
            found = served.http.request(method, path.replace("{name}", MODEL), json={})
            assert str(found.status_code) in operations[method]["responses"], (method, path, found.text)
            assert found.status_code not in (404, 405)


def listening_ports(pid: int) -> set[int]:
    """TCP ports at which a process listens, by Linux's own tables."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(link.readlink().name)
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def test_one_server_listens_at_its_http_port_alone(served):
    assert listening_ports(served.process.pid) == {served.port}
    assert listening_ports(served.worker()) == set()


def test_bench_requests_measures_it(served, capsys):
    flags = ["--rate", "10", "--duration", "1", "--output", "5", "--prompt", "8", "--json"]
    assert main(["bench", "requests", served.url, *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answered"] == found["requests"] > 3
    assert found["tokens_per_s"] == pytest.approx(5 * found["requests"] / found["seconds"], rel=0.05)
    assert found["first_s"]["p50"] <= found["whole_s"]["p50"]
