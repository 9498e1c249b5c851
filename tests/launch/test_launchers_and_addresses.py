"""Which machine and which server this is: names, IPv4 and IPv6, several networks, and launchers' variables."""

import json
import socket
import subprocess
import sys

import pytest

from launch.cluster.addresses import free_port, is_here, join_address, listen, next_address, resolve, source_address
from launch.cluster.launchers import from_environment
from launch.cluster.start_all import _here
from placement import Cluster, InputError
from tests.helpers.paths import ROOT

NAMES = ("edge-a", "edge-b", "edge-c")


def cluster_of(*hosts, names=NAMES):
    servers = [
        {"name": name, "devices": [{"memory": "1GB"}], **({"host": host} if host else {})}
        for name, host in zip(names, hosts or (None,) * len(names), strict=False)
    ]
    return Cluster.from_dict({"server": servers}, source="cluster.toml")


def has_ipv6():
    try:
        listen("::1", 0, "test").close()
    except (InputError, OSError):
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "localhost", "127.0.0.1:8480", socket.gethostname()])
def test_this_machine_is_known_by_all_its_names(host):
    assert _here(cluster_of(host), host)


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize("host", ["::1", "[::1]:8479"])
def test_this_machine_is_known_by_ipv6(host):
    assert _here(cluster_of(host), host)


def test_other_machines_are_not_this_one():
    for host in ("192.0.2.7", "192.0.2.7:8476", "2001:db8::1"):  # reserved for documentation
        assert not _here(cluster_of(host), host)


def test_a_name_that_leads_nowhere_is_one_line():
    for call in (
        lambda: is_here("no-such.invalid", "cluster.toml: host"),
        lambda: resolve("a" * 300, 1, "cluster.toml: host"),
    ):
        with pytest.raises(InputError, match=r"cluster\.toml: host: .* is not known here") as refused:
            call()
        assert "\n" not in str(refused.value)


def test_an_address_of_another_machine_cannot_be_listened_at():
    with pytest.raises(InputError, match=r"server a: 192\.0\.2\.7 is no address of this machine; give one that it has"):
        listen("192.0.2.7", 0, "server a")


def test_the_own_address_is_that_of_the_network_that_leads_there():
    assert source_address("127.0.0.1", 9, "server a") == "127.0.0.1"
    if has_ipv6():
        assert source_address("::1", 9, "server a") == "::1"


def test_the_next_address_is_on_the_same_host():
    host, port = "127.0.0.1", free_port()
    with listen(host, port, "test"):
        assert next_address(join_address(host, port)).startswith(f"{host}:")
        assert int(next_address(join_address(host, port)).rpartition(":")[2]) > port


SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_NODELIST": "gpu[03-05]",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "3",
}


def environment(monkeypatch, values):
    for name in (
        *SLURM,
        "SLURM_STEP_NUM_TASKS",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "JOB_COMPLETION_INDEX",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_a_job_step_of_as_many_tasks_tells_the_server(monkeypatch):
    environment(monkeypatch, SLURM)
    assert from_environment(cluster_of()) == ("edge-c", f"gpu03:{65535 - 2**12 + 1 + 1234}")
    for nodes, first in (("gpu07", "gpu07"), ("gpu07,login", "gpu07"), ("gpu[007,9-12],x", "gpu007")):
        monkeypatch.setenv("SLURM_STEP_NODELIST", nodes)
        assert from_environment(cluster_of())[1].startswith(f"{first}:")


def test_a_shell_inside_a_job_is_no_job_step(monkeypatch):
    environment(monkeypatch, {**SLURM, "SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "gpu07", "SLURM_PROCID": "0"})
    assert from_environment(cluster_of()) is None
    environment(monkeypatch, {"SLURM_JOB_ID": "1234", "SLURM_NTASKS": "3"})  # a batch script, before srun
    assert from_environment(cluster_of()) is None


def test_other_numbers_of_tasks_are_refused(monkeypatch):
    environment(monkeypatch, {**SLURM, "SLURM_STEP_NUM_TASKS": "4"})
    with pytest.raises(InputError, match="3 servers, but 4 tasks were started by SLURM"):
        from_environment(cluster_of())
    environment(monkeypatch, {**SLURM, "SLURM_PROCID": "x"})
    with pytest.raises(InputError, match="SLURM_PROCID = 'x': must be a number"):
        from_environment(cluster_of())


def test_open_mpi_tells_the_server(monkeypatch):
    ranks = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "1"}
    environment(monkeypatch, ranks)
    assert from_environment(cluster_of("10.0.0.1", "10.0.0.2", "10.0.0.3")) == ("edge-b", "10.0.0.1:8476")
    uri = "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"
    environment(monkeypatch, {**ranks, "OMPI_MCA_orte_hnp_uri": uri})
    assert from_environment(cluster_of())[1].startswith("10.96.0.1:")


def test_kubernetes_tells_the_server(monkeypatch):
    pods = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    hosts = cluster_of("moe-0.moe", "moe-1.moe", "moe-2.moe")
    environment(monkeypatch, {**pods, "JOB_COMPLETION_INDEX": "1"})
    assert from_environment(hosts) == ("edge-b", "moe-0.moe:8476")
    with pytest.raises(InputError, match=r"server\[0\]\.host is missing"):
        from_environment(cluster_of())
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    with pytest.raises(InputError, match="3 servers, but 4 tasks"):
        from_environment(hosts)
    environment(monkeypatch, pods)
    monkeypatch.setattr(socket, "gethostname", lambda: "moe-2")
    assert from_environment(hosts) == ("edge-c", "moe-0.moe:8476")
    monkeypatch.setattr(socket, "gethostname", lambda: "web-6d5f7-x2x9z")  # a pod of something else
    assert from_environment(hosts) is None


@pytest.mark.slow
@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_a_cluster_serves_over_ipv6(tmp_path):
    cluster, requests = tmp_path / "cluster.toml", tmp_path / "requests.jsonl"
    port = free_port("::1")
    servers = "".join(
        f'[[server]]\nname = "{name}"\nhost = "[::1]:{port}"\ndevices = [{{ memory = "40MB" }}]\n' for name in NAMES[:2]
    )
    cluster.write_text(servers)
    requests.write_text('{"id": 1, "server": "edge-b", "prompt": "import", "max_tokens": 2}\n')
    flags = ["--requests", str(requests), "--context", "96", "--sequences", "2", "--max-step-tokens", "16"]
    command = [sys.executable, "-m", "launch", "serve", "--cluster", str(cluster), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["finish_reason"] == "length"
    assert f"edge-b: meets the others at ::1 port {port}, is reached at ::1" in done.stderr
