"""How fast a model would run on a cluster, what holds it up, and what would change that; from sizes alone or a profile."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from placement.data.cluster import Cluster, Server
from placement.data.model_shapes import ModelShape
from placement.data.placement import Placement
from placement.data.problem import Problem
from placement.data.profile import Profile
from placement.data.workload import Workload
from placement.files import InputError
from placement.planner import evaluate, plan
from placement.simulation.independent.alone import measured_compute
from placement.simulation.independent.unit_costs import BACK, DENSE, EXPERTS, OUT, Compute, Steps
from placement.simulation.lockstep.predict import StepCosts

GIGABIT = 1e9 / 8  # bytes/s
PARTS = ("dense", "experts", "rounds", "bytes")  # of a token's time


@dataclass(frozen=True, eq=False)
class Case:
    """A cluster and a model as they are, or as they could be.

    Attributes:
        name: what differs.
        shape: sizes of the model; profile: what users activate, of the cluster's servers.
        cluster: its servers; users: how many of them, the first ones, have users of their own.
    """

    name: str
    shape: ModelShape
    profile: Profile
    cluster: Cluster
    users: int


def cases(config: str, cluster: Cluster, given: Profile | None, cache: int) -> Iterator[Case]:
    """As it is; with one more box like the largest, one more gigabit on every link, experts in int4.

    Args:
        config: config.json of the model, or its folder.
        given: a profile of the cluster's users; None takes all experts as equally likely.
        cache: bytes of each device for the KV cache and workspace, beside all weights that are no experts.

    Raises:
        InputError: the configuration cannot be used, or the profile is of other servers or another model.
    """
    shape, users = ModelShape.from_config(config), len(cluster.names)

    def case(name: str, shape: ModelShape, cluster: Cluster) -> Case:
        return Case(name, shape, _profile(shape, given, cluster, cache), cluster, users)

    yield case("as it is", shape, cluster)
    yield case("one more box", shape, one_more_box(cluster))
    if users > 1:
        faster = replace(cluster, bandwidth=cluster.bandwidth + GIGABIT)
        yield case("one more gigabit", shape, faster)
    small = ModelShape.from_config(config, "int4")
    if small.expert_bytes < shape.expert_bytes:
        yield case("int4 experts", small, cluster)


def one_more_box(cluster: Cluster) -> Cluster:
    """The cluster and another server like its largest, with the cluster's mean links."""
    memory = [sum(device.memory for device in server.devices) for server in cluster.servers]
    like = cluster.servers[int(np.argmax(memory))]
    number = len(cluster.servers)
    name = next(n for n in (f"{like.name}-{i}" for i in range(2, number + 3)) if n not in cluster.names)
    away = ~np.eye(number, dtype=bool)
    grown = []
    for links, home, usual in ((cluster.bandwidth, np.inf, GIGABIT), (cluster.latency, 0.0, 2e-4)):
        table = np.full((number + 1, number + 1), links[away].mean() if number > 1 else usual)
        table[:-1, :-1] = links
        np.fill_diagonal(table, home)
        grown.append(table)
    return Cluster((*cluster.servers, Server(name, like.devices)), *grown, source=f"{cluster.source} and {name}")


def _profile(shape: ModelShape, given: Profile | None, cluster: Cluster, cache: int) -> Profile:
    """What users activate with the sizes of `shape`; servers that the profile lacks have no users."""
    sizes: dict[str, Any] = {"expert_bytes": shape.expert_bytes, "reserved_bytes": shape.other_bytes + cache}
    if given is None:
        counts = np.zeros((len(cluster.names), len(shape.layers), shape.experts), np.int64)
        facts: dict[str, Any] = {"top_k": shape.top_k, "hidden_size": shape.hidden_size}
        return Profile(counts, cluster.names, shape.name, source=shape.name, **facts, **sizes)
    more = len(cluster.names) - len(given.servers)
    counts = np.concatenate([given.counts, np.zeros((more, *given.counts.shape[1:]), given.counts.dtype)])
    names = (*given.servers, *cluster.names[len(given.servers) :])
    return replace(given, counts=counts, servers=names, **sizes)


