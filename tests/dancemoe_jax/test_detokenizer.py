"""Streamed text is the decoded text, whatever the tokenizer and however characters are cut into tokens."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dancemoe_jax.text.detokenizer import IncrementalDetokenizer
from dancemoe_jax.text.tokenizer import byte_tokenizer

SPECIAL = "<special>"
BYTES = {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}


def with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    tokenizer.add_tokens(["<added>", " odd "])
    return tokenizer


def byte_level() -> Tokenizer:
    """Byte-level BPE as GPT-2's, with merges that cut characters anywhere."""
    base = byte_tokenizer().get_vocab()
    vocabulary, merges = {token: i for token, i in base.items() if i < 256}, []
    name = {i: token for token, i in base.items()}
    for word in ("é", "습니", " der", "🎉", "ab\n"):
        data = word.encode()
        for cut in range(1, min(len(data), 4)):
            pair = name[data[cut - 1]], name[data[cut]]
            if "".join(pair) not in vocabulary:
                vocabulary["".join(pair)] = len(vocabulary)
                merges.append(pair)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_added(tokenizer)


def byte_fallback(*last) -> Tokenizer:
    """As Mixtral's and Llama's: pieces with a mark for spaces, and bytes for characters that have no piece."""
    vocabulary = {"<unk>": 0, **BYTES, "▁": 257, "a": 258, "습": 259, "니": 260, "▁der": 261, "\ufffd": 262}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return with_added(tokenizer)


def unigram() -> Tokenizer:
    pieces = [
        ("<unk>", 0.0),
        *((token, -9.0) for token in BYTES),
        ("▁", -1.0),
        ("▁a", -2.0),
        ("니", -2.0),
        ("bc", -3.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return with_added(tokenizer)


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("▁a", -2.0), ("니", -2.0), ("é", -3.0)], unk_id=0)
    )
    tokenizer.decoder = decoders.Metaspace()
    return with_added(tokenizer)


def word_piece() -> Tokenizer:
    words = ["[UNK]", "a", "##b", ".", "'s", "n't", "##é", "do", "니"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return with_added(tokenizer)


def word_level() -> Tokenizer:
    return with_added(Tokenizer(models.WordLevel({"a": 0, "니": 1, ".": 2, "\ufffd": 3}, unk_token="a")))


def suffixes() -> Tokenizer:
    """BPE with a mark at the end of words, as the first of its kind."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b</w>": 1, "니": 2, "é</w>": 3}, []))
    tokenizer.decoder = decoders.BPEDecoder()
    return with_added(tokenizer)


TOKENIZERS = {
    "byte level": byte_level,
    "single bytes": lambda: with_added(byte_tokenizer()),
    "byte fallback": byte_fallback,
    "byte fallback, first space stripped": lambda: byte_fallback(decoders.Strip(" ", 1, 0)),
    "unigram with byte fallback": unigram,
    "metaspace": metaspace,
    "word piece": word_piece,
    "word level": word_level,
    "suffixes": suffixes,
}
MADE = {name: make() for name, make in TOKENIZERS.items()}


def stream(tokenizer, ids, **options):
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    pieces = [detokenizer.push(token) for token in ids]
    return "".join([*pieces, detokenizer.finish()])


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text(name, data):
    tokenizer = MADE[name]
    token = st.integers(0, tokenizer.get_vocab_size() - 1)
    ids = data.draw(st.lists(token, max_size=60))
    assert stream(tokenizer, ids) == tokenizer.decode(ids)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    several = IncrementalDetokenizer(tokenizer)
    pieces = [several.push(*ids[first:end]) for first, end in itertools.pairwise([0, *cuts, len(ids)])]
    assert "".join([*pieces, several.finish()]) == tokenizer.decode(ids)
    context = data.draw(st.lists(token, max_size=30))
    before, both = tokenizer.decode(context), tokenizer.decode([*context, *ids])
    if both.startswith(before) and not before.endswith("\ufffd"):
        assert stream(tokenizer, ids, context=context) == both[len(before) :]


@pytest.mark.parametrize("name", ["byte level", "single bytes", "byte fallback", "unigram with byte fallback"])
@pytest.mark.parametrize("text", ["괜찮습니다", "🇩🇪 a", "각힣a", "naïve — 日本語🎉", "a\ufffd\ufffd\ufffd\ufffdé"])
def test_characters_cut_into_bytes_come_whole(name, text):
    tokenizer = MADE[name]
    ids = tokenizer.encode(text).ids
    assert stream(tokenizer, ids) == tokenizer.decode(ids)
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert not any("\ufffd" in detokenizer.push(token) for token in ids) or "\ufffd" in text


def test_text_does_not_wait_for_the_end_of_the_output():
    tokenizer = MADE["byte fallback"]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.push(token) for token in (258, 1 + 0xEA, 1 + 0xB4, 1 + 0x9C, 258)] == ["a", "", "", "", "괜a"]


def test_text_may_go_on_after_a_finish():
    detokenizer = IncrementalDetokenizer(MADE["byte fallback"])
    assert detokenizer.push(258, 1 + 0xE2, 1 + 0x82) == "a"
    assert detokenizer.finish() == "\ufffd\ufffd"
    assert detokenizer.push(258) + detokenizer.finish() + detokenizer.push(258) == "aa"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=5), max_size=3))
def test_stop_strings_cut_where_the_first_is_complete(text, stops):
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    expected = text[: min(found)[1]] if found else text
    assert stream(byte_tokenizer(), text.encode(), stop=stops) == expected


def test_long_outputs_and_long_stop_strings_cost_little():
    import time

    generator = random.Random(0)
    ids = [generator.randrange(256) for _ in range(3000)]
    begin = time.process_time()
    assert stream(byte_tokenizer(), ids, stop=["ab" * 500 + "c"] * 4) == byte_tokenizer().decode(ids)
    assert time.process_time() - begin < 5
