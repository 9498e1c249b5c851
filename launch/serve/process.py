"""Be one server of a cluster: what the flags of `serve` say, put together. Loads JAX; `launch.commands.serve` does not."""

import argparse
from pathlib import Path
from typing import BinaryIO

import jax.numpy as jnp

from dancemoe_jax.errors import DanceMoEError
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.text.grammar import Grammars
from dancemoe_jax.text.tokenizer import load_tokenizer_bundle
from launch.cluster.addresses import coordinator_address
from launch.cluster.compile_cache import use_compile_cache
from launch.cluster.fingerprint import folder_fingerprint
from launch.elastic.process_group import ProcessGroup
from launch.engine.memory import alone
from launch.migration.record import open_state, read_record
from launch.serve.drain import Drain
from launch.serve.front_link import FrontLink
from launch.serve.json_lines import Feeder
from launch.serve.requests import RequestMaker
from launch.serve.server import Server
from placement import Cluster, InputError, Placement
from placement.migration.decide import Policy

_PATIENCE_S = 20.0  # for the port where the last worker of the first server met the others
_ANSWER_S = 10.0  # for the last answers to be written, once serving has ended


def serve(
    args: argparse.Namespace,
    cluster: Cluster | None,
    path: Path,
    config: ModelConfig,
    placed: Placement | None,
    policy: Policy,
    lines: BinaryIO | None,
) -> int:
    """Be one server; the exit status.

    Args:
        cluster: None is a server alone, with room for the whole model.
        lines: requests; None where they come from a front door (`args.front_door`).
    """
    use_compile_cache(args.compile_cache)
    sizes = {"int8": args.int8, "kv_cache": args.kv_cache}
    if cluster is None:
        cluster = alone(config, args.sequences, itemsize=jnp.dtype(args.dtype).itemsize, **sizes)
        args.server = cluster.names[0]
    source = _source(args, path, config, lines)
    facts = facts_of(args, path, config, policy)
    state = open_state(args.state) if args.state and args.server == cluster.names[0] else None
    record = read_record(state) if state else None
    drain = Drain(args.server, args.drain, source.close, lambda: source.pending)
    server = Server(
        args.server,
        path,
        config,
        {"dtype": args.dtype, "sequences": args.sequences, **sizes},
        args.max_step_tokens,
        args.wide_prefill,
        args.kernels,
        facts,
        args.secret,
        args.timeout,
        policy if args.state else None,
        state,
        *(source.start, source.take_in, drain, source.settle),
    )
    if isinstance(source, FrontLink):
        server.phase, server.failed_step, server.patience = source.phase, source.failed_step, _PATIENCE_S
        server.watch = source.watch
    try:
        if args.join:
            server.join_serving(args.join, cluster)
        else:
            coordinator = args.coordinator or coordinator_address(cluster)
            given = folder_fingerprint(args.placement) if args.placement else "none"
            limits = record.limits if record else {}
            server.serve(ProcessGroup(cluster, coordinator, placed, limits=limits), given, record)
    except (InputError, DanceMoEError) as error:
        if isinstance(source, FrontLink):
            source.end_because(str(error))
        raise
    source.settle(_ANSWER_S)
    if source.problem:
        return 1
    return 128 + drain.cancelled if drain.cancelled else 0


def _source(args: argparse.Namespace, path: Path, config: ModelConfig, lines: BinaryIO | None) -> Feeder | FrontLink:
    if lines is None:
        return FrontLink(args.front_door, args.secret, Grammars(lambda: load_tokenizer_bundle(path, config), config))
    maker = RequestMaker(load_tokenizer_bundle(path, config), config)
    return Feeder(maker, lines, shared=args.requests not in (None, "-"), shares=not args.join)


def facts_of(args: argparse.Namespace, path: Path, config: ModelConfig, policy: Policy) -> dict[str, str]:
    """What every server has to serve with too, fingerprints by what they are of."""
    how = args.sequences, args.kv_cache, args.max_step_tokens, args.wide_prefill, args.dtype, args.int8, args.kernels
    flags = (*how, config, policy, bool(args.state))
    return {"model": folder_fingerprint(path), "flags": repr(flags)}
