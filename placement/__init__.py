"""Where copies of experts should live: planning for servers of unequal memory, with numpy alone."""

from placement.files import InputError
from placement.migration import Diff, Move, Round, Verdict, diff, should_migrate
from placement.model_shapes import ModelShape
from placement.placement import Placement
from placement.planner import STRATEGIES, evaluate, optimum, plan
from placement.problem import Problem
from placement.profile import Profile
from placement.statistics import DecayingCounts, drift, shrink
from placement.types import Cluster, Device, Server
from placement.workload import Workload

__all__ = [
    "STRATEGIES",
    "Cluster",
    "DecayingCounts",
    "Device",
    "Diff",
    "InputError",
    "ModelShape",
    "Move",
    "Placement",
    "Problem",
    "Profile",
    "Round",
    "Server",
    "Verdict",
    "Workload",
    "diff",
    "drift",
    "evaluate",
    "optimum",
    "plan",
    "should_migrate",
    "shrink",
]
