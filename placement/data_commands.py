"""The commands about inputs and outputs: convert, drift, model. Only arguments, files and words; see `__main__`."""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from placement import convert
from placement.engine_maps import ExpertMap
from placement.files import InputError, show
from placement.model_shapes import BITS, ModelShape
from placement.placement import Placement
from placement.profile import Profile
from placement.recording import Recording
from placement.statistics import drift
from placement.types import Cluster
from placement.units import format_bytes, parse_bytes

PrintTable = Callable[[Sequence[str], Sequence[Sequence[str]]], None]
# Mean divergences, in bits, from which servers or windows are called unlike, and clearly so; chance is taken off first.
# Mixtral's subjects differ by 0.008 (source-aware plans gain a few per cent), DeepSeek-V2-Lite's domains by 0.17.
_UNLIKE, _CLEARLY = 0.02, 0.08


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Arguments of convert."""
    add = parser.add_argument
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
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)


def run_convert(arguments: argparse.Namespace) -> None:
    """convert: other engines' statistics and maps in, profiles, placements and their maps out."""
    facts = _facts(arguments)
    kinds = {arguments.source or convert.detect(path) for path in arguments.inputs}
    if len(kinds) > 1:
        raise InputError(
            f"{arguments.inputs[0]}: files of several formats, {', '.join(sorted(kinds))}; convert them apart"
        )
    kind, target = kinds.pop(), arguments.target
    where = arguments.inputs[0] if len(arguments.inputs) == 1 else f"{arguments.inputs[0]} and others"
    found = convert.read(arguments.inputs, kind, facts, as_map=target not in (None, "profile"))
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
            value = int(value) if value.isdecimal() else value
            sizes[key] = 0 if value == 0 and key == "reserved_bytes" else parse_bytes(value, flag)
    widths = None
    if arguments.ranks_per_server is not None:
        parts = arguments.ranks_per_server.split(",")
        if not all(part.strip().isdecimal() and 0 < int(part) < 10**5 for part in parts):
            raise InputError(f"--ranks-per-server = {show(arguments.ranks_per_server)}: must be numbers, such as 1,1,2")
        widths = tuple(int(part) for part in parts)
    servers = None
    if arguments.servers is not None:
        servers = tuple(name.strip() for name in arguments.servers.split(","))
        if "" in servers or len(set(servers)) < len(servers):
            raise InputError(f"--servers = {show(arguments.servers)}: must be different names, such as a,b,c")
        if arguments.cluster is not None:
            raise InputError("--servers: --cluster names the servers already; give one of the two")
    if not 0 <= arguments.first_layer < 10**5:
        raise InputError(f"--first-layer = {arguments.first_layer}: must be an index from 0")
    return convert.Facts(
        shape=ModelShape.from_config(arguments.model, arguments.dtype) if arguments.model else None,
        cluster=Cluster.from_toml(arguments.cluster) if arguments.cluster else None,
        servers=servers,
        ranks_per_server=widths,
        first_layer=arguments.first_layer,
        **{key: getattr(arguments, key) for key in ("name", "top_k", "hidden_size", "experts", "layers")},
        **sizes,
    )


def load_profile(path: str, model: str | None) -> Profile:
    """A profile, with what its `meta` lacks from a model's config.json.

    Raises:
        InputError: it is of another model than the configuration.
    """
    if model is None:
        return Profile.load(path)
    shape = ModelShape.from_config(model)
    facts = {
        "model": shape.name,
        **{key: getattr(shape, key) for key in ("top_k", "experts", "hidden_size", "expert_bytes")},
    }
    profile = Profile.load(path, {**facts, "reserved_bytes": shape.other_bytes})
    mine = {"layers": profile.counts.shape[1], "experts": profile.counts.shape[2], "top_k": profile.top_k}
    for key, value in {**mine, "hidden_size": profile.hidden_size}.items():
        expected = len(shape.layers) if key == "layers" else getattr(shape, key)
        if value != expected:
            raise InputError(f"{path}: {key} = {value}, but {model} has {expected}; use the profile's own model")
    return profile


def add_drift(parser: argparse.ArgumentParser) -> None:
    """Arguments of drift."""
    parser.add_argument("--profile", required=True, metavar="A", help="profile.npz")
    parser.add_argument("--against", metavar="B", help="profile.npz of another window")


