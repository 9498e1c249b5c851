"""The flags of `simulate`, and what they describe: requests, speeds of devices, costs of steps."""

import argparse
import math
import sys
from dataclasses import replace

import numpy as np

from placement.commands.inputs import STRATEGIES_HELP, add_cluster, add_dispatch, add_json, add_prior, whole_number
from placement.data.arrivals import Arrivals
from placement.data.cluster import Cluster
from placement.data.problem import Problem
from placement.files import InputError, read_json
from placement.registry import STRATEGIES
from placement.simulation.independent.unit_costs import Compute
from placement.simulation.lockstep.predict import StepCosts


def _above_zero(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 10**7:
        raise ValueError
    return value


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_count, text.split(",")))


def _rates(text: str) -> tuple[float, ...]:
    return tuple(map(_above_zero, text.split(",")))


# argparse names them in its messages
_above_zero.__name__, _count.__name__ = "number above 0", "whole number from 1 to 10000000"
_counts.__name__, _rates.__name__ = "list of whole numbers such as 4,64", "list of numbers such as 100,500"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_cluster(parser, required=False)
    add("--profile", required=True, metavar="P", help="profile.npz to plan on")
    add("--eval", metavar="P2", help="profile.npz of what users do then (default: the one planned on)")
    add("--strategies", default=",".join(STRATEGIES), metavar="A,B", help=STRATEGIES_HELP)
    _add_requests(parser)
    _add_speeds(parser)
    add("--batch", type=_count, default=32, metavar="N", help="sequences a server decodes at once (default: 32)")
    add("--shift", type=_above_zero, metavar="S", help="after S seconds the servers' workloads trade places")
    add("--replan", type=_above_zero, metavar="S", help="plan again every S seconds and migrate where it pays")
    what = "all servers take their steps together, as python -m launch serve does, not in a loop of each server's own"
    add("--lock-step", action="store_true", help=what)
    what = "with --lock-step: measured seconds of steps at home, as launch bench testbed --json prints them under costs"
    add("--costs", metavar="C.json", help=what)
    what = "with --lock-step: sequences a device serves at once (4)"
    add("--sequences", type=_count, default=4, metavar="N", help=what)
    what = "prompt tokens of a step, of a device with --lock-step, else of a server (64)"
    add("--chunk", type=_count, default=64, metavar="N", help=what)
    add("--seed", type=whole_number, default=0, help="of arrivals and of strategies that draw (default: 0)")
    what = "the paper's grid on clusters of its own: 4 to 256 GPUs, 100 to 1000 Mbit/s, gaps 8 to 15 s"
    add("--grid", action="store_true", help=what)
    add("--gpus", type=_counts, metavar="N,N", help="with --grid: sizes of the cluster (default: 4,16,64,256)")
    what = "with --grid: Mbit/s between servers (default: 100,250,500,1000)"
    add("--bandwidths", type=_rates, metavar="B,B", help=what)
    what = "with --grid: simulated in each cell, in the mean (default: 1500); 120 s of arrivals at least"
    add("--requests", type=_count, metavar="N", help=what)
    what = "with --grid: latency plans all servers as one group, however many there are"
    add("--one-group", action="store_true", help=what)
    add_dispatch(parser)
    add_prior(parser)
    add("--jobs", type=_count, metavar="N", help="processes for --grid (default: one per core)")
    add("--plot", metavar="FILE.png", help="draw latency by strategy")
    add_json(parser)


def _add_requests(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "requests: t_s,prompt_tokens,output_tokens and optionally server; or a trace of Azure, BurstGPT, Mooncake"
    add("--arrivals", metavar="A", help=what)
    add("--stretch", type=_above_zero, default=1.0, metavar="F", help="factor on the times of --arrivals (default: 1)")
    what = "Poisson, mean seconds between a server's requests; of --arrivals only lengths are then used (10; --grid: 8, 10, 15)"
    add("--gap", type=_above_zero, metavar="S", help=what)
    add("--duration", type=_above_zero, metavar="S", help="seconds of arrivals (default: 3600, or the whole file)")
    add("--prompt-tokens", type=_count, default=128, metavar="N", help="without --arrivals (default: 128)")
    add("--output-tokens", type=_count, default=64, metavar="N", help="without --arrivals (default: 64)")


def _add_speeds(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "operations/s reached by a device of speed 1 (default: 5e13)"
    add("--device-flops", type=_above_zero, default=50e12, metavar="F", help=what)
    what = "bytes of weights/s it reads (default: 5e11)"
    add("--device-bandwidth", type=_above_zero, default=500e9, metavar="B", help=what)
    add("--prefill-token", type=_above_zero, metavar="S", help="measured seconds of a prompt token, all layers")
    add("--decode-step", type=_above_zero, metavar="S", help="measured seconds of a decode step of one sequence")


def read_costs(path: str | None, compute: Compute) -> StepCosts:
    """Measured costs; without a file those of one speed of devices, which compute side by side.

    Raises:
        InputError: the file cannot be used.
    """
    if path is None:
        return StepCosts((0.0, 0.0, compute.prefill_token), (compute.decode_step, 0.0, compute.decode_token))
    return StepCosts.from_dict(read_json(path), path)


def read_arrivals(arguments: argparse.Namespace, cluster: Cluster) -> Arrivals:
    """The requests that the flags describe.

    Raises:
        InputError: there are none, or too many, or the file cannot be used.
    """
    servers, seed = cluster.names, arguments.seed
    lengths = np.array([[arguments.prompt_tokens, arguments.output_tokens]])
    if arguments.arrivals:
        duration = math.inf if arguments.duration is None or arguments.gap else float(arguments.duration)
        notes: list[str] = []
        options = {"stretch": arguments.stretch, "duration": duration, "seed": seed, "notes": notes}
        listed = Arrivals.load(arguments.arrivals, servers, **options)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        if arguments.gap is None:
            return listed
        lengths = np.stack([listed.prompt, listed.output], 1)
    gap, duration = arguments.gap or 10.0, arguments.duration or 3600.0
    if duration / gap * len(servers) > 10**7:
        raise InputError(f"--duration {duration:g}: gives over 10 million requests; shorten it or raise --gap")
    drawn = Arrivals.poisson(len(servers), gap, duration, lengths, seed)
    if not len(drawn):
        raise InputError(f"--duration {duration:g}: no request comes in this time; raise it or lower --gap")
    return drawn


def read_compute(arguments: argparse.Namespace, problem: Problem) -> Compute:
    """The speed of devices that the flags describe."""
    compute = Compute.roofline(problem, arguments.device_flops, arguments.device_bandwidth)
    if arguments.prefill_token:
        compute = replace(compute, prefill_token=arguments.prefill_token)
    if arguments.decode_step:  # split as the roofline splits it
        scale = arguments.decode_step / (compute.decode_step + compute.decode_token)
        step, token = compute.decode_step * scale, compute.decode_token * scale
        compute = replace(compute, decode_step=step, decode_token=token)
    return compute
