"""Moves that the local search of `latency` may make, each with the seconds that it is expected to change."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from placement.data.problem import Problem

_FEW = 3  # layers tried for what an only copy that moves leaves and takes
_CANDIDATES = 4  # experts of a server and layer tried, each way, where both belong to one layer

Move = tuple[tuple[int, int, int, bool], ...]  # (server, layer, expert, added) of every change
Offer = tuple[np.ndarray, Callable[..., Any]]  # seconds of moves, infinite where impossible; a move from their indices


@dataclass(eq=False)
class Effects:
    """Change of time, in seconds, that single changes of `held` make; infinite where impossible.

    Attributes:
        time: of each layer as it is, float64 [L].
        drop: server n gives up an expert of which there is another copy, float64 [N, L, E].
        add: server n gets an expert, float64 [N, L, E].
        shift: the only copy goes from its holder to server m, float64 [N (m), L, E]; None where it is not counted.
    """

    time: np.ndarray
    drop: np.ndarray
    add: np.ndarray
    shift: np.ndarray | None


def across_layers(problem: Problem, effects: Effects, tie_break: np.ndarray | float, room: np.ndarray) -> list[Offer]:
    """Moves by which a server's experts of one layer make room for those of another.

    Args:
        tie_break: seconds in favor of each copy, float64 [N, L, E], or 0.
        room: free bytes of each server, int64 [N].
    """
    drop, add = effects.drop + tie_break, effects.add - tie_break
    offers = _swaps(problem, drop, add, room)
    if effects.shift is not None:
        offers += _handovers(problem, effects, effects.shift, drop, add, room)
    return offers


def within_one_layer(
    problem: Problem, effects: Effects, tie_break: np.ndarray | float, room: np.ndarray
) -> list[Offer]:
    """Moves that leave every server as many experts of each layer: a swap, and two servers that trade only copies.

    Both changes touch one layer, so their seconds only nearly add up.
    """
    servers, layers, experts = problem.shape
    few = min(_CANDIDATES, experts)
    drop, add = effects.drop + tie_break, effects.add - tie_break
    out, into = np.argsort(drop, -1)[..., :few], np.argsort(add, -1)[..., :few]
    loss, gain = np.take_along_axis(drop, out, -1), np.take_along_axis(add, into, -1)
    offers: list[Offer] = [
        (
            loss[..., :, None] + gain[..., None, :],
            lambda n, i, a, b: ((n, i, out[n, i, a], False), (n, i, into[n, i, b], True)),
        )
    ]
    if effects.shift is None:
        return offers
    only = np.isinf(effects.drop) & np.isinf(effects.add)
    handed = np.where(only[:, None], effects.shift[None], np.inf)  # from n to m: [N (n), N (m), L, E]
    which = np.argsort(handed, -1)[..., :few]
    hand = np.take_along_axis(handed, which, -1)
    # The receiver gives up a duplicate, the giver takes what it wants most; or both hand over an only copy.
    one_way = hand[..., :, None] + loss[None, ..., None, :] + gain[:, None, :, :1, None]
    back = hand[..., :, None] + hand.swapaxes(0, 1)[..., None, :]
    back[~np.triu(np.ones((servers, servers), bool), 1)] = np.inf

    def make_room(n: int, m: int, i: int, a: int, b: int) -> Move:
        moved = which[n, m, i, a]
        return (n, i, moved, False), (m, i, moved, True), (m, i, out[m, i, b], False), (n, i, into[n, i, 0], True)

    def exchange(n: int, m: int, i: int, a: int, b: int) -> Move:
        mine, theirs = which[n, m, i, a], which[m, n, i, b]
        return (n, i, mine, False), (m, i, mine, True), (m, i, theirs, False), (n, i, theirs, True)

    return [*offers, (one_way, make_room), (back, exchange)]


def _swaps(problem: Problem, drop: np.ndarray, add: np.ndarray, room: np.ndarray) -> list[Offer]:
    """A server gives up one copy for another, or takes one into free room: seconds of each, and what makes the move."""
    out, into = drop.argmin(-1), add.argmin(-1)  # [N, L]
    loss, gain = drop.min(-1), add.min(-1)
    swap = np.where(_fits(problem, room), gain[:, :, None] + loss[:, None, :], np.inf)
    alone = np.where(problem.expert_bytes <= room[:, None], gain, np.inf)
    return [
        (swap, lambda n, j, i: ((n, i, out[n, i], False), (n, j, into[n, j], True))),
        (alone, lambda n, j: ((n, j, into[n, j], True),)),
    ]


def _handovers(
    problem: Problem, effects: Effects, shift: np.ndarray, drop: np.ndarray, add: np.ndarray, room: np.ndarray
) -> list[Offer]:
    """An only copy of layer i goes from n to m, which makes room, or gives an only copy of layer j in return."""
    servers, layers, _ = problem.shape
    out, into = drop.argmin(-1), add.argmin(-1)
    loss, gain, fits = drop.min(-1), add.min(-1), _fits(problem, room)
    only = np.isinf(effects.drop) & np.isinf(effects.add)
    handed = np.where(only[:, None], shift[None], np.inf)
    which, hand = handed.argmin(-1), handed.min(-1)  # [N (n), N (m), L]
    few = min(_FEW, layers)
    freed, wanted = np.argsort(loss, -1)[:, :few], np.argsort(gain, -1)[:, :few]  # [N, few]
    n, m, i, a, b = np.ix_(*(np.arange(size) for size in (servers, servers, layers, few, few)))
    f, w = freed[m, a], wanted[n, b]
    value = hand[n, m, i] + loss[m, f] + gain[n, w]
    one_way = np.where((i != f) & (i != w) & (f != w) & fits[m, i, f] & fits[n, w, i], value, np.inf)

    def make_room(n: int, m: int, i: int, a: int, b: int) -> Move:
        f, w = freed[m, a], wanted[n, b]
        moved = which[n, m, i]
        return (n, i, moved, False), (m, i, moved, True), (m, f, out[m, f], False), (n, w, into[n, w], True)

    n, m, i, j = np.ix_(*(np.arange(size) for size in (servers, servers, layers, layers)))
    value = hand[n, m, i] + hand[m, n, j]
    both_ways = np.where((n < m) & (i != j) & fits[m, i, j] & fits[n, j, i], value, np.inf)

    def exchange(n: int, m: int, i: int, j: int) -> Move:
        mine, theirs = which[n, m, i], which[m, n, j]
        return (n, i, mine, False), (m, i, mine, True), (m, j, theirs, False), (n, j, theirs, True)

    return [(one_way, make_room), (both_ways, exchange)]


def _fits(problem: Problem, room: np.ndarray) -> np.ndarray:
    """Whether a server has the bytes after layer l loses a copy and layer j gets one: bool [N, j, l]."""
    return problem.expert_bytes[:, None] <= room[:, None, None] + problem.expert_bytes
