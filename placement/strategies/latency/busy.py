"""What a plan takes when the cluster is busy: every server serves several sequences, and they meet at devices and ports."""

import numpy as np

from placement.data.problem import Problem
from placement.simulation.independent.contention import Customers
from placement.simulation.independent.unit_costs import DECODED, PROMPT, STEP, Compute, Steps


def busy_seconds(problem: Problem, resident: np.ndarray) -> float:
    """Seconds of a chunk and its decode steps where all servers with users are busy, mean over these servers.

    All take a chunk at once, then all decode `workload.most` sequences each; servers delay each other as in the
    simulator (`simulation.independent.contention`). Experts that one device computes for everybody, or bytes that meet at
    one port, cost more than on an idle cluster.

    Args:
        resident: bool [D, L, E], every expert resident somewhere.
    """
    work, users = problem.workload, np.flatnonzero(problem.active)
    usual, decoded = Compute.roofline(problem), problem.assignment_seconds[1]
    compute = Compute(usual.prefill_token, usual.expert_share, usual.decode_step, float(problem.top_k * decoded.sum()))
    steps, total = Steps.build(problem, resident, compute), 0.0
    for times, tokens, unit in ((1, work.prefill_tokens, PROMPT), (work.decode_steps, work.most, DECODED)):
        if not times * tokens:
            continue
        amount = np.zeros(3)
        amount[unit], amount[STEP] = tokens, unit == DECODED
        network = Customers.of(steps)
        for server in users.tolist():
            network.set_row(server, amount, steps.waiting(server, tokens))
        network.solve()
        total += times * float(network.seconds[users].mean())
    return total
