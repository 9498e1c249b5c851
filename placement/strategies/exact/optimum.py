"""The optimum of the paper's objective, with prices that prove it, and the gap of any other plan to it."""

from dataclasses import dataclass

import numpy as np

from placement.data.problem import Problem
from placement.strategies.device_assignment import spread
from placement.strategies.exact.transportation import LARGEST, prices, transport

_SMALL = 20_000  # servers x layers x experts up to which the linear relaxation is solved for unequal sizes


@dataclass(frozen=True, eq=False)
class Certificate:
    """How far a plan is from the best there can be, and the prices that prove it.

    Any prices p >= 0 of a byte on each server bound the calls that any plan serves locally, by weak duality:

        local <= D(p) = sum_n C_n p_n - sum_i q_i + sum_{n,i} max(0, f_{n,i} + q_i - s_i p_n)

    with i over the experts of all layers, s their bytes, C the bytes of a server that experts can fill, and q >= 0 the
    price of covering an expert. Best for given p is q_i = max(0, min_n(s_i p_n - f_{n,i})).

    Attributes:
        primal: expected calls per token that the plan serves locally, in the units of `Problem.frequency`.
        dual: D of the prices below.
        total: all expected calls.
        server_price: p, float64 [N], per byte.
        expert_price: q, float64 [L, E].
    """

    primal: float
    dual: float
    total: float
    server_price: np.ndarray
    expert_price: np.ndarray

    @property
    def least_remote(self) -> float:
        """No plan has fewer remote calls than this, in the units of `Problem.frequency`."""
        return max(0.0, self.total - self.dual)

    @property
    def gap(self) -> float | None:
        """Relative excess of the plan's remote calls over `least_remote`; see `relative_gap`."""
        return relative_gap(self.total - self.primal, self.least_remote, self.total)


