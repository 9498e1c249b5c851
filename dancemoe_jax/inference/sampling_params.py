"""How one request's tokens are chosen, as a client says it. Loads no JAX; sampling.py does what is said."""

import dataclasses
import math
from typing import Any

from dancemoe_jax.errors import RequestError


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen, and where its output ends.

    Attributes:
        max_tokens: tokens to generate at most.
        temperature: 0 takes the likeliest token.
        top_k: sample among so many likeliest tokens; 0 = all.
        top_p: sample among the fewest likeliest tokens that together are as probable as this; 1 = all.
        min_p: sample among tokens at least this many times as probable as the likeliest; 0 = all.
        repetition_penalty: above 1 makes tokens of prompt and output less likely; 1 = off.
        seed: two requests that differ in nothing get the same tokens.
        stop: texts that end the output, which does not contain them.
        stop_tokens: tokens that do so beside the model's own.

    Raises:
        RequestError: a value that means nothing.
    """

    max_tokens: int = 100
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        def check(name: str, good: bool, rule: str) -> None:
            if not good:
                raise RequestError(f"sampling: {name} = {getattr(self, name)!r}, must be {rule}")

        check("max_tokens", _integer(self.max_tokens, 1), "an integer of at least 1")
        check("temperature", _number(self.temperature) and self.temperature >= 0, "a number of at least 0 (0 = greedy)")
        check("top_k", _integer(self.top_k, 0, 2**31), "an integer of at least 0 (0 = all tokens)")
        check("top_p", _number(self.top_p) and 0 < self.top_p <= 1, "a number above 0 and at most 1 (1 = all tokens)")
        check("min_p", _number(self.min_p) and 0 <= self.min_p <= 1, "a number from 0 to 1 (0 = all tokens)")
        penalty = self.repetition_penalty
        check("repetition_penalty", _number(penalty) and 0 < penalty < 1e4, "a number above 0 (1 = no penalty)")
        check("seed", _integer(self.seed, 0, 2**32), "an integer from 0 to 4294967295")
        stop, tokens = self.stop, self.stop_tokens
        strings = isinstance(stop, tuple) and all(isinstance(text, str) and text for text in stop)
        check("stop", strings, "a tuple of texts, none of them empty")
        integers = isinstance(tokens, tuple) and all(_integer(token, 0) for token in tokens)
        check("stop_tokens", integers, "a tuple of token ids")


def _integer(value: Any, least: int, below: int | float = math.inf) -> bool:
    return type(value) is int and least <= value < below


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
