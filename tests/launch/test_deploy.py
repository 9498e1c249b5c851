"""What starts servers elsewhere: manifests fit the published schemas, and the commands in them are ones of ours."""

import argparse
import configparser
import re
import shlex
import socket
import subprocess
import tomllib
from typing import Any

import kubernetes_validate
import pytest
import yaml

from launch import arguments
from launch.cluster.launchers import from_environment
from launch.cluster.secret import load_secret
from launch.http.access import Access
from placement import Cluster
from tests.helpers.paths import ROOT

DEPLOY = ROOT / "launch" / "deploy"
KUBERNETES = "1.31"


def flags_of(given: list[str]) -> argparse.Namespace:
    """What `python -m launch serve` makes of flags; it ends on one that it does not know."""
    parser = argparse.ArgumentParser()
    arguments.serve(parser)
    return parser.parse_args(given)


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


@pytest.fixture(scope="module")
def pods(documents) -> dict[str, Any]:
    (found,) = [document for document in documents if document["kind"] == "StatefulSet"]
    return found


def test_each_document_fits_its_published_schema(documents):
    for document in documents:
        assert kubernetes_validate.validate(document, KUBERNETES, strict=True) == KUBERNETES
    broken = {**documents[-1], "spec": {**documents[-1]["spec"], "replica": 3}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


def test_the_mounted_secret_draws_no_warning(pods, tmp_path, caplog):
    (volume,) = [v for v in pods["spec"]["template"]["spec"]["volumes"] if "secret" in v]
    file = tmp_path / "secret"
    file.write_text("x" * 32)
    file.chmod(volume["secret"]["defaultMode"])
    assert load_secret(file)
    assert Access(file, None)
    assert caplog.records == []


def test_pods_are_the_servers_of_the_cluster_file(documents, pods, monkeypatch):
    cluster = Cluster.from_dict(tomllib.loads(documents[0]["data"]["cluster.toml"]), source="cluster.toml")
    spec = pods["spec"]
    name, service = pods["metadata"]["name"], spec["serviceName"]
    assert [server.host for server in cluster.servers] == [f"{name}-{i}.{service}" for i in range(spec["replicas"])]
    assert spec["podManagementPolicy"] == "Parallel"  # each waits for the others
    (headless,) = [d for d in documents if d["kind"] == "Service" and d["metadata"]["name"] == service]
    assert headless["spec"]["clusterIP"] == "None"
    assert headless["spec"]["publishNotReadyAddresses"]  # none is ready before all have met
    for label in (
        spec["selector"]["matchLabels"],
        *(d["spec"]["selector"] for d in documents if d["kind"] == "Service"),
    ):
        assert label.items() <= spec["template"]["metadata"]["labels"].items()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    for i, server in enumerate(cluster.names):
        monkeypatch.setattr(socket, "gethostname", lambda i=i: f"{name}-{i}")
        assert from_environment(cluster) == (server, f"{name}-0.{service}:8476")


def test_a_pods_command_and_probes_are_ours(documents, pods):
    pod = pods["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "launch", "serve"]
    flags = flags_of(container["args"])
    port = container["ports"][0]["containerPort"]
    assert flags.http == f"0.0.0.0:{port}"
    assert pod["terminationGracePeriodSeconds"] > flags.drain + 10
    assert container["livenessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "http"}
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    for file in (flags.cluster, str(flags.tokens), str(flags.secret_file), f"{flags.compile_cache}/x", "/tmp/x"):
        assert file.rpartition("/")[0] in mounts
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert "cluster.toml" in documents[0]["data"]


def test_the_slurm_script_starts_a_task_for_each_server():
    file = DEPLOY / "slurm.sh"
    subprocess.run(["bash", "-n", file], check=True)
    text = file.read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    assert (options["nodes"], options["ntasks-per-node"]) == ("3", "1")
    command = shlex.split(text[text.index("srun") :].replace("\\\n", ""))
    assert command[:6] == ["srun", "--kill-on-bad-exit=1", "python", "-m", "launch", "serve"]
    flags = flags_of([part for part in command[6:] if part != "$@"])
    signal, seconds = options["signal"].split("@")
    assert signal == "TERM"
    assert int(seconds) > flags.drain
    assert flags.http == "0.0.0.0:8000"


def test_the_systemd_unit_runs_a_command_of_ours():
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment]  # names have capitals
    unit.read(DEPLOY / "dancemoe.service")
    service = unit["Service"]
    command = shlex.split(service["ExecStart"])
    assert command[:4] == ["/opt/dancemoe/bin/python", "-m", "launch", "serve"]
    flags = flags_of(command[4:])
    assert int(service["TimeoutStopSec"]) > flags.drain + 10
    assert service["LoadCredential"].partition(":")[0] == str(flags.tokens).removeprefix("%d/")
    assert service["Environment"] == f"XDG_CACHE_HOME=/var/cache/{service['CacheDirectory']}"
