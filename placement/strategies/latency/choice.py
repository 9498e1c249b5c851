"""Which of several plans `latency` takes: fast on an idle cluster and on a busy one."""

from collections.abc import Sequence

import numpy as np

from placement.costs.step_time import predict
from placement.data.problem import Problem
from placement.strategies.latency.busy import busy_seconds

_EQUAL = 1e-9  # relative difference of seconds below which plans are equally fast


class Known:
    """Plans with their seconds on an idle cluster and on a busy one.

    A plan counts as slow by how much it is slower, idle or busy, than the fastest of the plans given at the start; then by
    the product of both, so that a tenth less of either is worth as much. Plans that were made for these very tokens fit them
    better than those to come: such a plan has to gain half a standard error of what was counted, 1 / (2 sqrt(tokens)).
    """

    def __init__(self, problem: Problem, previous: np.ndarray | None, plans: Sequence[np.ndarray]):
        """Start from plans of other strategies.

        Args:
            previous: bool [D, L, E], the placement in force; of equally fast plans the one with fewest bytes to move is taken.
            plans: bool [D, L, E] each.
        """
        self._problem, self._previous = problem, previous
        self.plans: list[np.ndarray] = []
        self.seconds: list[tuple[float, float]] = []
        self.add(plans)
        self._given, counted = len(plans), problem.counted
        self._doubt = 1.0 / (2.0 * np.sqrt(counted)) if counted > 0 else 0.0  # nothing to fit
        self._least = np.maximum(np.min(self.seconds, axis=0), np.finfo(float).tiny)

    def add(self, plans: Sequence[np.ndarray]) -> None:
        """Count the seconds of more plans."""
        for plan in plans:
            self.plans.append(plan)
            self.seconds.append((predict(self._problem, plan)["step_seconds"], busy_seconds(self._problem, plan)))

    def best(self) -> np.ndarray:
        """The plan that is taken; of equally fast ones the one with fewest bytes to move, then the first."""
        keys = [self._slowness(pair) for pair in self.seconds]
        choice, given = self._first(keys), self._first(keys[: self._given])
        gained = keys[choice][1] < keys[given][1] * (1 - self._doubt) ** 2 or keys[choice][0] < keys[given][0]
        return self.plans[choice if gained else given]

    def fastest_when_idle(self) -> np.ndarray:
        """The plan to search from first."""
        return self.plans[self._first([(seconds, seconds) for seconds, _ in self.seconds])]

    def _slowness(self, seconds: tuple[float, float]) -> tuple[float, float]:
        over = float((np.array(seconds) / self._least).max())
        return max(over, 1.0), seconds[0] * seconds[1]

    def _first(self, keys: Sequence[tuple[float, float]]) -> int:
        moved = [self._moved(plan) for plan in self.plans]
        choice = 0
        for i, key in enumerate(keys):
            for mine, theirs in zip(key, keys[choice], strict=True):
                if abs(mine - theirs) > _EQUAL * theirs:
                    choice = i if mine < theirs else choice
                    break
            else:
                choice = i if moved[i] < moved[choice] else choice
        return choice

    def _moved(self, plan: np.ndarray) -> int:
        new = 0 if self._previous is None else plan & ~self._previous
        return int((new * self._problem.expert_bytes[:, None]).sum())