def figures(case: Case, strategy: str, work: Workload, prior: float, costs: StepCosts | None = None) -> dict[str, Any]:
    """How fast a request is on an idle cluster under a strategy's plan, means over the servers with users.

    Args:
        costs: measured seconds of steps at home; None takes a roofline of the model's sizes.

    Returns:
        `tokens_per_second` of one sequence, `first_token` seconds of a prompt, `seconds` of a decoded token by `PARTS`,
        `prompt_seconds` alike, `link` (the pair that carries most bytes a second of its bandwidth), `device` (that computes
        most), `copies` of all experts that fit; or `missing`: one line, where the model does not fit.
    """
    problem = Problem.build(case.profile, case.cluster, work)
    copies = float(problem.usable_bytes.sum() / (problem.expert_bytes.sum() * problem.shape[2]))
    try:
        placed = plan(case.profile, case.cluster, strategy, prior=prior, workload=work)
    except InputError as error:
        return {"copies": copies, "missing": str(error)}
    compute = Compute.roofline(problem, dense_bytes=case.shape.other_bytes)
    if costs is not None:
        compute = measured_compute(compute, costs.prefill, costs.decode, max(1, work.prefill_tokens))
    steps = Steps.build(problem, placed.resident, compute, placed.host)
    only = Compute(compute.prefill_token * (1 - compute.expert_share), 0.0, compute.decode_step, 0.0)
    dense = Steps.build(problem, placed.resident, only, placed.host)
    prompt, decoded = (
        np.mean([_parts(steps, dense, n, np.array(amount)) for n in range(case.users)], axis=0)
        for amount in ((float(work.prefill_tokens), 0.0, 0.0), (0.0, 1.0, 1.0))
    )
    return {
        "copies": copies,
        "tokens_per_second": float(1 / decoded.sum()),
        "first_token": float(prompt.sum()),
        "seconds": dict(zip(PARTS, decoded.tolist(), strict=True)),
        "prompt_seconds": dict(zip(PARTS, prompt.tolist(), strict=True)),
        "served": placed.host is None,
        **_busiest(case, steps, placed, work),
    }


def _parts(steps: Steps, dense: Steps, server: int, amount: np.ndarray) -> list[float]:
    """Seconds of a step of a server alone, by `PARTS`; amount of each unit, [3]. Rows of hops count with what is dense."""
    group, alone = (amount @ own.base[:, 4 * server : 4 * server + 4] for own in (steps, dense))
    experts = group[DENSE] - alone[DENSE] + group[EXPERTS]
    rounds = steps.waiting(server, float(amount[:2].sum()))
    return [float(alone[DENSE]), float(experts), rounds, float(group[OUT] + group[BACK])]


def _busiest(case: Case, steps: Steps, placed: Placement, work: Workload) -> dict[str, Any]:
    """The link and the device that one request of every server with users keeps busy longest."""
    names = case.cluster.names
    tokens = np.zeros((len(names), 2))
    tokens[: case.users] = work.prefill_tokens, work.decode_steps
    link = steps.link_bytes(tokens) / case.cluster.bandwidth
    n, m = np.unravel_index(int(link.argmax()), link.shape)
    units = np.column_stack([tokens, tokens[:, 1]])
    device = np.einsum("nu,und->d", units, steps.device_seconds)
    server, number = placed.devices[int(device.argmax())]
    costs = evaluate(case.profile, case.cluster, placed, workload=work)
    return {
        "link": f"{names[n]} -> {names[m]}" if link.any() else "",
        "device": f"{server}/{number}",
        "remote_layers": float(steps.use.need[: case.users].sum(-1).mean()),
        "prefill_bytes": costs["prefill_bytes"],
    }
