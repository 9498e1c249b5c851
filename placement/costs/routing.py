"""Which copy serves whom: prices of pairs of servers, the table of serving servers, and the load that follows."""

from functools import lru_cache

import numpy as np

from placement.costs.hosting import seen_from_hosts
from placement.data.problem import Problem


def pair_price(problem: Problem, alone: np.ndarray | float = 1.0) -> np.ndarray:
    """Seconds of a chunk and its decode steps that one layer costs if every token of n needs m, float64 [..., N, N].

    price_nm = steps a alone alpha_nm + (prompt + steps a) (beta_nm + beta'_nm), with `problem.workload`

    Args:
        alone: probability that no other active sequence waits for an exchange in the layer anyway, [...].
    """
    work = problem.workload
    steps = np.asarray(work.decode_steps * work.active * alone)
    tokens = work.prefill_tokens + work.decode_steps * work.active
    return steps[..., None, None] * problem.exchange_seconds + tokens * (problem.row_seconds + problem.sum_seconds)


def copy_preference(problem: Problem, held: np.ndarray) -> np.ndarray:
    """Order in which a source turns to the servers for the experts of a layer: int64 [N, L, N], 0 for itself, no ties.

    The one rule for copies: in each layer a source prefers the partner that holds most of the experts it lacks, per
    price of the link to it (`pair_price`). What a token needs then comes from as few servers as possible, over cheap
    links. Equally good partners come in ring order from the source, so that sources share them. Statistics play no
    part, so that who runs a placement can apply the rule as well.

    Args:
        held: bool [N, L, E], or of fewer layers.
    """
    servers = len(problem.names)
    lacking = (~held).transpose(1, 0, 2).astype(np.float64)
    number = (lacking @ held.transpose(1, 2, 0).astype(np.float64)).transpose(1, 0, 2)  # [N, L, N]
    price = pair_price(problem)
    np.fill_diagonal(price, 1.0)
    score = number / price[:, None]
    score[np.arange(servers), :, np.arange(servers)] = np.inf
    ring = (np.arange(servers) - np.arange(servers)[:, None]) % servers
    ties = [np.broadcast_to(key[:, None], score.shape) for key in (ring, price)]
    order = np.lexsort([*ties, -score], axis=-1)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(servers), order.shape), axis=-1)
    return rank


def serving_server(problem: Problem, held: np.ndarray) -> np.ndarray:
    """Which server serves each server's calls: its own copy, else the copy first in its `copy_preference`.

    With `problem.dispatch` "sglang" it is that engine's rule for other nodes' copies: `fair_copies`.

    Args:
        held: bool [N, L, E], every expert held by at least one server.

    Returns:
        int64 [N, L, E], index of the serving server; read-only.
    """
    return _serving(problem, np.packbits(held).tobytes())


@lru_cache(maxsize=4)  # the costs of one placement are counted from several sides
def _serving(problem: Problem, packed: bytes) -> np.ndarray:
    servers, layers, experts = problem.shape
    held = np.unpackbits(np.frombuffer(packed, np.uint8), count=servers * layers * experts)
    held = held.reshape(problem.shape).astype(bool)
    if problem.dispatch == "sglang":
        return fair_copies(held)
    rank = copy_preference(problem, held)
    by_rank = np.argsort(rank, axis=-1)
    expert, holder = np.nonzero(held.reshape(servers, -1).T)  # ordered by expert: each one's holders are a segment
    segments = np.searchsorted(expert, np.arange(layers * experts))
    serving = np.empty(problem.shape, np.int64)
    for source in range(servers):
        best = np.minimum.reduceat(rank[source, expert // experts, holder], segments).reshape(layers, experts)
        serving[source] = np.take_along_axis(by_rank[source], best, axis=-1)
    serving.setflags(write=False)
    return serving


def fair_copies(held: np.ndarray, seed: int = 42) -> np.ndarray:
    """Who serves whom by SGLang's static dispatch: a server's own copy, else all copies alike, drawn at random.

    The servers without a copy of an expert are shared evenly among its copies, whatever else is where and however far. (Of
    SGLang a rank is a source; the ranks of a server are taken as one.)

    Args:
        held: bool [N, L, E], every expert held by at least one server.

    Returns:
        int64 [N, L, E], index of the serving server; read-only.

    References:
        sgl-project/sglang, srt/eplb/expert_location.py.
    """
    rng = np.random.default_rng(seed)
    source, holder = rng.random((2, *held.shape))
    position = np.where(held, np.inf, source).argsort(0).argsort(0)  # of a server among those without a copy
    holders = np.where(held, holder, np.inf).argsort(0)
    serving = np.take_along_axis(holders, position % held.sum(0), axis=0)
    serving = np.where(held, np.arange(len(held))[:, None, None], serving)
    serving.setflags(write=False)
    return serving


def server_load(problem: Problem, held: np.ndarray, host: np.ndarray | None = None) -> np.ndarray:
    """Demand that arrives at each server's copies from all sources, float64 [N, L, E] in the units of `frequency`.

    Args:
        held: bool [N, L, E]; host: who hosts each source's layers, int [N, L]; None is at home.
    """
    servers, layers, experts = problem.shape
    serving = seen_from_hosts(serving_server(problem, held), host).reshape(servers, -1)
    target = serving * (layers * experts) + np.arange(layers * experts)
    load = np.bincount(target.ravel(), problem.frequency.ravel(), minlength=problem.frequency.size)
    return load.reshape(problem.shape)


def device_load(problem: Problem, resident: np.ndarray, host: np.ndarray | None = None) -> np.ndarray:
    """Demand that each device computes, float64 [D, L]; copies within a server share evenly.

    Args:
        resident: bool [D, L, E]; host: who hosts each source's layers, int [N, L]; None is at home.
    """
    load = server_load(problem, problem.held(resident), host)
    copies = np.add.reduceat(resident.astype(np.int64), problem.first_device, axis=0)
    per_copy = load / np.maximum(copies, 1)
    return np.stack([(resident[d] * per_copy[n]).sum(-1) for d, n in enumerate(problem.device_server)])
