"""A job for a program on every server of a testbed: plans in, what every server measured out."""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.bench.harness.namespaces import Testbed, missing
from launch.bench.harness.trace import Trace
from launch.cluster.addresses import DEFAULT_PORT
from launch.cluster.processes import start
from placement import Cluster, InputError, Profile
from placement.costs.network_use import likely_links
from placement.costs.routing import serving_server
from placement.data.problem import Problem
from placement.files import parse_json

# A server with two devices beside servers with one, in the order of a trace's domains.
DEVICES = (1, 1, 2)


def testbed_cluster(trace: Trace, slots: int, expert_bytes: int, rate: float, storage: float | None) -> Cluster:
    """One server for each domain of a trace, the last with two devices, each of `slots` experts.

    Args:
        rate: bit/s of every server's link.
        storage: bytes/s of each server's storage, shared by its devices; None is a cluster file's default.
    """
    if len(trace.domains) != len(DEVICES):
        raise InputError(f"--trace: {trace.model} has {len(trace.domains)} domains; the testbed is of {len(DEVICES)}")

    def device(count: int) -> dict[str, Any]:
        rate_each = {} if storage is None else {"load_bandwidth": f"{storage / count:.0f}B/s"}
        return {"memory": slots * expert_bytes, **rate_each}

    servers = [
        {"name": name, "devices": [device(count)] * count} for name, count in zip(trace.domains, DEVICES, strict=True)
    ]
    network = {"bandwidth": f"{rate / 1e6:g}Mbps", "latency": "0.2ms"}
    return Cluster.from_dict({"server": servers, "network": network}, source="testbed")


def cluster_dict(cluster: Cluster) -> dict[str, Any]:
    """What `Cluster.from_dict` makes a testbed's cluster from."""
    return {
        "server": [
            {
                "name": server.name,
                "devices": [
                    {"memory": device.memory, "load_bandwidth": f"{device.load_bandwidth:.0f}B/s"}
                    for device in server.devices
                ],
            }
            for server in cluster.servers
        ],
        "network": {"bandwidth": f"{8 * cluster.bandwidth[0, 1] / 1e6:g}Mbps", "latency": "0.2ms"},
    }


def plan_arrays(name: str, resident: np.ndarray, profile: Profile, cluster: Cluster) -> dict[str, np.ndarray]:
    """A plan as the servers read it: what is where, whose copy serves whom, which rows go unasked."""
    problem = Problem.build(profile, cluster)
    serving = serving_server(problem, problem.held(resident))
    likely = likely_links(problem, serving)
    return {f"resident_{name}": resident, f"serving_{name}": serving, f"likely_{name}": likely}


def run_job(
    cluster: Cluster,
    rate: float,
    job: Mapping[str, Any],
    plans: Mapping[str, np.ndarray],
    progress: Callable[[str], None],
    program: str = "launch.bench.harness.replay_server",
) -> list[dict[str, dict[str, Any]]]:
    """What each server printed for each run of a job, by server.

    Args:
        rate: bit/s of every server's link, each way.
        job: trace, hidden_size, slots, sequences, chunk, runs; see `program`.
        progress: called with a line for each run that is done.
        program: module that each server runs.

    Raises:
        InputError: this machine cannot make a testbed.
        ServerFailed: a server ended with an error.
    """
    if reason := missing():
        raise InputError(reason)
    results: list[dict[str, dict[str, Any]]] = [{} for _ in job["runs"]]

    def output(server: str, stream: str, line: str) -> None:
        if stream == "stderr":
            print(f"{server}: {line}", file=sys.stderr)
        elif line.startswith("{"):
            found = parse_json(line, server)
            results[found["run"]][server] = found
            if len(results[found["run"]]) == len(cluster.names):
                progress(f"run {found['run'] + 1} of {len(results)}")

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="testbed-")))
        np.savez(folder / "plans.npz", allow_pickle=False, **plans)
        text = {**job, "cluster": cluster_dict(cluster), "plans": str(folder / "plans.npz")}
        (folder / "job.json").write_text(json.dumps(text), encoding="utf-8")
        bed = stack.enter_context(Testbed(cluster.names, rate))
        coordinator = f"{bed.addresses[cluster.names[0]]}:{DEFAULT_PORT}"
        commands = {name: _command(program, folder, name, coordinator) for name in cluster.names}
        environment = {"JAX_PLATFORMS": "cpu"}
        processes = stack.enter_context(start(commands, prefix=bed.prefix, env=environment, output=output))
        processes.wait()
    return results


def _command(program: str, folder: Path, name: str, coordinator: str) -> Sequence[str]:
    return [sys.executable, "-m", program, str(folder / "job.json"), name, coordinator]
