"""`python -m placement convert`: other engines' statistics and maps in, profiles, placements and their maps out."""

import argparse
import json
from typing import Any

import numpy as np

from placement.commands.inputs import add_cluster, add_json
from placement.data.cluster import Cluster
from placement.data.model_shapes import BITS, ModelShape
from placement.data.placement import Placement
from placement.engines import convert
from placement.engines.maps import ExpertMap
from placement.engines.recording import Recording
from placement.files import InputError, is_name, show
from placement.units import parse_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_cluster(parser, required=False)
    add_json(parser)
    add("inputs", nargs="+", metavar="FILE", help="recorder's dumps or folder, requests, or a map")
    add(
        "--from",
        dest="source",
        choices=convert.SOURCES,
        metavar="F",
        help=f"{', '.join(convert.SOURCES)}; default: by file",
    )
    add(
        "--to", dest="target", choices=convert.TARGETS, metavar="T", help=f"{', '.join(convert.TARGETS)}; default: ours"
    )
    add("--out", required=True, metavar="NEW", help="file to write")
    add("--model", metavar="CONFIG", help="config.json of the model, or its folder")
    add("--dtype", choices=BITS, metavar="D", help=f"type of the experts: {', '.join(BITS)}; default: the model's")
    add("--servers", metavar="A,B,C", help="names of the servers, in rank order, instead of a cluster")
    add("--ranks-per-server", metavar="N,N", help="ranks, or files, of each server; one number for all")
    what = (
        "rows of the profile are this field of requests, such as task, not their server; `mix` makes servers of tasks"
    )
    add("--by", metavar="FIELD", help=what)
    add("--name", metavar="M", help="name of the model")
    for flag, what in (("top-k", "experts per token"), ("hidden-size", "width of the activations")):
        add(f"--{flag}", type=_count, metavar="N", help=what)
    add("--experts", type=_count, metavar="N", help="experts per layer, where ids do not tell")
    add("--layers", type=_count, metavar="N", help="layers of bare int32 routing")
    add("--first-layer", type=int, default=0, metavar="I", help="index of the first layer with experts, for maps out")
    add("--expert-bytes", metavar="B", help='bytes of one expert, such as "17.3MB"')
    add(
        "--reserved-bytes", metavar="B", help="bytes per device for all but experts; default: the model's other weights"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 10 or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{show(text)} is no number from 1")
    return int(text)


def run(arguments: argparse.Namespace) -> None:
    """Read the files, write the target and print what it holds.

    Raises:
        InputError: an input cannot be used.
    """
    facts = _facts(arguments)
    kinds = {arguments.source or convert.detect(path) for path in arguments.inputs}
    if len(kinds) > 1:
        raise InputError(
            f"{arguments.inputs[0]}: files of several formats, {', '.join(sorted(kinds))}; convert them apart"
        )
    kind, target = kinds.pop(), arguments.target
    where = arguments.inputs[0] if len(arguments.inputs) == 1 else f"{arguments.inputs[0]} and others"
    found = convert.read(arguments.inputs, kind, facts, target)
    if target is None:
        if isinstance(found, Placement):
            raise InputError(
                f"{where}: is a placement already; name the engine with --to, one of {', '.join(convert.TARGETS[2:])}"
            )
        target = "profile" if isinstance(found, Recording) else "placement"
    if isinstance(found, Recording) != (target == "profile"):
        what, remedy = ("statistics", "profile") if isinstance(found, Recording) else ("a map", "placement")
        raise InputError(f"{where}: holds {what}; convert --to {remedy}, and plan on profiles to get maps")
    if isinstance(found, ExpertMap):
        facts.notes.extend(found.notes)
    if isinstance(found, Recording):
        profile = convert.to_profile(found, facts, where)
        profile.save(arguments.out)
        shape: dict[str, Any] = dict(zip(("servers", "layers", "experts"), profile.counts.shape, strict=True))
        shape |= {"servers": profile.servers, "assignments": float(profile.counts.sum())}
        shape |= {"tokens": 0 if profile.ids is None else len(profile.ids)}
    elif target == "placement" and isinstance(found, ExpertMap):
        placement = convert.to_placement(found, facts, where)
        placement.save(arguments.out)
        shape = _shape_of(placement.resident)
    else:
        if facts.cluster is not None and isinstance(found, Placement):
            found.validate(facts.cluster)
        experts = convert.to_map(found, facts, where)
        convert.write_map(experts, target, arguments.out, facts, where)
        shape = _shape_of(experts.resident)
        if isinstance(found, Placement):
            facts.notes.append(
                "ranks in order: " + show(" ".join(f"{s}/{d}" for s, d in found.devices), 200).strip("'")
            )
    if arguments.json:
        print(json.dumps({"out": arguments.out, "from": kind, "to": target, **shape, "notes": facts.notes}))
        return
    words = ", ".join(f"{number:,.10g} {key}" for key, number in shape.items() if key != "servers")
    words += f", servers {', '.join(shape['servers'])}" if "servers" in shape else ""
    print(f"{arguments.out}: {target} from {kind}: {words}")
    for note in facts.notes:
        print(f"note: {note}")


def _shape_of(resident: np.ndarray) -> dict[str, Any]:
    shape = dict(zip(("devices", "layers", "experts"), resident.shape, strict=True))
    return {**shape, "copies": int(resident.sum())}


def _facts(arguments: argparse.Namespace) -> convert.Facts:
    """What the flags say."""
    sizes = {}
    for key in ("expert_bytes", "reserved_bytes"):
        value, flag = getattr(arguments, key), f"--{key.replace('_', '-')}"
        if value is not None:
            value = int(value) if value.isdecimal() and len(value) < 20 else value
            sizes[key] = 0 if value == 0 and key == "reserved_bytes" else parse_bytes(value, flag)
    widths = None
    if arguments.ranks_per_server is not None:
        parts = arguments.ranks_per_server.split(",")
        if not all(part.strip().isdecimal() and len(part) < 20 and 0 < int(part) < 10**5 for part in parts):
            raise InputError(f"--ranks-per-server = {show(arguments.ranks_per_server)}: must be numbers, such as 1,1,2")
        widths = tuple(int(part) for part in parts)
    servers = None
    if arguments.servers is not None:
        servers = tuple(name.strip() for name in arguments.servers.split(","))
        if not all(map(is_name, servers)) or len(set(servers)) < len(servers):
            raise InputError(f"--servers = {show(arguments.servers)}: must be different names, such as a,b,c")
        if arguments.cluster is not None:
            raise InputError("--servers: --cluster names the servers already; give one of the two")
    if arguments.by is not None and arguments.cluster is not None:
        raise InputError(
            "--cluster: names servers, and with --by rows are not servers; leave it out, and `mix` afterwards"
        )
    if not 0 <= arguments.first_layer < 10**5:
        raise InputError(f"--first-layer = {arguments.first_layer}: must be an index from 0")
    return convert.Facts(
        shape=ModelShape.from_config(arguments.model, arguments.dtype) if arguments.model else None,
        cluster=Cluster.from_toml(arguments.cluster) if arguments.cluster else None,
        servers=servers,
        ranks_per_server=widths,
        first_layer=arguments.first_layer,
        **{key: getattr(arguments, key) for key in ("name", "top_k", "hidden_size", "experts", "layers", "by")},
        **sizes,
    )