def run_drift(arguments: argparse.Namespace, print_table: PrintTable) -> None:
    """drift: how unlike the servers are, and how far they moved."""
    profile = Profile.load(arguments.profile)
    other = Profile.load(arguments.against) if arguments.against else None
    if other is not None:
        pairs = [("servers", profile.servers, other.servers), ("model", profile.model, other.model)]
        pairs.append(("layers and experts", profile.counts.shape[1:], other.counts.shape[1:]))
        for key, mine, theirs in pairs:
            if mine != theirs:
                found = f"{key} = {show(mine)}, but {other.source} has {show(theirs)}"
                raise InputError(f"{profile.source}: {found}; compare two windows of the same servers and model")
    found = drift(profile.counts, None if other is None else other.counts)
    sentences = _interpretation(profile, found)
    if arguments.json:
        values = {key: _plain(value) for key, value in found.items()}
        print(json.dumps({"servers": profile.servers, "layers": profile.counts.shape[1], **values, "says": sentences}))
        return
    print(
        f"{arguments.profile}: Jensen-Shannon divergence in bits, mean over {profile.counts.shape[1]} layers; 0 is the same"
    )
    rows = [[name, *map(_bits, row)] for name, row in zip(profile.servers, found["between_servers"], strict=True)]
    print_table(["between servers", *profile.servers], rows)
    if other is not None:
        keys = ("between_windows_mean", "between_windows_by_chance")
        layers = [np.nan if np.isnan(row).all() else np.nanmax(row) for row in found["between_windows"]]
        columns = zip(profile.servers, found[keys[0]], found[keys[1]], layers, strict=True)
        print()
        print_table(
            [f"against {other.source}", "moved", "by chance", "most in a layer"],
            [[name, *map(_bits, values)] for name, *values in columns],
        )
    print()
    for sentence in sentences:
        print(sentence)


def _bits(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"


def _plain(value: Any) -> Any:
    """Arrays as lists, NaN as None: JSON has neither."""
    if isinstance(value, np.ndarray) and value.ndim:
        return [_plain(row) for row in value]
    return None if np.isnan(value) else float(value)


def _interpretation(profile: Profile, found: dict[str, Any]) -> list[str]:
    """One plain sentence for servers, one for windows."""
    sentences = []
    off = ~np.eye(len(profile.servers), dtype=bool)
    known = off & ~np.isnan(found["between_servers"])
    if not known.any():
        sentences.append("Fewer than two servers have counts: whether they differ cannot be told.")
    else:
        mean, chance = (found[key][known].mean() for key in ("between_servers", "between_servers_by_chance"))
        own, others = found["own_top_quarter"], found["others_top_quarter"]
        words = f"Servers differ by {mean:.3f} bits ({chance:.3f} by chance); a server's top quarter of experts serves "
        words += f"{own:.0%} of its own calls and {others:.0%} of another's: "
        if mean < 2 * chance:
            words += "too few counts to tell them apart; record longer."
        elif mean - chance < _UNLIKE:
            words += "they want nearly the same experts, so expect a few per cent from source-aware placement."
        elif mean - chance < _CLEARLY:
            words += "they are somewhat unlike, so source-aware placement helps a little."
        else:
            words += "they are clearly unlike, so source-aware placement helps."
        sentences.append(words)
    if "between_windows_mean" in found:
        moved = found["between_windows_mean"] - found["between_windows_by_chance"]
        if np.isnan(moved).all():
            sentences.append("No server has counts in both windows: whether they moved cannot be told.")
            return sentences
        most = int(np.nanargmax(moved))
        words = f"Between the windows {profile.servers[most]} moved most, by {found['between_windows_mean'][most]:.3f} bits: "
        if moved[most] < _UNLIKE:
            words += "statistics are stable, and a plan made on one window serves the other."
        else:
            words += (
                "its users want other experts now, so plan again."
                if moved[most] >= _CLEARLY
                else "a little; plan again soon."
            )
        sentences.append(words)
    return sentences


def add_model(parser: argparse.ArgumentParser) -> None:
    """Arguments of model."""
    parser.add_argument("config", metavar="CONFIG", help="config.json of a model, or its folder")
    parser.add_argument("--dtype", choices=BITS, metavar="D", help=f"type of the experts: {', '.join(BITS)}")


def run_model(arguments: argparse.Namespace, print_table: PrintTable) -> None:
    """model: shapes and sizes from a configuration."""
    shape = ModelShape.from_config(arguments.config, arguments.dtype)
    layers, number = len(shape.layers), len(shape.layers) * shape.experts
    sizes = {
        "expert_bytes": shape.expert_bytes,
        "all_experts_bytes": shape.expert_bytes * number,
        "other_bytes": shape.other_bytes,
        "total_bytes": shape.bytes,
    }
    parameters = (shape.expert_parameters, shape.expert_parameters * number, shape.other_parameters, shape.parameters)
    if arguments.json:
        keys = ("name", "family", "hidden_layers", "experts", "top_k", "hidden_size", "dtype", "parameters")
        head = {key: getattr(shape, key) for key in keys}
        more = {"expert_parameters": shape.expert_parameters, "other_parameters": shape.other_parameters}
        print(json.dumps({**head, "layers": layers, "layer_indices": shape.layers, **more, **sizes}))
        return
    print(f"{shape.name}: {shape.family}, {shape.parameters / 1e9:.1f} billion parameters")
    print(
        f"{layers} of {shape.hidden_layers} layers have {shape.experts} experts, {shape.top_k} for each token; hidden size "
        f"{shape.hidden_size}; experts in {shape.dtype}"
    )
    names = ("one expert", f"all {number} experts", "everything else", "the model")
    rows = [
        [name, f"{count:,}", f"{size:,}", format_bytes(size)]
        for name, count, size in zip(names, parameters, sizes.values(), strict=True)
    ]
    print_table(["", "parameters", "bytes", ""], rows)
