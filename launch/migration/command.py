"""What a migration worker is to do and what came of it, as they travel between servers."""

import io
import json
from dataclasses import dataclass, field

import numpy as np

from placement import Placement
from placement.files import parse_json


@dataclass(frozen=True, eq=False)
class MigrationCommand:
    """A placement to reach.

    Attributes:
        number: counted from 1.
        placement: with the sizes of the model that runs.
        likely: bool [servers, layers, servers], see `Loaded.likely`.
        epoch: of the placement, once it is in force; reason: why it is to be.
    """

    number: int
    placement: Placement
    likely: np.ndarray
    epoch: int
    reason: str

    def encode(self) -> bytes:
        """The command as it travels; `decode` reads it."""
        about = {"number": self.number, "epoch": self.epoch, "reason": self.reason, "strategy": self.placement.strategy}
        buffer = io.BytesIO()
        packed = np.packbits(self.placement.resident)
        np.savez_compressed(buffer, resident=packed, likely=self.likely, about=np.array(json.dumps(about)))
        return buffer.getvalue()

    @classmethod
    def decode(cls, data: bytes, present: Placement) -> "MigrationCommand":
        """A command to change the placement in force."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            about = parse_json(str(arrays["about"]), "migration command")
            shape = present.resident.shape
            resident = np.unpackbits(arrays["resident"], count=int(np.prod(shape))).reshape(shape).astype(bool)
            target = Placement(resident, present.devices, about["strategy"], present.model, source=about["reason"])
            return cls(about["number"], target, arrays["likely"], about["epoch"], about["reason"])


@dataclass(eq=False)
class MigrationResult:
    """What has become of a command, on this server.

    Attributes:
        moved: copies written here, bytes: of them; rounds: committed.
        staged: bytes that were read, once for all devices here; stage_s: for how long; seconds: in all.
        failed: why it ended before its placement was reached; "" if it was.
        stalls_s: what tables and each slice of writing took between two steps.
    """

    number: int
    moved: int = 0
    bytes: int = 0
    staged: int = 0
    rounds: int = 0
    stage_s: float = 0.0
    seconds: float = 0.0
    failed: str = ""
    stalls_s: list[float] = field(default_factory=list)
