"""Flags and inputs that several commands share: cluster, profile, workload, prior, plots."""

import argparse

from placement.data.model_shapes import ModelShape
from placement.data.prior import DEFAULT_PRIOR
from placement.data.problem import DISPATCH
from placement.data.profile import Profile
from placement.data.workload import Workload
from placement.files import InputError
from placement.units import parse_seconds

STRATEGIES_HELP = "names, or path/to/file.py:function of one's own (default: all)"


def add_cluster(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The flag that names the cluster file."""
    parser.add_argument("--cluster", required=required, metavar="C", help="cluster.toml: servers, devices and links")


def add_json(parser: argparse.ArgumentParser) -> None:
    """The flag for output that a program reads."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def add_prior(parser: argparse.ArgumentParser) -> None:
    what = (
        "pseudo-tokens without preference, and a quarter as many of the other servers', that thin statistics are planned "
        f"with (default: {DEFAULT_PRIOR:g}; 0: none)"
    )
    parser.add_argument("--prior", type=_at_least_0, default=DEFAULT_PRIOR, metavar="N", help=what)


def add_dispatch(parser: argparse.ArgumentParser) -> None:
    what = "whose rule chooses among copies on other servers when plans are served: this runtime's, or SGLang's (default: ours)"
    parser.add_argument("--dispatch", choices=DISPATCH, default="ours", metavar="R", help=what)


def whole_number(text: str) -> int:
    """A flag's whole number from 0, such as a seed."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise ValueError
    return value


whole_number.__name__ = "whole number from 0"  # argparse names it in its messages


def _at_least_0(text: str) -> float:
    value = float(text)
    if not 0 <= value < 2**53:
        raise ValueError
    return value


def check_plot(arguments: argparse.Namespace) -> None:
    """Refuse a figure that could not be written before any work."""
    if arguments.plot:
        from placement.commands.plots import check_path

        check_path(arguments.plot)


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


def add_workload(parser: argparse.ArgumentParser) -> None:
    """Flags that make a `Workload`."""
    usual, add = Workload(), parser.add_argument
    text = f"sequences that decode at once (default: {usual.active})"
    add("--active", type=int, default=usual.active, metavar="N", help=text)
    text = f"tokens of a prompt chunk; 0: decode alone (default: {usual.prefill_tokens})"
    add("--prefill-tokens", type=int, default=usual.prefill_tokens, metavar="N", help=text)
    text = f"decode steps for each chunk; 0: prefill alone (default: {usual.decode_steps})"
    add("--decode-steps", type=int, default=usual.decode_steps, metavar="N", help=text)
    text = f"what an exchange costs beyond link latency and bytes (default: {1e3 * usual.exchange_seconds:g}ms)"
    add("--exchange", default=f"{1e3 * usual.exchange_seconds:g}ms", metavar="T", help=text)


def read_workload(arguments: argparse.Namespace) -> Workload:
    """The workload that the flags describe.

    Raises:
        InputError: a value is out of range or has no unit.
    """
    exchange = parse_seconds(arguments.exchange, "--exchange")
    return Workload(arguments.active, arguments.prefill_tokens, arguments.decode_steps, exchange)
