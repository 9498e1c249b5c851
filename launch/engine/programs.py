"""Steps as compiled for cards, before a server serves: do they fit what is reserved, do all servers exchange in one order?"""

import hashlib
import logging
import re
from typing import Any

import jax

from launch.cluster.channel import Channel, open_channel
from launch.engine.engine import Engine
from launch.engine.memory import workspace_bytes
from placement import InputError

log = logging.getLogger(__name__)

_COLLECTIVE = re.compile(r"= (\S.*?) ((?:ragged-)?all-[a-z-]+|collective-[a-z-]+|reduce-scatter[a-z-]*)\(")
_WAIT_S = 600.0


def check_programs(engine: Engine, names: tuple[str, ...] = ()) -> None:
    """Compile an engine's steps for its cards and compare them. All processes call it together; on CPUs it does nothing.

    Args:
        names: of the servers, for errors; default: their numbers.

    Raises:
        InputError: a step needs more memory beside weights and cache than is reserved, or a server's program exchanges
            in another order, which would have servers wait for each other without end.
    """
    if engine.mesh.devices.flat[0].platform == "cpu":
        return
    compiled = engine.compiled()
    itemsize = engine.weights.decoder.embedding[...].dtype.itemsize
    reserved = workspace_bytes(engine.config, engine.batch_slots, itemsize, engine.chunk)
    for kind, program in compiled.items():
        needed = program.memory_analysis().temp_size_in_bytes
        log.info("%s: %d bytes beside weights and cache, %d are reserved", kind, needed, reserved)
        if needed > reserved:
            raise InputError(
                f"{kind}: needs {needed} bytes beside weights and cache, {reserved} are reserved; "
                "serve fewer sequences, or a shorter chunk, and tell us of the model"
            )
    orders = {kind: order_of_collectives(program.as_text()) for kind, program in compiled.items()}
    compare_orders(orders, open_channel("collectives/"), jax.process_index(), jax.process_count(), names)


def order_of_collectives(text: str) -> str:
    """Fingerprint of the collectives of a program, in the order in which it runs them."""
    found = [" ".join(match) for match in _COLLECTIVE.findall(text)]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def compare_orders(orders: dict[str, str], channel: Channel, index: int, count: int, names: tuple[str, ...]) -> None:
    """Raise InputError on every server where one's programs exchange in another order than the first's."""
    own = " ".join(f"{kind}={order}" for kind, order in sorted(orders.items())).encode()
    channel.put(f"{index}", own)
    seen: list[Any] = [channel.get(f"{other}", _WAIT_S) for other in range(count)]
    strange = [names[other] if names else f"server {other}" for other in range(count) if seen[other] != seen[0]]
    if strange:
        raise InputError(
            f"{', '.join(strange)}: its steps exchange in another order than the first server's; use the same kind of card "
            "and driver on all, or set XLA_FLAGS=--xla_gpu_autotune_level=0 on all"
        )
