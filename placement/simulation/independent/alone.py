"""What requests take one at a time on an idle cluster, which is what `advise` tells. Holds no queue."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from placement.data.arrivals import Arrivals
from placement.simulation.independent.unit_costs import Compute, Steps


def measured_compute(usual: Compute, prefill: Sequence[float], decode: Sequence[float], chunk: int) -> Compute:
    """Speed of devices from measured steps of one sequence at home, in place of a roofline's.

    Args:
        usual: says which part of a prompt token's time experts take.
        prefill, decode: seconds of a step, and for each busy device, and for each row (`StepCosts`).
        chunk: prompt tokens of a step.
    """
    step, device, row = prefill
    every_step, every_device, token = decode
    prompt = (step + device) / chunk + row
    return replace(usual, prefill_token=prompt, decode_step=every_step + every_device, decode_token=token)


def alone_seconds(steps: Steps, arrivals: Arrivals, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """To the first and to the last token of each request, as if there were no other: float64 [R] each.

    Args:
        steps: of the placement.
        chunk: prompt tokens of a step at most.
    """
    servers = steps.base.shape[1] // 4
    whole, decoded = (
        np.array([steps.alone(n, np.array(amount)) for n in range(servers)])
        for amount in ((float(chunk), 0.0, 0.0), (0.0, 1.0, 1.0))
    )
    first = whole[arrivals.server] * (arrivals.prompt // chunk)
    for r in np.flatnonzero(arrivals.prompt % chunk):
        first[r] += steps.alone(int(arrivals.server[r]), np.array([float(arrivals.prompt[r] % chunk), 0.0, 0.0]))
    return first, first + decoded[arrivals.server] * (arrivals.output - 1)
