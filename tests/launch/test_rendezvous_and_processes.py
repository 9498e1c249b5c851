"""Servers' processes: started, ended and explained together; joined into one JAX program or refused with the reason."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.cluster.addresses import coordinator_address, free_port
from launch.cluster.devices import visible_devices
from launch.cluster.fingerprint import cluster_fingerprint, folder_fingerprint
from launch.cluster.join import join
from launch.cluster.launchers import from_environment
from launch.cluster.processes import ServerFailed, prefixed, start, to_files
from launch.cluster.rendezvous import rendezvous
from launch.cluster.signals import Interrupts
from placement import Cluster, InputError
from tests.helpers.paths import HELPERS, ROOT

JOINED = str(HELPERS / "joined_server.py")
NAMES = ("edge-a", "edge-b", "edge-c")
SECRET = b"known to the servers of these tests"
ENV = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def python(code, *arguments):
    return [sys.executable, "-c", code, *map(str, arguments)]


def alive(pid):
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def soon(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def lines():
    """Collects what servers print: (server, stream, line)."""
    return []


def collect(lines):
    return lambda *line: lines.append(line)


def make_cluster(hosts=(None, None, None), name="edge-b"):
    devices = [{"memory": "1GB"}]
    servers = zip(("edge-a", name, "edge-c"), hosts, (devices, devices, devices * 2), strict=True)
    tables = [{"name": n, "devices": d, **({"host": h} if h else {})} for n, h, d in servers]
    return Cluster.from_dict({"server": tables})


# Starting and ending


def test_all_end_well_and_their_lines_arrive_in_order(lines):
    code = "import sys; print(sys.argv[1], 1); print(sys.argv[1], 2); print('note', file=sys.stderr)"
    with start({name: python(code, name) for name in NAMES}, output=collect(lines)) as processes:
        assert set(processes.pids) == set(NAMES)
        assert processes.wait(20)
    for name in NAMES:
        assert [line for server, stream, line in lines if (server, stream) == (name, "stdout")] == [
            f"{name} 1",
            f"{name} 2",
        ]
        assert (name, "stderr", "note") in lines


def test_lines_are_prefixed_or_go_to_a_file_of_each_server(tmp_path, capsys):
    commands = {name: python("import sys; print('out'); print('err', file=sys.stderr)") for name in NAMES[:2]}
    with start(commands, output=prefixed()) as processes:
        processes.wait()
    shown = capsys.readouterr()
    assert sorted(shown.out.splitlines()) == ["[edge-a] out", "[edge-b] out"]
    assert sorted(shown.err.splitlines()) == ["[edge-a] err", "[edge-b] err"]
    with start(commands, output=to_files(tmp_path / "logs")) as processes:
        processes.wait()
    assert sorted((tmp_path / "logs" / "edge-b.log").read_text().split()) == ["err", "out"]


def test_wait_gives_up_after_its_timeout_and_the_block_ends_what_runs():
    with start({"edge-a": ["sleep", "60"]}) as processes:
        begin = time.monotonic()
        assert processes.wait(0.2) is False
        assert time.monotonic() - begin < 5
        pid = processes.pids["edge-a"]
        assert alive(pid)
    assert not alive(pid)


def test_one_failure_ends_all_even_those_that_ignore_it(lines):
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready'); time.sleep(60)"
    failing = "import sys, time; time.sleep(1); print('disk is full', file=sys.stderr); sys.exit(3)"
    commands = {"edge-a": python(stubborn), "edge-b": python(failing), "edge-c": ["sleep", "60"]}
    with start(commands, output=collect(lines)) as processes:
        assert soon(lambda: ("edge-a", "stdout", "ready") in lines)
        begin = time.monotonic()
        with pytest.raises(ServerFailed, match=r"server edge-b ended with exit status 3: disk is full") as failed:
            processes.wait(grace=0.5)
        assert time.monotonic() - begin < 8
        assert not any(alive(pid) for pid in processes.pids.values())
    assert (failed.value.server, failed.value.status, failed.value.stderr) == ("edge-b", 3, ("disk is full",))


def test_a_signal_is_called_by_its_name():
    with (
        start({"edge-a": python("import os; os.kill(os.getpid(), 9)")}) as processes,
        pytest.raises(ServerFailed) as failed,
    ):
        processes.wait()
    assert str(failed.value) == "server edge-a ended with signal SIGKILL"


def test_a_program_that_is_not_there_is_named(lines):
    with (
        start({"edge-a": ["no-such-program"]}, output=collect(lines)) as processes,
        pytest.raises(ServerFailed) as failed,
    ):
        processes.wait()
    assert "no-such-program: cannot be started" in str(failed.value)


PARENT = """
import sys
from launch.cluster.rendezvous import rendezvous
from launch.cluster.processes import start
child = "import os, subprocess as s, time; p = s.Popen(['sleep', '61']); print(os.getpid(), p.pid); time.sleep(60)"
with start({n: [sys.executable, "-c", child] for n in ("edge-a", "edge-b")}) as processes:
    processes.wait()
