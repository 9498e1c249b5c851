"""Requests on servers that step together, as the runtime serves them: how long they take. Plans nothing itself.

Modelled: one step at a time for the whole cluster, by the rules that the serving engine follows (`placement.scheduling`).
Where both are wanted, prefill and decode steps take turns. A prefill step takes a chunk of the earliest prompt on every
device, or of a few short ones, a decode step one token of every sequence; a device has batch slots for `sequences` of them, and
a request goes to the device of its server with most slots free. A step takes its computing, linear in busy devices and
rows and measured beforehand (`StepCosts`), and its messages (exchange.py). What its tokens are routed to comes from the
profile: a request takes tokens that follow each other in recorded sequences of its server, drawn at random; where only
counts are known, sets drawn as if independent.

Not modelled: variance of steps that hold the same, devices of unequal speed, migrations, memory of the KV cache, and
what lies between two steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from placement.costs.token_sets import token_sets
from placement.data.arrivals import Arrivals
from placement.data.problem import Problem
from placement.files import InputError, show
from placement.simulation.lockstep.exchange import Exchange
from placement.simulation.lockstep.scheduler import Member
from placement.simulation.lockstep.serve import Served, serve

_LONGEST = 1e6  # seconds of a step; sums of longer ones may be no numbers
_MESSAGES = ("message_seconds", "row_seconds", "contention")
_OVERHEADS = ("prefill_overhead", "decode_overhead")


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step all of whose experts are at home: (a step, and for each busy device, and for each row).

    Attributes:
        prefill, decode: the three of each kind of step.
        message_seconds: of a device, to send a message.
        row_seconds: of a row in a message, each way, beside its bytes, half at either end.
        contention: by how much longer these and overheads take for each device beyond two that takes part in a layer, where
            devices share cores.
        prefill_overhead, decode_overhead: seconds of a device in each layer in which it takes part, beside messages.
    """

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    message_seconds: float = 0.0
    row_seconds: float = 0.0
    contention: float = 0.0
    prefill_overhead: float = 0.0
    decode_overhead: float = 0.0

    @property
    def messages(self) -> dict[str, float]:
        """What `Exchange.build` takes of it."""
        return {key: getattr(self, key) for key in _MESSAGES}

    @classmethod
    def from_dict(cls, parsed: Any, source: str = "costs") -> "StepCosts":
        """From JSON with `prefill` and `decode`, three numbers each, and optionally those of messages.

        Raises:
            InputError: something is missing, unknown, or no number from 0.
        """
        optional = _MESSAGES + _OVERHEADS
        if not isinstance(parsed, Mapping) or not {"prefill", "decode"} <= set(parsed) <= {*vars(cls(_FREE, _FREE))}:
            raise InputError(
                f"{source}: must have prefill and decode, optionally {', '.join(optional)}, and nothing else"
            )
        found = {}
        for key, count in (("prefill", 3), ("decode", 3), *((key, 1) for key in optional)):
            values = parsed.get(key, 0.0)
            values = values if isinstance(values, list | tuple) else [values]
            plain = all(isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= _LONGEST for v in values)
            if len(values) != count or not plain:
                raise InputError(
                    f"{source}: {key} = {show(values)}: must be {count} finite seconds from 0 to {_LONGEST:g}"
                )
            found[key] = tuple(map(float, values)) if count > 1 else float(values[0])
        return cls(**found)

    def seconds(self, prefill: bool, rows: Sequence[int]) -> float:
        """A step with so many rows on each device."""
        step, device, row = self.prefill if prefill else self.decode
        return step + device * sum(count > 0 for count in rows) + row * sum(rows)

    def overhead(self, prefill: bool) -> float:
        """Of a device and a layer, in a step of a kind."""
        return self.prefill_overhead if prefill else self.decode_overhead


_FREE = (0.0, 0.0, 0.0)


def lock_step(
    problem: Problem,
    resident: np.ndarray,
    arrivals: Arrivals,
    costs: StepCosts,
    *,
    sequences: int = 4,
    chunks: Sequence[int] = (64,),
    serving: np.ndarray | None = None,
    likely: np.ndarray | None = None,
    host: np.ndarray | None = None,
    seed: int = 0,
) -> Served:
    """Serve all requests under a placement; deterministic.

    Args:
        problem: the cluster, with measured links, and the workload that runs on it.
        resident: bool [D, L, E], every expert resident somewhere.
        costs: of a step at home.
        sequences: batch slots of a device; chunks: prompt tokens that a step may take of a prompt (scheduling.next_turn).
        serving, likely, host: see `Exchange.build`; the first two as the runtime was given them.
        seed: of the tokens drawn; the same for all placements that are to be compared.
    """
    exchange = Exchange.build(problem, resident, **costs.messages, serving=serving, likely=likely, host=host)
    routing = _draw(problem, arrivals, seed)
    devices = len(problem.device_server)
    none = routing[0][:0] if routing else np.zeros((0, problem.shape[1], problem.top_k), np.int64)

    def step(prefill: bool, members: list[Member]) -> tuple[float, float]:
        rows: list[list[np.ndarray]] = [[] for _ in range(devices)]
        prompts = [0] * devices
        for device, _, request, start, count in members:
            rows[device].append(routing[request][start : start + count])
            prompts[device] += 1
        ids = [np.concatenate(own) if own else none for own in rows]
        compute = costs.seconds(prefill, [len(own) for own in ids])
        ends = prompts if prefill else None  # of a prompt's rows one gives a next token
        return compute, exchange.seconds(ids, compute, costs.overhead(prefill), ends) - compute

    return serve(arrivals, problem.device_server.tolist(), step, sequences=sequences, chunks=chunks)


def _draw(problem: Problem, arrivals: Arrivals, seed: int) -> list[np.ndarray]:
    """Routing of every request's tokens, int [R][tokens, L, k]: whole recorded sequences of its server, one after another."""
    rng, sets = np.random.default_rng(seed), token_sets(problem, seed)
    texts: dict[int, list[np.ndarray]] = {}
    for server in np.unique(arrivals.server).tolist():
        if problem.tokens is not None and sets.recorded[server]:
            own = problem.tokens.server == server
            ids, sequence = problem.tokens.ids[own], problem.tokens.sequence[own]
            order = np.argsort(sequence, kind="stable")
            starts = np.flatnonzero(np.diff(sequence[order])) + 1
            texts[server] = np.split(ids[order].astype(np.int64), starts)
        else:
            drawn = sets.ids[sets.source == server] if (sets.source == server).any() else sets.ids
            if not len(drawn):
                raise InputError(f"{problem.names[server]}: requests come here, but the profile counts none anywhere")
            texts[server] = [drawn[i : i + 1].astype(np.int64) for i in range(len(drawn))]
    routing = []
    for server, length in zip(arrivals.server.tolist(), (arrivals.prompt + arrivals.output).tolist(), strict=True):
        parts, found = [], 0
        while found < length:
            parts.append(texts[server][rng.integers(len(texts[server]))])
            found += len(parts[-1])
        routing.append(np.concatenate(parts)[:length])
    return routing
