"""`python -m launch calibrate`: what the links and devices of a cluster really give, as a cluster file for the planner."""

import argparse
import itertools
import logging
import sys
from pathlib import Path

from dancemoe_jax.checkpoint.bundled import bundled_model
from dancemoe_jax.checkpoint.families import read_config
from launch.cluster.addresses import coordinator_address
from launch.cluster.fingerprint import folder_fingerprint
from launch.cluster.join import join
from launch.cluster.launchers import from_environment
from launch.cluster.measure import Measured, measure
from launch.cluster.secret import load_secret
from launch.cluster.start_all import run_everywhere
from placement import Cluster, InputError
from placement.files import write_bytes

log = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> int:
    """Measure on all servers at once; the first writes the file.

    Raises:
        InputError, ModelError: the cluster file or the model cannot be used, or the file cannot be written.
    """
    cluster, path = Cluster.from_toml(args.cluster), args.model or bundled_model()
    config = read_config(path)
    if not args.out.parent.is_dir():
        raise InputError(f"--out {args.out}: its folder does not exist")
    found = None if args.server else from_environment(cluster)
    if found:
        args.server, args.coordinator = found
    secret = load_secret(args.secret_file)
    if not args.server:
        return run_everywhere("calibrate", cluster, sys.argv[2:], args.coordinator, as_json=args.log_json)
    coordinator = args.coordinator or coordinator_address(cluster)
    agree = {"model": folder_fingerprint(path)}
    with join(
        cluster,
        args.server,
        coordinator=coordinator,
        agree=agree,
        timeout=args.timeout,
        secret=secret,
    ) as devices:
        measured = measure(cluster, devices, path, config, cluster.names.index(args.server))
        if args.server == cluster.names[0]:
            write_bytes(args.out, cluster_text(cluster, measured).encode())
            _report(cluster, measured, args.out)
    return 0


def cluster_text(cluster: Cluster, measured: Measured) -> str:
    """The cluster file with measured links and devices."""
    lines, device = ["# measured by python -m launch calibrate", ""], 0
    for index, server in enumerate(cluster.servers):
        lines += ["[[server]]", f'name = "{server.name}"']
        lines += [f'host = "{server.host}"'] if server.host else []
        lines.append("devices = [")
        for own in server.devices:
            load = measured.load_bandwidth[index] / len(server.devices)
            lines.append(
                f'  {{ memory = {own.memory}, load_bandwidth = "{load / 1e6:.1f}MB/s", speed = {measured.speed[device]:.3f} }},'
            )
            device += 1
        lines += ["]", ""]
    for a, b in itertools.combinations(range(len(cluster.names)), 2):
        lines += [
            "[[link]]",
            f'from = "{cluster.names[a]}"',
            f'to = "{cluster.names[b]}"',
            "both = true",
            f'bandwidth = "{8 * measured.bandwidth[a, b] / 1e6:.1f}Mbps"',
            f'latency = "{1e3 * measured.latency[a, b]:.3f}ms"',
            "",
        ]
    return "\n".join(lines)


def _report(cluster: Cluster, measured: Measured, out: Path) -> None:
    for a, b in itertools.combinations(range(len(cluster.names)), 2):
        log.info(
            "%s - %s: %.3f ms, %.0f Mbit/s",
            cluster.names[a],
            cluster.names[b],
            1e3 * measured.latency[a, b],
            8 * measured.bandwidth[a, b] / 1e6,
        )
    for index, name in enumerate(cluster.names):
        speeds = ", ".join(f"{speed:.2f}" for speed in measured.speed[cluster.device_server == index])
        log.info("%s: speed %s, reads %.0f MB/s", name, speeds, measured.load_bandwidth[index] / 1e6)
    log.info("wrote %s", out)
