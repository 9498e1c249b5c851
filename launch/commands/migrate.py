"""`python -m launch migrate`: look at, start and stop migrations of a cluster that serves."""

import argparse
import json
import textwrap
from collections.abc import Mapping
from typing import Any

from launch.cluster.secret import load_secret
from launch.migration.control import ask
from launch.migration.decision import Decision, describe
from placement import InputError, Placement
from placement.files import read_toml
from placement.units import format_bytes, parse_bytes

COLUMNS = 80


def run(args: argparse.Namespace) -> int:
    """Ask the cluster; 1 where a migration has failed.

    Raises:
        InputError: no cluster serves there, or what is asked for cannot be done.
    """
    reply = ask(args.state, request(args), load_secret(args.secret_file))
    if args.json:
        print(json.dumps(reply))
    elif reply.get("aborted") == "growth":
        print("aborted; no server is waited for any more")
    elif "aborted" in reply:
        print("aborted; the cluster stays with the last round that all have committed")
    elif "waiting" in reply:
        for name in reply["waiting"]:
            print(f"waiting for {name}; start there, with the flags of the others:")
            file, address = args.add, reply["address"]
            print(f"  python -m launch serve --cluster {file} --server {name} \\\n    --state DIR --join {address}")
    elif "verdict" in reply:
        word = "would be " if args.dry_run and reply["verdict"] == "adopted" else ""
        decision = Decision(**reply)
        decision.verdict = word + decision.verdict
        _print_wrapped(describe(decision))
    else:
        _print_status(reply)
    return 1 if reply.get("verdict") == "failed" else 0


def request(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags ask for."""
    if args.abort:
        return {"what": "abort"}
    if args.to:
        return {"what": "to", "placement": Placement.load(args.to).to_dict(), "source": args.to, "dry": args.dry_run}
    if args.add:
        return {"what": "add", "cluster": read_toml(args.add), "source": args.add, "dry": args.dry_run}
    memory: dict[str, int | None] = {}
    for given in args.memory or []:
        name, sign, size = given.rpartition("=")
        if not sign:
            raise InputError(f"--memory {given}: must be WHERE=SIZE, such as edge-c/0=20GB")
        memory[name] = None if size == "all" else parse_bytes(size, f"--memory {given}")
    memory |= dict.fromkeys(args.drain or [], 0) | dict.fromkeys(args.undrain or [])
    if memory:
        return {"what": "memory", "memory": memory, "dry": args.dry_run}
    if args.plan or args.dry_run:
        return {"what": "plan", "dry": args.dry_run}
    return {"what": "status"}


def _print_status(reply: Mapping[str, Any]) -> None:
    _print_wrapped(f"epoch {reply['epoch']}, {reply['strategy']}, {reply['hash'][:12]}; recorded in {reply['record']}")
    if reply.get("growth"):
        _print_wrapped(f"adding servers: {reply['growth']}")
    if reply["moving"]:
        print(f"migrating: {reply['stage']}, {format_bytes(reply['staged_bytes'])} staged")
    for name, size in reply["limits"].items():
        print(f"{name}: limited to {format_bytes(size)}")
    if reply["disabled"]:
        _print_wrapped(f"no more migrations: {reply['disabled']}")
    if reply["last"]:
        _print_wrapped(describe(Decision(**reply["last"])))


def _print_wrapped(text: str) -> None:
    print(textwrap.fill(text, COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))