"""


@contextmanager
def parent():
    """A program with two servers, each with a child of its own: it, the servers' ids, and the children's."""
    environment = {**os.environ, **ENV}
    with subprocess.Popen(python(PARENT), env=environment, stdout=subprocess.PIPE, text=True) as process:
        pids = [tuple(map(int, process.stdout.readline().split()[1:])) for _ in range(2)]
        yield process, [server for server, _ in pids], [child for _, child in pids]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 128 + 15), (signal.SIGHUP, 128 + 1), (signal.SIGINT, -2)]
)
def test_a_signal_to_the_parent_ends_all(number, status):
    with parent() as (process, servers, children):
        process.send_signal(number)
        assert process.wait(10) == status
        assert not any(alive(pid) for pid in [*servers, *children])


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends children of a killed parent on Linux")
def test_no_server_outlives_a_killed_parent():
    with parent() as (process, servers, children):
        process.kill()
        assert soon(lambda: not any(alive(pid) for pid in servers))
        for child in children:
            os.kill(child, signal.SIGKILL)


def test_held_signals_come_after_the_block():
    steps = []
    with pytest.raises(SystemExit) as left, Interrupts() as interrupts:
        with interrupts.held():
            signal.raise_signal(signal.SIGTERM)
            steps.append("cleaned up")
        steps.append("never")
    assert steps == ["cleaned up"]
    assert left.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# Meeting: real sockets, the servers as threads


def meet(given, *, names=NAMES, timeout=20.0):
    """What each server, by name, is told when it comes with its facts: "" or the problem. Strangers come before others."""
    address, told = f"127.0.0.1:{free_port()}", {}

    def come(key, name, facts):
        try:
            with rendezvous(names, name, address, facts, timeout, SECRET):
                told[key] = ""
                if name == names[0]:  # stands for JAX's service, which the others wait for
                    with socket.create_server(("127.0.0.1", int(address.split(":")[1]))) as service:
                        service.settimeout(10)
                        service.accept()[0].close()
                        time.sleep(0.2)
        except InputError as error:
            told[key] = str(error)

    threads = [threading.Thread(target=come, args=(key, *each)) for key, each in enumerate(given)]
    for thread, (name, _) in zip(threads, given, strict=True):
        thread.start()
        if name not in names:
            thread.join(60)
    for thread in threads:
        thread.join(60)
    return [told[key] for key in range(len(given))]


def test_servers_with_the_same_facts_meet():
    assert meet([(name, {"model": "1"}) for name in NAMES]) == ["", "", ""]


def test_all_learn_which_server_differs_and_in_what():
    told = meet([("edge-a", {"model": "1"}), ("edge-b", {"model": "1"}), ("edge-c", {"model": "2"})])
    assert told == ["server edge-c has another model than edge-a: 2 against 1; give every server the same"] * 3


def test_all_learn_which_server_is_missing():
    told = meet([("edge-a", {}), ("edge-c", {})], timeout=3.0)
    assert told[0].startswith("server edge-b has not reported to edge-a within 3 s")
    assert told[1] == told[0]
    told = meet([("edge-a", {})], timeout=0.3)
    assert told[0].startswith("servers edge-b, edge-c have not reported to edge-a")


def test_a_missing_first_server_is_named_with_its_address():
    (told,) = meet([("edge-b", {})], timeout=0.3)
    assert told.startswith("server edge-a does not answer server edge-b at 127.0.0.1:")


def test_a_stranger_is_refused_and_does_not_disturb():
    told = meet([("edge-a", {}), ("edge-x", {}), ("edge-b", {}), ("edge-c", {})])
    assert "edge-x" in told[1]
    assert [told[0], *told[2:]] == ["", "", ""]


def test_whatever_connects_without_being_a_server_is_ignored():
    port, outcome = free_port(), []

    def first():
        try:
            with rendezvous(NAMES[:2], "edge-a", f"127.0.0.1:{port}", {}, 2.0, SECRET):
                pass
        except InputError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=first)
    thread.start()
    stranger = b'{"server": "edge-b", "facts": {}}\n'  # says that it is a server, and does not know the secret
    for junk in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"\xff\n", b"[" * 5000 + b"\n", b"", stranger):
        assert soon(lambda: _send(port, junk))  # noqa: B023
    thread.join(20)
    assert "edge-b has not reported" in outcome[0]


def _send(port, data):
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.sendall(data)
        return True
    except OSError:
        return False


def test_port_in_use_is_one_line():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        joined = join(make_cluster(), "edge-a", coordinator=f"127.0.0.1:{port}")
        with pytest.raises(InputError, match=f"server edge-a: port {port}: .*in use") as refused, joined:
            pass
    assert "\n" not in str(refused.value)


def test_a_host_that_is_not_known_here_is_said_at_once(caplog):
    hosts = (None, "no-such.invalid", None)
    joined = join(make_cluster(hosts), "edge-a", coordinator=f"127.0.0.1:{free_port()}", timeout=2)
    begin = time.monotonic()
    with pytest.raises(InputError, match="have not reported"), joined:
        pass
    (warned,) = [record for record in caplog.records if "is not known here" in record.message]
    assert "server[1].host: 'no-such.invalid'" in warned.message
    assert warned.created - time.time() + time.monotonic() < begin + 1.5


def test_a_server_that_the_file_does_not_know_is_refused():
    known = "server edge-z: not in cluster; known are edge-a, edge-b, edge-c"
    with pytest.raises(InputError, match=known), join(make_cluster(), "edge-z"):
        pass


# Addresses, fingerprints, environments


@pytest.mark.parametrize(
    ("host", "address"),
    [
        (None, "127.0.0.1:8476"),
        ("10.0.0.1", "10.0.0.1:8476"),
        ("10.0.0.1:99", "10.0.0.1:99"),
        ("edge-a.lan:1234", "edge-a.lan:1234"),
        ("fd00::1", "[fd00::1]:8476"),
        ("[fd00::1]:99", "[fd00::1]:99"),
    ],
)
def test_servers_meet_at_the_first_host(host, address):
    assert coordinator_address(make_cluster((host, None, None))) == address


@pytest.mark.parametrize("host", ["10.0.0.1:", "10.0.0.1:http", "10.0.0.1:70000", ":80"])
def test_a_port_that_is_none_is_refused(host):
    with pytest.raises(InputError, match=r"server\[0\]\.host = .*must be host:port"):
        coordinator_address(make_cluster((host, None, None)))


def test_fingerprints_change_with_content_and_with_nothing_else(tmp_path):
    assert cluster_fingerprint(make_cluster()) == cluster_fingerprint(make_cluster(hosts=("10.0.0.1", None, None)))
    assert cluster_fingerprint(make_cluster()) != cluster_fingerprint(make_cluster(name="other"))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "config.json").write_text("{}")
    before = folder_fingerprint(tmp_path)
    assert folder_fingerprint(tmp_path) == before
    (tmp_path / "deep" / "config.json").write_text("[]")
    assert folder_fingerprint(tmp_path) != before
    with pytest.raises(InputError, match="absent: cannot be read"):
        folder_fingerprint(tmp_path / "absent")


def test_slurm_tells_server_and_coordinator(monkeypatch):
    assert from_environment(make_cluster()) is None
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[03-05]", "SLURM_NTASKS": "3", "SLURM_PROCID": "1"}
    for key, value in {**slurm, "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "3"}.items():
        monkeypatch.setenv(key, value)
    assert from_environment(make_cluster()) == ("edge-b", f"node03:{7 + 65535 - 2**12 + 1}")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(InputError, match="3 servers, but 4 tasks were started"):
        from_environment(make_cluster())


def test_servers_of_one_machine_share_out_its_accelerators(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [visible_devices(make_cluster(), i) for i in range(3)] == [[0], [1], [2, 3]]
    assert [visible_devices(make_cluster(("a", "b", "a")), i) for i in range(3)] == [[0], [0], [1, 2]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert visible_devices(make_cluster(), 2) == [0, 1]


# Whole: processes that join through JAX


def servers(then, lines):
    address = f"127.0.0.1:{free_port()}"
    return start(
        {name: [sys.executable, JOINED, name, address, then] for name in NAMES}, env=ENV, output=collect(lines)
    )


def test_three_servers_become_one_program_in_the_order_of_the_file(lines):
    with servers("add", lines) as processes:
        assert processes.wait(90)
    said = [(server, line) for server, _, line in lines]
    for name in NAMES:
        assert (name, "owners 0 1 2 2") in said
        assert (name, "sum 6.0") in said
    assert not [line for _, _, line in lines if "has ended" in line]


def test_an_error_in_one_joined_server_ends_all_at_once_with_its_words(lines):
    with servers("raise", lines) as processes:
        begin = time.monotonic()
        with pytest.raises(ServerFailed, match="server edge-b ended with exit status 1: ValueError: no more"):
            processes.wait(90)
        assert time.monotonic() - begin < 40
        assert not any(alive(pid) for pid in processes.pids.values())


def test_sigterm_ends_a_joined_server(lines):
    with servers("sleep", lines) as processes:
        assert soon(lambda: sum(line.startswith("owners") for _, _, line in lines) == 3, 60)
        os.kill(processes.pids["edge-c"], signal.SIGTERM)
        gone = "server edge-c has ended or cannot be reached any more"
        named = {(name, "stderr", f"server {name}: {gone}") for name in NAMES[:2]}
        assert soon(lambda: named <= {*lines}, 10)
        with pytest.raises(ServerFailed, match="server edge-c ended with signal SIGTERM"):
            processes.wait(20)


def listening(port):
    """Addresses at which this machine listens on a port, as the kernel writes them; of IPv4 in IPv6 the IPv4 part."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and int(address.rpartition(":")[2], 16) == port:
                found.append(address.rpartition(":")[0].removeprefix("0000000000000000FFFF0000"))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's table of sockets")
