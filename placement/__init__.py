"""Where copies of experts should live: planning for servers of unequal memory, with numpy alone."""

from placement.data.cluster import Cluster, Device, Server
from placement.data.model_shapes import ModelShape
from placement.data.placement import Placement
from placement.data.problem import Problem
from placement.data.profile import Profile
from placement.data.statistics import DecayingCounts, drift, shrink
from placement.data.workload import Workload
from placement.files import InputError
from placement.migration.decide import Verdict, should_migrate
from placement.migration.diff import Diff, Move, Round, diff
from placement.planner import evaluate, network_bound, optimum, plan
from placement.registry import STRATEGIES, register

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
    "network_bound",
    "optimum",
    "plan",
    "register",
    "should_migrate",
    "shrink",
]
