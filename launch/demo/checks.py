"""The demo's checks: what the dense model on one device answers, and how often anything was compiled."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.monitoring
import numpy as np

from dancemoe_jax.checkpoint.reader import Model, on_device
from dancemoe_jax.model.decoder import forward
from launch.engine.request import Request

BATCH = 8
_COMPILED = "/jax/core/compile/backend_compile_duration"


def check_requests(model: Model, requests: Sequence[Request]) -> dict[str, Any]:
    """Compare each request's output with the greedy choice of the dense model, token by token.

    One pass over prompt and output gives the choice after every prefix, so equality at all of them means that the dense
    model, left to itself, would have generated the same text.
    """
    config, experts = model.config, on_device(model.config, model.experts)
    choose = jax.jit(lambda tokens: forward(config, model.decoder, experts, tokens)[0].argmax(-1))
    wrong: list[str] = []
    checked = 0
    for start in range(0, len(requests), BATCH):
        some = requests[start : start + BATCH]
        tokens = np.zeros((BATCH, config.max_position), np.int32)
        for row, request in zip(tokens, some, strict=False):
            text = request.prompt + request.output
            row[: len(text)] = text[: config.max_position]
        chosen = np.asarray(choose(tokens))
        for row, request in zip(chosen, some, strict=False):
            expected = row[len(request.prompt) - 1 :][: len(request.output)].tolist()
            checked += len(expected)
            if expected != request.output:
                at = next(i for i, pair in enumerate(zip(expected, request.output, strict=True)) if len(set(pair)) > 1)
                wrong.append(f"server {request.server}, epochs {sorted(request.epochs)}, output token {at}")
    first = wrong[0] if wrong else None
    return {
        "requests_checked": len(requests),
        "tokens_checked": checked,
        "mismatches": len(wrong),
        "first_mismatch": first,
        "checked_across_migrations": sum(len(request.epochs) > 1 for request in requests),
    }


class CompilationCounter:
    """Counts XLA compilations in this process between `start` and `stop`."""

    def __init__(self):
        self._count, self._counting = 0, False
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def start(self) -> None:
        self._count, self._counting = 0, True

    @property
    def count(self) -> int:
        return self._count

    def stop(self) -> int:
        self._counting = False
        return self._count

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        self._count += self._counting and event == _COMPILED
