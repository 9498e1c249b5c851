"""Statistics that age and statistics that are thin: decaying counts, shrinkage, divergence. Plans nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

# Statistics are called implausible from here on: a layer's assignments against the median layer's, assignments for each expert
# that make its absence strange, and the share of a layer's experts that is absent.
_UNEVEN, _MANY, _LEFT_OUT = 1.25, 16, 0.25


def decay(counts: np.ndarray, age_seconds: float, half_life: float) -> np.ndarray:
    """Counts as they weigh `age_seconds` later: counts 2^(-age / half-life).

    Args:
        counts: any shape.
        age_seconds: at least 0.
        half_life: seconds after which an observation counts half; greater than 0.

    Returns:
        float64, the same shape.

    Raises:
        ValueError: a negative age, or a half-life that is not positive.
    """
    if not half_life > 0:
        raise ValueError(f"half_life = {half_life}: must be greater than 0 seconds")
    if not age_seconds >= 0:
        raise ValueError(f"age_seconds = {age_seconds}: must be at least 0; observations come in order of time")
    return np.asarray(counts, np.float64) * 0.5 ** (age_seconds / half_life)


@dataclass(frozen=True, eq=False)
class DecayingCounts:
    """Exponentially decaying counts of a running total; `observe` gives the next state, this one stays as it is.

    Attributes:
        half_life: seconds after which an observation counts half.
        total: the running total at the last observation, any shape, such as [N, L, E].
        at_seconds: time of the last observation.
        counts: decayed counts, float64 of the same shape; zeros at first.
    """

    half_life: float
    total: np.ndarray
    at_seconds: float
    counts: np.ndarray = field(default=None)  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        if not (self.half_life > 0 and math.isfinite(self.half_life)):
            raise ValueError(f"half_life = {self.half_life}: must be a finite number of seconds greater than 0")
        object.__setattr__(self, "total", np.array(self.total))
        if self.counts is None:
            object.__setattr__(self, "counts", np.zeros(self.total.shape))
        self.counts.setflags(write=False)
        self.total.setflags(write=False)

    def observe(self, total: np.ndarray, at_seconds: float) -> "DecayingCounts":
        """State after the running total was read again; what came since the last time enters with full weight.

        Args:
            total: the running total, at least the last one everywhere.
            at_seconds: when it was read, not before the last time.

        Raises:
            ValueError: time or total ran backwards, or the shape changed.
        """
        total = np.asarray(total)
        if total.shape != self.total.shape:
            raise ValueError(f"total has shape {total.shape}; must be {self.total.shape} as before")
        if (total < self.total).any():
            raise ValueError("total is smaller than before; start anew from the total of a restarted counter")
        faded = decay(self.counts, at_seconds - self.at_seconds, self.half_life)
        return replace(self, total=total, at_seconds=at_seconds, counts=faded + (total - self.total))


def shrink(counts: np.ndarray, prior: float) -> np.ndarray:
    """Counts drawn towards what the other servers' users activate, the more the thinner they are.

    c'_n = c_n + N0 m_n in every layer, with m_n the distribution of all other servers' counts together: the posterior of
    a Dirichlet prior worth N0 assignments. A server without history gets the others' distribution, one with n assignments
    keeps the share n / (n + N0) of its own.

    Args:
        counts: [N, L, E].
        prior: N0 per server and layer, at least 0; 0 changes nothing.

    Returns:
        float64 [N, L, E]; unchanged where no other server has counts.

    >>> shrink(np.array([[[4, 0]], [[0, 0]]]), prior=2)[:, 0].tolist()  # the second server has no history
    [[4.0, 0.0], [2.0, 0.0]]
    """
    if not (prior >= 0 and math.isfinite(prior)):
        raise ValueError(f"prior = {prior}: must be a finite number, at least 0")
    counts = np.asarray(counts, np.float64)
    return counts + prior * distribution(counts.sum(0) - counts)


def implausible(counts: np.ndarray, layers: Sequence[int] | None = None) -> list[str]:
    """What in counts cannot come from a whole recording: one sentence each, none where they are plausible.

    Every token chooses as many experts in each layer, so that all layers have the same number of assignments; and where there
    are many assignments for each expert, a router that has been trained leaves few experts out.

    Args:
        counts: [N, L, E].
        layers: names of the layers for the sentences, [L]; None numbers them from 0.
    """
    by_expert = np.asarray(counts, np.float64).sum(0)
    totals, number = by_expert.sum(-1), by_expert.shape[1]
    unused = (by_expert == 0).sum(-1)
    if totals.min() >= _MANY * number and unused.min() >= number * _LEFT_OUT:
        least = f"{unused.min()}" if unused.min() == unused.max() else f"at least {unused.min()}"
        return [
            f"{least} of {number} experts of every layer were never counted in {totals.sum():,.0f} assignments; perhaps one "
            "rank of several was recorded"
        ]
    usual = max(float(np.median(totals)), 1e-9)
    ratio = totals / usual
    worst = int(np.abs(np.log(np.maximum(ratio, 1e-9))).argmax())
    if 1 / _UNEVEN <= ratio[worst] <= _UNEVEN:
        return []
    name = worst if layers is None else layers[worst]
    return [
        f"layer {name} has {ratio[worst]:.3g} times the assignments of a usual layer, though every token chooses as many "
        "experts in each; perhaps recordings of different length or models are mixed"
    ]


def distribution(counts: np.ndarray) -> np.ndarray:
    """Counts over their sum along the last axis; zeros stay zeros, float64."""
    counts = np.maximum(np.asarray(counts, np.float64), 0.0)
    total = counts.sum(-1, keepdims=True)
    return np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)


def divergence(counts: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of two distributions over the last axis, in bits.

    JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2, between 0 (the same) and 1 (nothing in common).

    Args:
        counts, other: [..., E], any scale.

    Returns:
        float64 [...]; NaN where one of them has no counts.

    References:
        Lin, "Divergence measures based on the Shannon entropy", IEEE Transactions on Information Theory, 1991.
    """
    p, q = distribution(counts), distribution(other)
    value = _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2
    return np.where((p.sum(-1) > 0) & (q.sum(-1) > 0), value.clip(0.0, 1.0), np.nan)


