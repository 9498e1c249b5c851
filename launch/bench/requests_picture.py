"""What came of a load as one picture: the times of every request over its arrival, and how they are spread."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.bench.sent_request import Sent
from placement import InputError
from placement.files import write_bytes

_SUFFIXES = (".png", ".svg")
_WHOLE, _FIRST, _REFUSED, _SOFT = "#0072B2", "#E69F00", "#D55E00", "#5d6771"


def check_picture(path: Path) -> None:
    """Raise InputError, before any work, where a picture could not be written."""
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(f"--picture {path}: give a name that ends with {' or '.join(_SUFFIXES)}")
    if not path.parent.is_dir():
        raise InputError(f"--picture {path}: there is no folder {path.parent}; make it first")


def draw_requests(sent: Sequence[Sent], title: str, path: Path) -> None:
    """Write the picture, whole or not at all. Raises InputError where it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure, (over, spread) = pyplot.subplots(
            1, 2, figsize=(8, 3.2), width_ratios=(2, 1), layout="constrained", facecolor="white"
        )
        good, bad = [one for one in sent if one.good], [one for one in sent if not one.good]
        for name, color, values in (
            ("whole answer", _WHOLE, [one.last for one in good]),
            ("first token", _FIRST, [one.first for one in good]),
        ):
            over.plot([one.due for one in good], values, ".", ms=3, color=color, label=name)
            if values:
                spread.plot(np.sort(values), np.arange(1, len(values) + 1) / len(values) * 100, color=color)
        if bad:
            least = min((one.first for one in good), default=1e-3)
            label = f"not answered ({len(bad)})"
            over.plot([one.due for one in bad], [least / 2] * len(bad), "|", ms=6, color=_REFUSED, label=label)
        for axis in (over.yaxis, spread.xaxis):
            axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        over.set(xlabel="arrival, s", ylabel="seconds since it was due")
        spread.set(xlabel="seconds", ylabel="% of answered requests")
        over.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8, frameon=False)
        figure.suptitle(title, fontsize=9, color=_SOFT)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=path.suffix.lower()[1:], dpi=120)
        pyplot.close(figure)
    write_bytes(path, buffer.getvalue())
