"""What steps have done: assignments by device and layer, and how many layers' steps crossed servers. Holds no engine."""

import dataclasses

import numpy as np

from dancemoe_jax.expert_parallel.dispatch import Traffic
from dancemoe_jax.mesh import own_rows


@dataclasses.dataclass
class StepCounters:
    """Sums over steps, of this process's devices.

    Attributes:
        local, remote: assignments of tokens that entered at a device, to experts on its server and elsewhere, int64
            [devices, layers].
        crossings: rows that had to leave their server; rows: those that did, int64 [devices, layers].
        steps: how many; layer_steps: times MoE layers, so pairs (step, layer).
        layer_steps_crossing: pairs in which some token had to leave its server.
    """

    local: np.ndarray
    remote: np.ndarray
    crossings: np.ndarray
    rows: np.ndarray
    steps: int = 0
    layer_steps: int = 0
    layer_steps_crossing: int = 0

    @classmethod
    def zero(cls, devices: int, layers: int) -> "StepCounters":
        """Nothing done yet."""
        local, remote, crossings, rows = np.zeros((4, devices, layers), np.int64)
        return cls(local, remote, crossings, rows)

    def add(self, traffic: Traffic) -> None:
        """Count a step."""
        crossing = np.zeros(self.crossings.shape[1], bool)
        for name, part in traffic._asdict().items():
            for device, layers in own_rows(part).items():
                getattr(self, name)[device] += layers
                if name == "crossings":
                    crossing |= layers > 0
        self.steps += 1
        self.layer_steps += len(crossing)
        self.layer_steps_crossing += int(crossing.sum())