def divergence_of_chance(counts: np.ndarray, other: np.ndarray) -> np.ndarray:
    """What `divergence` is expected to find between two samples of one distribution: (S - 1)(1/n + 1/m) / (8 ln 2) bits.

    S experts are used by either; n and m assignments. The leading term for large samples, at most 1. Assignments are
    taken as independent; those of one token or text are not, so real chance is somewhat larger.

    Args:
        counts, other: [..., E], as counted, not normalized.

    Returns:
        float64 [...].
    """
    used = ((counts > 0) | (other > 0)).sum(-1)
    sizes = [np.maximum(np.asarray(c, np.float64).sum(-1), 1e-9) for c in (counts, other)]
    return np.minimum(np.maximum(used - 1, 0) * (1 / sizes[0] + 1 / sizes[1]) / (8 * math.log(2)), 1.0)


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log2(p, out=np.zeros_like(p), where=p > 0)).sum(-1)


def top_share(counts: np.ndarray, part: float = 0.25) -> np.ndarray:
    """Share of each server's assignments that the most used `part` of each server's experts serves.

    Row: whose experts; column: whose assignments. The diagonal against the rest is what knowing the source is worth.

    Args:
        counts: [N, L, E].
        part: of the experts of a layer, at least one.

    Returns:
        float64 [N, N], mean over the layers in which both have counts; NaN where there is none.
    """
    p = distribution(counts)
    number = max(1, round(part * p.shape[-1]))
    top = np.zeros(p.shape, bool)
    np.put_along_axis(top, np.argsort(-p, axis=-1, kind="stable")[..., :number], True, axis=-1)
    known = (p.sum(-1) > 0).astype(np.float64)
    shared = np.einsum("nle,mle->nm", top * known[..., None], p)
    layers = known @ known.T
    return np.divide(shared, layers, out=np.full(layers.shape, np.nan), where=layers > 0)


def drift(counts: np.ndarray, against: np.ndarray | None = None) -> dict[str, Any]:
    """How far servers differ from one another, and from themselves in another window.

    Args:
        counts: [N, L, E].
        against: the same servers' counts in another window, [N, L, E].

    Returns:
        `between_servers` and `between_servers_by_chance`: [N, N], mean over layers, bits; `between_servers_by_layer`:
        [L], mean over pairs; `own_top_quarter` and `others_top_quarter`: see `top_share`, mean over servers and over
        pairs of different ones (None for a single server); with `against` also `between_windows`: [N, L],
        `between_windows_mean` and `between_windows_by_chance`: [N]. NaN where there are no counts.

    >>> drift(np.array([[[8, 0]], [[0, 8]]]))["between_servers"].tolist()  # bits: 0 is alike, 1 nothing in common
    [[0.0, 1.0], [1.0, 0.0]]
    """
    pairs = divergence(counts[:, None], counts[None])
    off = ~np.eye(len(counts), dtype=bool)
    shares = top_share(counts)
    result = {
        "between_servers": _mean(pairs, -1),
        "between_servers_by_chance": _mean(divergence_of_chance(counts[:, None], counts[None]), -1),
        "between_servers_by_layer": _mean(pairs[off], 0) if off.any() else np.full(counts.shape[1], np.nan),
        "own_top_quarter": _mean(np.diagonal(shares), 0),
        "others_top_quarter": _mean(shares[off], 0),
    }
    if against is not None:
        windows = divergence(counts, against)
        result["between_windows"] = windows
        result["between_windows_mean"] = _mean(windows, -1)
        result["between_windows_by_chance"] = _mean(divergence_of_chance(counts, against), -1)
    return result


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of what is not NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    number = known.sum(axis)
    total = np.where(known, values, 0.0).sum(axis)
    return np.divide(total, number, out=np.full(np.shape(number), np.nan), where=number > 0)
