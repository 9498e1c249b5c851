"""A request and how far it has come. Holds no queue and takes no step."""

import dataclasses
from collections.abc import Callable

import numpy as np

from dancemoe_jax.inference.sampling import SamplingParams


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt that entered at a server, and how far it has come.

    Attributes:
        max_tokens: of the answer; `params.max_tokens` is not looked at.
        arrival_s: when it arrived; `finished_s` when its last token came, on the caller's clock.
        params: how its tokens are chosen.
        stop_token_ids: tokens that end it beside the model's own.
        hear: called with every token of the answer; true ends it.
        routed: experts of its tokens and their weights, [tokens, MoE layers, k] each, prompt then answer without its last
            token: a replay (`Engine(replays=True)`), which no end-of-text ends.
        reason: why it ended: "stop", "length" or "cancelled".
        epochs: the engine's epochs (placements) under which its steps ran.
    """

    server: int
    prompt: list[int]
    max_tokens: int
    arrival_s: float
    label: str = ""
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    stop_token_ids: frozenset[int] = frozenset()
    on_token: Callable[[int], bool] | None = None
    routed: tuple[np.ndarray, np.ndarray] | None = None
    output: list[int] = dataclasses.field(default_factory=list)
    done: int = 0  # prompt tokens in the cache
    kept: int = 0  # tokens of the answer that count as prompt, as the cache that held them is gone
    finished_s: float | None = None
    reason: str = ""
    cancelled: bool = False
    epochs: set[int] = dataclasses.field(default_factory=set)

    @property
    def greedy(self) -> bool:
        return self.params.temperature == 0 and self.params.repetition_penalty == 1

    @property
    def prefix(self) -> list[int]:
        """Tokens to prefill."""
        return self.prompt + self.output[: self.kept] if self.kept else self.prompt

    @property
    def prefilled(self) -> bool:
        return self.done == len(self.prompt) + self.kept

    def restart(self) -> None:
        """Begin anew in an engine that knows nothing of it, with what has been answered so far."""
        self.done, self.kept = 0, len(self.output)
