"""Answers that are JSON of a schema: which tokens may come next. llguidance does the work, on the host. Loads no JAX."""

import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from dancemoe_jax.errors import RequestError
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.text.tokenizer import TokenizerBundle

WORD = 32  # tokens of a mask's word
_LONGEST = 2**16  # characters of a schema
# A number's multiples are counted by an automaton with a state for each remainder: this many take half a second.
_MOST_REMAINDERS = 2000
# Small models that may put in white space at will never come to an end.
_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_KEPT = 32  # compiled schemas
_SEARCH_S = 2.0  # for the place of an error

_SINGLE = ("items", "additionalProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")


class GrammarState:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self) -> np.ndarray:
        """Which tokens may come next, a bit each from the lowest one up: uint32 [ceil(vocabulary / 32)]."""
        return np.frombuffer(self._matcher.compute_bitmask(), np.uint32)

    def take(self, token: int) -> str:
        """Go on by a token; why the answer cannot go on, or ""."""
        return "" if self._matcher.consume_token(token) else _first_line(self._matcher.get_error())


class Grammars:
    """The grammars of a model's answers, each compiled once. For use from any thread.

    Args:
        load: gives the model's tokenizer; called when the first grammar is asked for.
    """

    def __init__(self, load: Callable[[], TokenizerBundle], config: ModelConfig) -> None:
        self._load, self._config = load, config
        self._compiled = functools.lru_cache(_KEPT)(self._compile)

    def check(self, schema: str) -> None:
        """Raise RequestError, with the place, where no answer can be held to a schema, which is a JSON object's text."""
        if len(schema) > _LONGEST:
            raise RequestError(f"a schema of {len(schema)} characters; send at most {_LONGEST}")
        self._compiled(schema)

    def start(self, schema: str, tokens: Sequence[int] = ()) -> GrammarState:
        """An answer of which there are some tokens already. Raises RequestError as `check`, or where they do not fit."""
        state = GrammarState(self._compiled(schema).deep_copy())
        for token in tokens:
            if error := state.take(token):
                raise RequestError(f"an answer that does not fit its schema ({error})")
        return state

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from llguidance import LLTokenizer

        bundle = self._load()
        own = set() if self._config.eos_token is None else {self._config.eos_token}
        ends = sorted(bundle.eos_tokens | own)
        if not ends:
            raise RequestError("this model has no token that ends a text, so that no answer can be held to a schema")
        return LLTokenizer(bundle.tokenizer.to_str(), n_vocab=self._config.vocab_size, eos_token=ends)

    def _compile(self, text: str) -> Any:
        from llguidance import LLMatcher

        schema = json.loads(text)
        _check_multiples(schema)
        if error := self._error(schema):
            place, error = self._place(schema, error, schema, "", time.monotonic() + _SEARCH_S)
            raise RequestError(f"at {place or 'its root'}: {error}")
        return LLMatcher(self._tokenizer, _grammar(schema), log_level=0)

    def _error(self, schema: dict[str, Any]) -> str:
        """What llguidance has against a schema, in a line, or ""."""
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self._tokenizer, _grammar(schema), log_level=0)
        except ValueError as error:
            return _first_line(str(error))
        if not matcher.is_error():
            matcher.compute_bitmask()
        error = _first_line(matcher.get_error())
        return "no JSON fits it" if error.startswith("NoExtension") else error

    def _place(
        self, schema: dict[str, Any], error: str, root: dict[str, Any], place: str, until: float
    ) -> tuple[str, str]:
        """Where in a schema an error is, as a JSON pointer: in the innermost part that has it when taken alone, as far
        as that is found in time."""
        known = {name: root[name] for name in ("$defs", "definitions") if name in root}
        for step, part in _parts(schema):
            if time.monotonic() > until:
                break
            if isinstance(part, dict) and self._error({**known, **part}) == error:
                return self._place(part, error, root, f"{place}/{step}", until)
        return place, error


def _grammar(schema: dict[str, Any]) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_FORM)


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Schemas within one, with the steps of a JSON pointer that lead there."""
    for name in _SINGLE:
        if name in schema:
            yield name, schema[name]
    for name in _LISTS:
        if isinstance(schema.get(name), list):
            yield from ((f"{name}/{i}", part) for i, part in enumerate(schema[name]))
    for name in _NAMED:
        if isinstance(schema.get(name), dict):
            for key, part in schema[name].items():
                yield f"{name}/{key.replace('~', '~0').replace('/', '~1')}", part


def _check_multiples(schema: dict[str, Any]) -> None:
    remainders, found = 1, [("", schema)]
    while found:
        place, part = found.pop()
        found += [(f"{place}/{step}", inner) for step, inner in _parts(part) if isinstance(inner, dict)]
        multiple = part.get("multipleOf")
        if isinstance(multiple, int | float) and multiple is not True and 0 < multiple < math.inf:
            exact = Fraction(str(multiple))
            remainders = math.lcm(remainders, exact.numerator * exact.denominator)
            if remainders > _MOST_REMAINDERS:
                raise RequestError(f"at {place or 'its root'}: multipleOf {multiple} is too large; leave it out")


def _first_line(error: str) -> str:
    """The first line of an error, and for a regular expression what is wrong with it."""
    lines = [line.strip() for line in error.strip().splitlines()] or [""]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")
    return f"{lines[0].removesuffix(':')}: {reason}" if reason else lines[0]