def test_the_store_listens_where_the_servers_meet_and_nowhere_else(lines):
    with servers("sleep", lines) as processes:
        assert soon(lambda: sum(line.startswith("owners") for _, _, line in lines) == 3, 90)
        met = next(line for _, _, line in lines if "meets the others at 127.0.0.1 port" in line)
        assert listening(int(met.split(" port ")[1].split(",")[0])) == ["0100007F"]
        assert len(processes.pids) == 3


def test_a_killed_first_server_is_named_and_aborts_nobody(lines):
    """JAX's own service would end with it, and abort the others at once; here they have seconds to end by themselves."""
    with servers("sleep", lines) as processes:
        assert soon(lambda: sum(line.startswith("owners") for _, _, line in lines) == 3, 60)
        os.kill(processes.pids["edge-a"], signal.SIGKILL)
        gone = "server edge-a has ended or cannot be reached any more"
        named = {(name, "stderr", f"server {name}: {gone}") for name in NAMES[1:]}
        assert soon(lambda: named <= {*lines}, 10)
        time.sleep(1.0)
        assert all(alive(processes.pids[name]) for name in NAMES[1:])
        assert not [
            line for _, stream, line in lines if stream == "stderr" and "has ended" not in line and "meets" not in line
        ]
        with pytest.raises(ServerFailed, match="server edge-a ended with signal SIGKILL"):
            processes.wait(20)


@pytest.mark.parametrize("victim", NAMES[:2])
def test_a_server_lost_in_a_step_is_one_line_of_each_other_one_and_they_end(lines, victim):
    """Nobody is aborted, and no step's failure is explained at length."""
    with servers("steps", lines) as processes:
        assert soon(lambda: sum(line.startswith("sum") for _, _, line in lines) == 3, 90)
        said = len(lines)
        os.kill(processes.pids[victim], signal.SIGKILL)
        others = [name for name in NAMES if name != victim]
        assert soon(lambda: not any(alive(processes.pids[name]) for name in others), 10)
        with pytest.raises(ServerFailed, match=f"server {victim} ended with signal SIGKILL"):
            processes.wait(20)
        gone = f"server {victim} has ended or cannot be reached any more"
        assert sorted(lines[said:]) == [(name, "stderr", f"server {name}: {gone}") for name in others]
        assert [processes._running[name].returncode for name in others] == [1, 1]
