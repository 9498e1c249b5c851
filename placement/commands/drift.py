"""`python -m placement drift`: how far servers, or two windows, differ."""

import argparse
import json
from typing import Any

import numpy as np

from placement.commands.inputs import add_json
from placement.data.profile import Profile
from placement.data.statistics import drift
from placement.files import InputError, show
from placement.text_table import print_table, print_text

# Mean divergences, in bits, from which servers or windows are called unlike, and clearly so; chance is taken off first.
# Mixtral's subjects differ by 0.008 (source-aware plans gain a few per cent), DeepSeek-V2-Lite's domains by 0.17.
_UNLIKE, _CLEARLY = 0.02, 0.08


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", required=True, metavar="A", help="profile.npz")
    parser.add_argument("--against", metavar="B", help="profile.npz of another window")
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print how unlike the servers are, and how far they moved.

    Raises:
        InputError: a profile cannot be used, or the two are not of one model and the same servers.
    """
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
    print_text(
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
        print_text(sentence)


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
