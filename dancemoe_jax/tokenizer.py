"""Tokenizers: the byte-level one that models trained here use, and the loading of any model directory's own."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dancemoe_jax.config import ModelConfig, ModelError

END_OF_TEXT = "<|endoftext|>"


def byte_tokenizer() -> Tokenizer:
    """One token a byte: the id of byte b is b, and 256 is the end of text."""
    # The byte-level alphabet writes a byte that has no visible Latin-1 character as the next one from code point 256.
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    vocabulary = {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def load_tokenizer(path: str | Path, config: ModelConfig) -> Tokenizer:
    """A model directory's `tokenizer.json`.

    Raises:
        ModelError: it is missing, damaged, or has an id that the model's embedding has no row for.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{file}: no such file; a model directory needs the tokenizer its model was trained with")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception for whatever it cannot parse
        raise ModelError(
            f"{file}: not a tokenizer ({str(error).splitlines()[0]}); export or download it again"
        ) from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.vocab_size:
        raise ModelError(
            f"{file}: token id {largest} has no row in model.embed_tokens.weight (vocab_size = {config.vocab_size}); "
            "use the tokenizer that belongs to this model"
        )
    return tokenizer
