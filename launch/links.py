"""What the planner's probabilities mean for an exchange: whose first row goes without asking."""

import numpy as np

from placement.problem import Problem
from placement.step_time import traffic

# Asking costs a message each time, not asking a row each time that it was not needed. Messages of a few bytes take about as
# long as a row, so asking only ever saves bytes; from this probability on it saves too few of them.
LIKELY = 0.75


def likely_links(problem: Problem, serving: np.ndarray, threshold: float = LIKELY) -> np.ndarray:
    """Pairs of servers that a token is nearly sure to need, for `routing_tables`: bool [servers, layers, servers].

    Args:
        serving: int [servers, layers, experts] from `serving_server`.
        threshold: probability from which a row goes unasked.
    """
    return traffic(problem, serving).pairs >= threshold
