"""Two processes on one card, as two servers: rows that cross between them, and what comes of them.

NCCL refuses two ranks on one card of one machine; told that they are on machines of their own (NCCL_HOSTID), it joins them
by sockets. Slow, but the programs are those of two servers. Without a card the processes have a CPU device each, and Gloo.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dancemoe_jax.checkpoint.bundled import bundled_model
from dancemoe_jax.checkpoint.reader import ExpertFile
from dancemoe_jax.expert_parallel.pool import fill_pool, pool_layout
from dancemoe_jax.expert_parallel.tables import assign_slots, routing_tables
from dancemoe_jax.inference.generate import generate
from dancemoe_jax.inference.steps import Weights, place_decoder, place_tables
from dancemoe_jax.mesh import make_mesh
from placement.files import parse_json

RANKS = 2
_SECONDS = 180.0
_ROOT = Path(__file__).parents[3]


def texts_of_ranks(prompts: list[list[int]], tokens: int, platform: str) -> list[list[int]]:
    """Greedy texts of the bundled model, every second expert of a layer in each of two processes.

    Args:
        platform: "cpu", or of the card that both share.

    Raises:
        RuntimeError: a process failed; the message is the end of what it printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    job = json.dumps({"address": address, "prompts": prompts, "tokens": tokens})
    running = []
    for rank in range(RANKS):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": platform if platform == "cpu" else "cuda",
            "NCCL_HOSTID": f"rank{rank}",
            "NCCL_SOCKET_IFNAME": "lo",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", __name__, str(rank), job]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, env=environment, **pipes))
    try:
        said = [process.communicate(timeout=_SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, error) in zip(running, said, strict=True):
        if process.returncode:
            raise RuntimeError(" ".join(error.split())[-300:])
    parts = [parse_json(output.strip().rpartition("\n")[2], "what a process printed") for output, _ in said]
    return [next(part[i] for part in parts if part[i]) for i in range(len(prompts))]


def serve(rank: int, address: str, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """One process of the two: the texts of its own prompts, and empty ones for the other's."""
    if os.environ["JAX_PLATFORMS"] == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, RANKS, rank, local_device_ids=[0])
    file, mesh = ExpertFile(bundled_model()), make_mesh()
    config = file.config
    held = np.arange(config.num_experts) % RANKS == np.arange(RANKS)[:, None]
    resident = np.repeat(held[:, None], config.num_moe_layers, axis=1)
    layout = pool_layout([int(own.sum()) for own in resident], range(RANKS))
    slots = assign_slots(layout, resident)
    pool = fill_pool(mesh, layout, slots, file.read)
    tables = place_tables(routing_tables(layout, slots), mesh)
    weights = Weights(place_decoder(file.decoder(), mesh), pool, tables)
    return generate(weights, prompts, tokens, config=config, layout=layout, mesh=mesh)


if __name__ == "__main__":
    _own, _job = int(sys.argv[1]), parse_json(sys.argv[2], "job")
    print(json.dumps(serve(_own, **_job)))
    jax.distributed.shutdown()
