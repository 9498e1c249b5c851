"""`python -m placement advise`: will it be faster, what is in the way, what would help; before anything is installed."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

from placement.commands.advice import PARTS, cases, figures
from placement.commands.inputs import (
    add_cluster,
    add_json,
    add_prior,
    add_workload,
    check_plot,
    load_profile,
    read_workload,
)
from placement.data.cluster import Cluster
from placement.files import InputError, read_json
from placement.registry import HOSTED, strategy_names
from placement.simulation.lockstep.predict import StepCosts
from placement.text_table import print_table, print_text
from placement.units import format_bytes, parse_bytes

_WORDS = {
    "dense": "weights outside the experts, read for every token: faster memory, or smaller weights there",
    "experts": "reading and computing experts on the busiest device: int4 experts, or more and faster devices",
    "rounds": "exchanges, each a round trip however few its bytes: memory for more copies, or links of less latency",
    "bytes": "bytes between servers: faster links, or memory for more copies",
}
_STRATEGIES = "latency,exact,parallax"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="CONFIG", help="config.json of the model, or its folder; no weights are read")
    add_cluster(parser)
    add("--profile", metavar="P", help="profile.npz of the users (default: all experts are equally likely)")
    add("--strategies", default=_STRATEGIES, metavar="A,B", help=f"to choose from ({_STRATEGIES})")
    add("--cache", default="1GB", metavar="SIZE", help="of each device, for KV cache and workspace (default: 1GB)")
    what = "measured seconds of steps at home, as launch bench testbed --json prints them under costs (default: a roofline)"
    add("--costs", metavar="C.json", help=what)
    add("--plot", metavar="FILE.png", help="draw where a token's time goes")
    add_prior(parser)
    add_workload(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print what to expect, the bottleneck, and what would change it.

    Raises:
        InputError: an input cannot be used.
    """
    check_plot(arguments)
    cluster, work = Cluster.from_toml(arguments.cluster), read_workload(arguments)
    names = strategy_names(arguments.strategies)
    given = load_profile(arguments.profile, arguments.model) if arguments.profile else None
    if given is not None and given.servers != cluster.names:
        raise InputError(
            f"{given.source}: servers = {', '.join(given.servers)}, but {cluster.source} has {', '.join(cluster.names)}; "
            "both must name the same servers in the same order"
        )
    every = list(cases(arguments.model, cluster, given, parse_bytes(arguments.cache, "--cache")))
    costs = StepCosts.from_dict(read_json(arguments.costs), arguments.costs) if arguments.costs else None
    now = {name: figures(every[0], name, work, arguments.prior, costs) for name in names}
    best = _best(now)
    what_if = {case.name: figures(case, best or "latency", work, arguments.prior, costs) for case in every[1:]}
    if arguments.plot:
        from placement.commands.plots import plot_parts

        bars = {**now, **what_if}
        bars = {name: found["seconds"] for name, found in bars.items() if "seconds" in found}
        plot_parts(bars, f"{every[0].shape.name}: where a decoded token's time goes", arguments.plot)
    bottleneck = max(PARTS, key=lambda part: now[best]["seconds"][part]) if best else "memory"
    if arguments.json:
        head = {"model": every[0].shape.name, "cluster": cluster.source, "profile": arguments.profile}
        print(json.dumps({**head, "strategy": best, "bottleneck": bottleneck, "strategies": now, "what_if": what_if}))
        return
    _print(arguments, every[0].shape.name, now, best, bottleneck, what_if)


def _best(now: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The strategy of most tokens a second that can be served; None where the model does not fit."""
    fitting = {name: found for name, found in now.items() if found.get("served")}
    return max(fitting, key=lambda name: fitting[name]["tokens_per_second"]) if fitting else None


def _print(
    arguments: argparse.Namespace,
    model: str,
    now: Mapping[str, Mapping[str, Any]],
    best: str | None,
    bottleneck: str,
    what_if: Mapping[str, Mapping[str, Any]],
) -> None:
    first = next(iter(now.values()))
    print_text(
        f"{model} on the servers of {arguments.cluster}: room for {first['copies']:.2f} copies of all experts, beside",
        f"everything else and {arguments.cache} for the KV cache on each device.",
    )
    if best is None:
        print_text(f"It cannot be served: {first.get('missing', 'no strategy given leaves attention at home')}")
    else:
        print()
        print_table(["strategy", "tokens/s", "first token", *PARTS, "served"], [_row(n, f) for n, f in now.items()])
        print_text(
            "One request on an idle cluster, mean over servers with users; of a decoded token's time: dense, experts, rounds",
            "(waiting for exchanges and hops), bytes.",
        )
        print()
        _print_bottleneck(now, best, bottleneck)
    print()
    rows = [_row(name, found, None if best is None else now[best]) for name, found in what_if.items()]
    print_table([f"{best or 'latency'} with", "tokens/s", "first token", *PARTS, "change"], rows)
    if not arguments.profile:
        print_text("Without --profile all experts are equally likely: real users, who differ, are served better.")


def _row(name: str, found: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> list[str]:
    if "missing" in found:
        return [name, "-", "-", *("-" for _ in PARTS), "no room"]
    last = ("yes" if found["served"] else "not yet") if before is None else ""
    if before is not None:
        last = f"{found['tokens_per_second'] / before['tokens_per_second'] - 1:+.0%}"
    parts = (f"{1e3 * found['seconds'][part]:.1f} ms" for part in PARTS)
    return [name, f"{found['tokens_per_second']:.1f}", f"{found['first_token']:.2f} s", *parts, last]


def _print_bottleneck(now: Mapping[str, Mapping[str, Any]], best: str, bottleneck: str) -> None:
    found = now[best]
    share = found["seconds"][bottleneck] * found["tokens_per_second"]
    prompt = max(PARTS, key=lambda part: found["prompt_seconds"][part])
    print_text(f"Plan with {best}. Bottleneck of a decoded token, {share:.0%} of its time: {_WORDS[bottleneck]}.")
    part = found["prompt_seconds"][prompt] / found["first_token"]
    print_text(f"Of the first token, {part:.0%}: {_WORDS[prompt]}.")
    where = [f"{found['remote_layers']:.1f} layers of a token need another server"]
    where += (
        [f"busiest link {found['link']} ({format_bytes(found['prefill_bytes'])} a prompt)"] if found["link"] else []
    )
    print_text(f"{'; '.join([*where, 'busiest device ' + found['device']])}.")
    away = [
        name for name in now if name in HOSTED and now[name].get("tokens_per_second", 0) > found["tokens_per_second"]
    ]
    for name in away:
        factor = now[name]["tokens_per_second"] / found["tokens_per_second"]
        print_text(
            f"{name} would decode {factor:.1f} times as fast, with layers hosted away from home; python -m launch serve cannot",
            "follow such a plan yet.",
        )