def exact(problem: Problem, *, previous: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """The fewest remote calls that memory allows (algorithms of transportation; paper section 3 gives the objective).

    With experts of equal size this is a transportation problem per server, solved to the optimum; packing into devices
    loses nothing, since a server holds as many experts as its devices do. With unequal sizes it is a knapsack: a plan
    close to the optimum, whose gap `certificate` bounds; small ones go to a mixed-integer solver as well, which is
    stopped after a fixed amount of work (or 20 s, and only then might a slower machine give another plan).

    Among optimal plans of equal sizes: one with fewest experts that are new to their server, where `previous` is given,
    even if memory that no call would use stays empty; then one that gives servers without statistics what others use.

    Args:
        problem: has room for one copy of every expert.
        previous: bool [D, L, E], the placement in force.
        seed: unused, the result is deterministic.

    Returns:
        bool [D, L, E], every expert covered, every device within its budget, no duplicate within a server.

    Raises:
        InputError: experts of unequal sizes do not pack into the devices; never with room for one more on each device.
    """
    if _equal(problem):
        return spread(problem, solve_equal(problem, previous), previous)
    from placement.strategies.exact.unequal_sizes import solve_unequal

    return solve_unequal(problem, best_prices(problem), previous)


def certificate(problem: Problem, resident: np.ndarray) -> Certificate:
    """Prove how good a plan is. For a plan of `exact` with equal sizes, primal = dual up to rounding.

    Args:
        resident: bool [D, L, E], complete.
    """
    held = problem.held(resident)
    price = _supporting_prices(problem, held) if _equal(problem) else best_prices(problem)
    return _with_prices(problem, held, price)


def least_remote(problem: Problem) -> float:
    """The least expected remote calls of any plan, in the units of `frequency`; with unequal sizes a bound below it."""
    if _equal(problem):
        held = solve_equal(problem)
        return _with_prices(problem, held, _supporting_prices(problem, held)).least_remote
    nothing = np.zeros(problem.shape, bool)
    return _with_prices(problem, nothing, best_prices(problem)).least_remote


def relative_gap(remote: float, least: float, total: float) -> float | None:
    """(remote - least) / least, 0 where they differ by rounding only, None where none need be remote but some are.

    Args:
        remote: expected remote calls of a plan.
        least: `least_remote`.
        total: all expected calls.
    """
    if remote - least <= 1e-9 * total:
        return 0.0
    return float(remote / least - 1) if least > 1e-9 * total else None


def gap(problem: Problem, resident: np.ndarray, least: float) -> float | None:
    """Relative excess of a plan's remote calls over the optimum of its problem.

    Args:
        resident: bool [D, L, E].
        least: `least_remote(problem)`.
    """
    total = float(problem.frequency.sum())
    return relative_gap(float(problem.frequency[~problem.held(resident)].sum()), least, total)


def solve_equal(problem: Problem, previous: np.ndarray | None = None) -> np.ndarray:
    """Optimal experts of each server for experts of equal size, bool [N, L, E].

    Integers, so that ties are ties: the smallest unit of f is worth more than all lower-order preferences together.
    """
    servers = len(problem.names)
    flat = problem.frequency.reshape(servers, -1)
    capacity = np.minimum(server_slots(problem), flat.shape[1])
    slots = int(capacity.sum())
    levels = max(2**4, min(2**12, LARGEST // 2 // (slots + 1) ** 2))
    preference = _preference(problem, levels).reshape(servers, -1)
    unit = levels * slots + 1
    calls = _whole_units(flat, LARGEST // unit - 1)
    held = transport(calls * unit + preference, capacity)
    if previous is not None:
        there = problem.held(previous).reshape(servers, -1)
        held = _fewest_moves(calls, held, capacity, there, unit, preference)
    return held.reshape(problem.shape)


def _fewest_moves(
    calls: np.ndarray, held: np.ndarray, capacity: np.ndarray, there: np.ndarray, unit: int, preference: np.ndarray
) -> np.ndarray:
    """Among the optimal plans one with fewest experts that are new to their server: bool [N, I].

    At optimal prices (p, q), optimal plans are those that hold what gains, lack what loses, and have one copy of what
    has a price q; they differ in ties alone. A breach of that costs more than all ties together are worth. A slot that
    costs nothing may stay empty: it then holds one of as many null items, which a null server covers.

    Args:
        calls: int64 [N, I].
        held: bool [N, I], an optimal plan.
        capacity: int64 [N].
        there: bool [N, I], what each server holds now.
        unit: more than all preferences together are worth.
        preference: int64 [N, I], at least 0, for what even moves leave open.
    """
    breach = int(capacity.sum()) + 1
    price = _least_prices(calls, held)
    cover = np.maximum(0, (price[:, None] - calls).min(0))
    margin = calls - price[:, None] + cover
    weight = (breach * (np.sign(margin) - (cover > 0)) + ((margin == 0) & there)) * unit + preference
    slack = price == 0
    nulls = int(capacity[slack].max(initial=0))
    if not nulls:
        return transport(weight, capacity)
    empty = np.where(slack, unit - 1, -breach * unit)
    padded = np.full((len(weight) + 1, weight.shape[1] + nulls), -breach * unit)
    padded[:-1, : weight.shape[1]] = weight
    padded[:-1, weight.shape[1] :] = empty[:, None]
    padded[-1, weight.shape[1] :] = 0
    return transport(padded, np.append(capacity, nulls))[:-1, : weight.shape[1]]


def server_slots(problem: Problem) -> np.ndarray:
    """Experts of equal size that fit each server, int64 [N]: the sum over its devices of what fits each."""
    return np.add.reduceat(problem.budget // problem.expert_bytes[0], problem.first_device)


def best_prices(problem: Problem) -> np.ndarray:
    """Prices per byte, float64 [N], whose bound is close to the lowest there is; it is the lowest on small problems."""
    servers = len(problem.names)
    flat, size = problem.frequency.reshape(servers, -1), np.repeat(problem.expert_bytes, problem.shape[2])
    capacity = np.add.reduceat(problem.usable_bytes, problem.first_device)
    found = [np.maximum(0.0, prices(flat, size.astype(np.float64), capacity))]
    if flat.size <= _SMALL:
        from placement.strategies.exact.unequal_sizes import relaxation_prices

        found.append(relaxation_prices(flat, size, capacity))
    return min(found, key=lambda price: _with_prices(problem, np.zeros(problem.shape, bool), price).dual)


def _equal(problem: Problem) -> bool:
    return bool((problem.expert_bytes == problem.expert_bytes[0]).all())


def _with_prices(problem: Problem, held: np.ndarray, price: np.ndarray) -> Certificate:
    """D at the best q for p; see `Certificate`."""
    capacity = np.add.reduceat(problem.usable_bytes, problem.first_device)
    cost = price[:, None, None] * problem.expert_bytes[:, None]
    cover = np.maximum(0.0, (cost - problem.frequency).min(0))
    surplus = np.maximum(0.0, problem.frequency + cover - cost).sum()
    dual = float(capacity @ price - cover.sum() + surplus)
    return Certificate(float(problem.frequency[held].sum()), dual, float(problem.frequency.sum()), price, cover)


def _supporting_prices(problem: Problem, held: np.ndarray) -> np.ndarray:
    """Prices per byte that support a plan of equal sizes, float64 [N]; of no particular quality if it is not optimal."""
    servers = len(problem.names)
    flat = problem.frequency.reshape(servers, -1)
    return _least_prices(flat, held.reshape(servers, -1)) / problem.expert_bytes[0]


def _least_prices(value: np.ndarray, held: np.ndarray) -> np.ndarray:
    """The lowest prices p >= 0 at which no server wants what it lacks, nor what another holds more than that one does.

        p_m >= f_m(i) for every i that m lacks,   p_m >= p_n - (f_n(i) - f_m(i)) for every i that n holds and m lacks

    Longest paths in the residual graph. If the plan is optimal they exist, and satisfy complementary slackness.

    Args:
        value: [N, I].
        held: bool [N, I].

    Returns:
        [N], of the type of `value`.
    """
    servers = len(value)
    price = np.where(held, 0, value).max(1)
    by_item, there = np.ascontiguousarray(value.T), np.ascontiguousarray(held.T)
    loss = np.zeros((servers, servers), value.dtype)  # of moving the cheapest item from row to column
    far = np.inf if value.dtype.kind == "f" else np.int64(2**61)
    for n in range(servers):
        items = np.flatnonzero(held[n])
        cost = by_item[items, n][:, None] - by_item[items]
        cost[there[items]] = far
        loss[n] = cost.min(0, initial=far)
    for _ in range(servers):
        raised = np.maximum(price, (price[:, None] - loss).max(0))
        if (raised == price).all():
            break
        price = raised
    return price


def _whole_units(values: np.ndarray, largest: int) -> np.ndarray:
    """`values` as multiples of their greatest common measure, int64; of the finest unit there is room for if none.

    Counts are whole numbers, `frequency` is counts times a constant: Euclid's algorithm finds the constant again.

    Args:
        values: float64, at least 0.
        largest: bound on the results.
    """
    top = float(values.max())
    if top == 0:
        return np.zeros(values.shape, np.int64)
    unit, tolerance = top, 1e-10 * top
    rest = np.unique(values[values > tolerance])
    while len(rest):
        unit = float(rest[0])
        rest = np.abs(rest - np.rint(rest / unit) * unit)
        rest = np.unique(rest[rest > tolerance])
    # A unit no larger than a thousand tolerances is noise, not a measure.
    unit = unit if unit > 1000 * tolerance and top / unit <= largest else top / min(largest, 2**40)
    return np.rint(values / unit).astype(np.int64)


def _preference(problem: Problem, levels: int) -> np.ndarray:
    """What decides ties, int64 [N, L, E] below `levels`: demand where a server has none of its own, then a hash.

    Generic low-order weights also spare the solver the work of telling equals apart.
    """
    wish = problem.demand / problem.demand.max(-1, keepdims=True)
    scrambled = (np.arange(wish.size, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    scrambled = (scrambled ^ (scrambled >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    hashed = (scrambled >> np.uint64(32)).astype(np.int64) % (levels // 8)
    return np.floor(wish * 7).astype(np.int64) * (levels // 8) + hashed.reshape(wish.shape)
