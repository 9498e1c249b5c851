"""Where copies of experts should live: planning for servers of unequal memory, with numpy alone."""

from placement.files import InputError
from placement.placement import Placement
from placement.planner import STRATEGIES, evaluate, plan
from placement.problem import Problem
from placement.profile import Profile
from placement.types import Cluster, Device, Server

__all__ = [
    "STRATEGIES",
    "Cluster",
    "Device",
    "InputError",
    "Placement",
    "Problem",
    "Profile",
    "Server",
    "evaluate",
    "plan",
]
