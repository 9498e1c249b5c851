"""Tokenizers: the byte-level one that models trained here use, and any model directory's own with all that belongs to it.

Text to token ids and back, chat messages to a prompt, and output as it grows (detokenizer.py). Knows no model weights.
"""

import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dancemoe_jax.errors import ModelError, RequestError
from dancemoe_jax.files import read_json
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.text.chat import plain_messages, read_chat_template, template_environment

END_OF_TEXT = "<|endoftext|>"
_REMEDY = "download it again or remove it"


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
    # Files saved after training often carry the trainer's settings; served prompts are never cut or filled up silently.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@dataclasses.dataclass(frozen=True)
class TokenizerBundle:
    """A model directory's way from text to token ids and back.

    Attributes:
        source: the directory, for messages.
        add_bos: whether encoded text begins with `bos_token`; None = whatever `tokenizer.json` does by itself.
        eos_tokens: ids that end an output.
        special: the special tokens by name (`bos_token`, `eos_token`, ...), as chat templates call them.
        chat_template: Jinja source, or None.
    """

    source: Path
    tokenizer: Tokenizer
    add_bos: bool | None
    eos_tokens: frozenset[int]
    special: Mapping[str, str]
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that a model is to continue, with the special tokens it was trained to see in front."""
        ids = self.tokenizer.encode(_valid(text)).ids
        bos = self.tokenizer.token_to_id(self.special.get("bos_token", ""))
        if self.add_bos is None or bos is None:
            return ids
        bare = ids[1:] if ids[:1] == [bos] else ids
        return [bos, *bare] if self.add_bos else bare

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids without the special tokens."""
        return self.tokenizer.decode(list(ids))

    def encode_chat(self, messages: Any, **variables: Any) -> list[int]:
        """Token ids of a conversation, ready for the model's answer; arguments as `render_chat`."""
        # The template has written the special tokens already.
        return self.tokenizer.encode(_valid(self.render_chat(messages, **variables)), add_special_tokens=False).ids

    def render_chat(
        self,
        messages: Any,
        *,
        add_generation_prompt: bool = True,
        now: Callable[[], datetime.datetime] = datetime.datetime.now,
        **variables: Any,
    ) -> str:
        """A conversation as the text that the model was trained on.

        Args:
            messages: list of `{"role": ..., "content": text}`, as sent by a client; content may be a list of text parts.
            now: the clock of the template's `strftime_now`.
            variables: more of what the template knows (`tools`, `enable_thinking`, ...).

        Raises:
            RequestError: the model has no chat template, the messages are no conversation, or the template refuses them.
        """
        if self.chat_template is None:
            raise RequestError(f"{self.source}: has no chat template; give plain text, or add chat_template.jinja")
        known: dict[str, Any] = {"tools": None, "documents": None, **self.special, **variables}
        try:
            template = template_environment(now).from_string(self.chat_template)
            return template.render(
                messages=plain_messages(messages), add_generation_prompt=add_generation_prompt, **known
            )
        except RequestError:
            raise
        except Exception as error:  # a template is a program: it can fail in any way
            message = " ".join(str(error).split()) or type(error).__name__
            raise RequestError(
                f"{self.source}: the chat template cannot take these messages ({message}); change their roles or contents"
            ) from None


def load_tokenizer_bundle(path: str | Path, config: ModelConfig) -> TokenizerBundle:
    """A directory's `tokenizer.json`, and what `tokenizer_config.json`, `generation_config.json` and
    `chat_template.jinja` say where they exist.

    Raises:
        ModelError: a file is damaged, or names a token that the model does not have.
    """
    path = Path(path)
    tokenizer = load_tokenizer(path, config)
    file = path / "tokenizer_config.json"
    fields, generation = read_json(file, _REMEDY, optional=True), path / "generation_config.json"
    add_bos = fields.get("add_bos_token")
    if not isinstance(add_bos, bool | None):
        raise ModelError(f"{file}: add_bos_token = {add_bos!r}, must be true, false or null")
    special = {name: _token_text(value) for name, value in fields.items() if name.endswith("_token")}
    special = {name: text for name, text in special.items() if text}
    eos_tokens = _eos_tokens(generation, config.vocab_size) | _eos_tokens(path / "config.json", config.vocab_size)
    eos = tokenizer.token_to_id(special.get("eos_token", ""))
    if eos is not None:
        eos_tokens |= {eos}
    template = read_chat_template(path, fields.get("chat_template"))
    return TokenizerBundle(path, tokenizer, add_bos, frozenset(eos_tokens), special, template)


def _valid(text: str) -> str:
    """JSON and command lines can hold halves of surrogate pairs, which are no characters and no tokenizer takes."""
    return text.encode(errors="replace").decode()


def _token_text(value: Any) -> str:
    """A special token is written as its text or as an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _eos_tokens(file: Path, vocab_size: int) -> set[int]:
    value = read_json(file, _REMEDY, optional=True).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ModelError(f"{file}: eos_token_id has {token!r}, must be tokens from 0 to {vocab_size - 1}")
    return set(ids)
