"""What each device tells all others with every step: the columns of a step's control word. Sends nothing itself."""

from typing import NamedTuple

import numpy as np

from placement.scheduling import Wish


class ControlWord(NamedTuple):
    """The control words of all devices, one int32 array [devices] a column.

    Attributes:
        prefill, decode: what the device wants after this step (placement.scheduling.Wish).
        done: its process has no more requests to come and none in flight; stop: it wants all to end now.
        reform: its process is ready to leave for another program.
        command, stage: the migration command that its process carries out, and how far it has come.
        given_up: the last migration command that its process gives up.
        hold: its process may have something to do between this step and the next, which must not begin before.
    """

    prefill: np.ndarray
    decode: np.ndarray
    done: np.ndarray
    stop: np.ndarray
    reform: np.ndarray
    command: np.ndarray
    stage: np.ndarray
    given_up: np.ndarray
    hold: np.ndarray

    @classmethod
    def of(cls, words: np.ndarray) -> "ControlWord":
        """Columns of int32 [devices, WIDTH], as views: what is written to them is written to `words`."""
        return cls(*words.T)

    @property
    def wish(self) -> Wish:
        """The largest wishes of all devices together."""
        return Wish(int(self.prefill.max()), bool(self.decode.any()))


WIDTH = len(ControlWord._fields)


def blank(devices: int) -> np.ndarray:
    """Control words that say nothing, int32 [devices, WIDTH]."""
    return np.zeros((devices, WIDTH), np.int32)


class MigrationProgress(NamedTuple):
    """What a process tells of a migration, as the columns of the same names."""

    command: int = 0
    stage: int = 0
    given_up: int = 0
