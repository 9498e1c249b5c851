"""Answers held to a JSON schema: which tokens may come, and schemas that cannot be used."""

import json
import random

import numpy as np
import pytest

from dancemoe_jax.checkpoint.bundled import bundled_model
from dancemoe_jax.checkpoint.families import read_config
from dancemoe_jax.errors import RequestError
from dancemoe_jax.text.grammar import Grammars
from dancemoe_jax.text.tokenizer import load_tokenizer_bundle

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ab", "ac"]}, "count": {"type": "integer", "minimum": 3, "maximum": 40}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars():
    path = bundled_model()
    config = read_config(path)
    return Grammars(lambda: load_tokenizer_bundle(path, config), config)


def tokens_of(mask: np.ndarray, size: int = 257) -> list[int]:
    bits = (mask[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    return np.flatnonzero(bits.reshape(-1)[:size]).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_drawn_among_what_is_allowed_fits(grammars, seed):
    rng, state, text = random.Random(seed), grammars.start(json.dumps(SCHEMA)), []
    while (token := rng.choice(tokens_of(state.allowed()))) != 256:
        assert state.take(token) == ""
        text.append(token)
        # A worker that begins anew knows the state from the tokens alone.
        again = grammars.start(json.dumps(SCHEMA), text)
        assert tokens_of(again.allowed()) == tokens_of(state.allowed())
    found = json.loads(bytes(text))
    assert found["name"] in ("ab", "ac")
    assert 3 <= found["count"] <= 40


def test_a_token_that_does_not_fit_is_told(grammars):
    assert "doesn't satisfy the grammar" in grammars.start(json.dumps(SCHEMA)).take(ord("x"))
    with pytest.raises(RequestError, match="does not fit its schema"):
        grammars.start(json.dumps(SCHEMA), list(b"{x"))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "strin"}, "at its root: Invalid type: strin"),
        ({"properties": {"a/b": {"items": {"type": "strin"}}}}, "at /properties/a~1b/items: Invalid type"),
        ({"properties": {"a": {"pattern": "(("}}}, "at /properties/a: regex parse error: unclosed group"),
        ({"items": {"$ref": "#/nope"}}, "at /items: Pointer '/nope' does not exist"),
        ({"anyOf": [{}, {"oneOf": [{"type": "number", "minimum": "x"}]}]}, "at /anyOf/1/oneOf/0: Expected f64"),
        ({"not": {"type": "string"}}, "at its root: Unimplemented keys"),
        ({"$ref": "http://example.com/x"}, "does not fetch"),
        ({"$ref": "#"}, "at its root: no JSON fits it"),
        ({"items": {"multipleOf": 1234567}}, "at /items: multipleOf 1234567 is too large"),
        ({"allOf": [{"multipleOf": 97}, {"multipleOf": 89}]}, "multipleOf"),
        ({"properties": {"a": {"multipleOf": True}}}, "at /properties/a: "),
        ({"enum": ["x" * 70_000]}, "at most 65536"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_with_its_place(grammars, schema, words):
    with pytest.raises(RequestError) as refused:
        grammars.check(json.dumps(schema))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
