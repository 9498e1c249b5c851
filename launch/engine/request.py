"""A request and how far it has come. Holds no queue and takes no step."""

import dataclasses
from collections.abc import Callable

import numpy as np

from dancemoe_jax.errors import RequestError
from dancemoe_jax.inference.prompts import check_prompt
from dancemoe_jax.inference.sampling_params import SamplingParams
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.text.grammar import GrammarState
from placement.scheduling import Progress

Logprobs = tuple[float, list[tuple[int, float]]]
"""Of the chosen token, and (token, its own) of the likeliest, by the model's logits as they are."""


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt that entered at a server, and how far it has come.

    Attributes:
        max_tokens: of the answer; `params.max_tokens` is not looked at.
        arrival_s: when it arrived; `finished_s` when its last token came, on the caller's clock.
        params: how its tokens are chosen.
        stop_token_ids: tokens that end it beside the model's own.
        on_token: called with every token of the answer, the last one too; true ends it.
        on_begin: called whenever it gets a batch slot.
        done: tokens of its prompt that are in the cache, or will be after the steps under way; found: those that were there
            when it began.
        coming: tokens of its answer that steps under way will give it.
        kept: tokens of its answer that count as prompt, as the cache that held them is gone.
        routed: experts of its tokens and their weights, [tokens, MoE layers, k] each, prompt then answer without its last
            token: a replay (`Engine(replays=True)`), which no end-of-text ends.
        reason: why it ended: "stop", "length", "cancelled" or "error".
        epochs: the engine's epochs (placements) under which its steps ran.
        logprobs: of how many likeliest tokens beside the chosen one it wants the logarithms of their probabilities; None:
            of none at all. last_logprobs: those of its last token.
        error: why it has ended where no answer could be given.
        grammar: what its answer has to be, and how far it has come; None: anything.
        wants_servers: it wants to know who served its last token; served_by: calls of experts by server, of that token.
    """

    server: int
    prompt: list[int]
    max_tokens: int
    arrival_s: float
    label: str = ""
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    stop_token_ids: frozenset[int] = frozenset()
    on_token: Callable[[int], bool] | None = None
    on_begin: Callable[[], None] | None = None
    routed: tuple[np.ndarray, np.ndarray] | None = None
    output: list[int] = dataclasses.field(default_factory=list)
    done: int = 0
    found: int = 0
    coming: int = 0
    kept: int = 0
    finished_s: float | None = None
    reason: str = ""
    cancelled: bool = False
    epochs: set[int] = dataclasses.field(default_factory=set)
    logprobs: int | None = None
    last_logprobs: Logprobs | None = None
    error: str = ""
    grammar: GrammarState | None = None
    wants_servers: bool = False
    served_by: list[int] = dataclasses.field(default_factory=list)

    @property
    def greedy(self) -> bool:
        """Whether each of its tokens is the likeliest of all."""
        return self.params.temperature == 0 and self.params.repetition_penalty == 1 and self.grammar is None

    @property
    def prompt_tokens(self) -> int:
        """Tokens to prefill: its prompt, and what of its answer counts as such."""
        return len(self.prompt) + self.kept

    @property
    def prefilled(self) -> bool:
        """Whether the cache holds all that comes before its next token."""
        return self.done == self.prompt_tokens

    def progress(self, context: int) -> Progress:
        """How far it will have come after the steps under way, for the scheduler; context: longest sequence, in tokens."""
        prompt, answered = self.prompt_tokens, len(self.output) + self.coming
        # The last token of the answer has been given, but has not been through a step.
        cached = self.done if self.done < prompt else len(self.prompt) + answered - 1
        return Progress(self.arrival_s, prompt, cached, self._most(context) - answered)

    def tokens(self, start: int, count: int) -> list[int]:
        """Tokens of prompt and answer from position `start` on; fewer than `count` where the last are still to come."""
        answered = max(0, start - len(self.prompt))
        return self.prompt[start : start + count] + self.output[answered : max(0, start + count - len(self.prompt))]

    def take(self, token: int, eos: int | None, context: int) -> bool:
        """Take the next token of the answer; whether it has ended the request.

        Args:
            eos: ends the answer; None: nothing does. context: longest sequence, in tokens.
        """
        self.output.append(token)
        ends = self.on_token is not None and self.on_token(token)
        if self.grammar is not None and (error := self.grammar.take(token)):
            self.reason, self.error = "error", f"the answer cannot go on in its form ({error})"
        elif ends or token == eos or token in self.stop_token_ids:
            self.reason = "stop"
        elif len(self.output) >= self._most(context):
            self.reason = "length"
        return bool(self.reason)

    def restart(self) -> None:
        """Begin anew in an engine that knows nothing of it, with what has been answered so far."""
        self.done, self.found, self.coming, self.kept = 0, 0, 0, len(self.output)

    def check(self, config: ModelConfig, replays: bool) -> None:
        """Whether an engine can serve it.

        Args:
            replays: the engine takes given routing (`Engine(replays=True)`).

        Raises:
            RequestError: its prompt is no prompt of the model or too long, or its routing does not fit.
        """
        check_prompt(config, self.prompt, "request")
        if (self.routed is not None) != replays:
            raise RequestError(
                f"request: this engine {'replays' if replays else 'routes'} its requests; give `routed` "
                f"{'with each of them' if replays else 'to one with replays=True'}"
            )
        if self.routed is None:
            return
        fed = min(len(self.prompt) + self.max_tokens - 1, config.max_position)
        ids, weights = self.routed
        each = (config.num_moe_layers, config.top_k)
        if ids.shape != weights.shape or ids.shape[1:] != each or len(ids) < fed:
            raise RequestError(
                f"request: routing of shapes {ids.shape} and {weights.shape}; {fed} tokens are fed, give "
                f"[at least {fed}, {each[0]}, {each[1]}] for both"
            )
        if ids.min() < 0 or ids.max() >= config.num_experts:
            raise RequestError(f"request: routing names experts outside 0..{config.num_experts - 1}")

    def _most(self, context: int) -> int:
        """Tokens of its answer at most."""
        return min(self.max_tokens, context - len(self.prompt))
