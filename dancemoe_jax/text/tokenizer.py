"""Tokenizers: the byte-level one that models trained here use, and any model directory's own with all that belongs to it.

Text to token ids and back, chat messages to a prompt, and output as it grows (detokenizer.py). Knows no model weights.
"""

import dataclasses
import datetime
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dancemoe_jax.errors import DanceMoEError, ModelError, RequestError, show
from dancemoe_jax.files import read_json
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.text.chat import plain_messages, read_chat_templates, with_objects
from dancemoe_jax.text.harmony import MARKS
from dancemoe_jax.text.template_process import TEMPLATES, TemplateError

END_OF_TEXT = "<|endoftext|>"
LARGEST_TOKENIZER = 2**28  # bytes
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
    if file.stat().st_size > LARGEST_TOKENIZER:
        raise ModelError(
            f"{file}: {file.stat().st_size} bytes, more than any tokenizer has; export or download it again"
        )
    tokenizer = _guarded(lambda: _probed(Tokenizer.from_file(str(file))), f"{file}: not a tokenizer", ModelError)
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
        tool_template: the one for conversations with tools, where the model has one of its own.
    """

    source: Path
    tokenizer: Tokenizer
    add_bos: bool | None
    eos_tokens: frozenset[int]
    special: Mapping[str, str]
    chat_template: str | None
    tool_template: str | None = None

    @property
    def harmony(self) -> bool:
        """Whether in chats the model writes messages with headers (`dancemoe_jax.text.harmony`)."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        return {token.content for token in added if token.special}.issuperset(MARKS)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that a model is to continue, with the special tokens it was trained to see in front.

        A text that begins with the beginning-of-text token itself does not get another.

        Raises:
            RequestError: the tokenizer cannot encode it.
        """
        ids = self._encode(text)
        bos_text = self.special.get("bos_token", "")
        bos = self.tokenizer.token_to_id(bos_text)
        if bos is None:
            return ids
        bare = list(itertools.dropwhile(lambda token: token == bos, ids))
        wanted = len(bare) < len(ids) if self.add_bos is None else self.add_bos
        return [bos, *bare] if wanted or text.startswith(bos_text) else bare

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids without the special tokens."""
        return self.tokenizer.decode(list(ids))

    def encode_chat(self, messages: Any, /, **variables: Any) -> list[int]:
        """Token ids of a conversation, ready for the model's answer; arguments as `render_chat`."""
        # The template has written the special tokens already.
        return self._encode(self.render_chat(messages, **variables), add_special_tokens=False)

    def _encode(self, text: str, **options: Any) -> list[int]:
        encode = self.tokenizer.encode
        return _guarded(
            lambda: encode(_valid(text), **options).ids, f"{self.source}: cannot encode the text", RequestError
        )

    def render_chat(
        self,
        messages: Any,
        /,
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
        source = self.tool_template if variables.get("tools") and self.tool_template else self.chat_template
        if source is None:
            raise RequestError(f"{self.source}: has no chat template; give plain text, or add chat_template.jinja")
        known: dict[str, Any] = {"tools": None, "documents": None, **self.special, **variables}
        plain = plain_messages(messages)
        known |= {"messages": with_objects(plain), "add_generation_prompt": add_generation_prompt}
        try:
            return TEMPLATES.render(source, known, now())
        except TemplateError as error:
            if known["messages"] != plain:  # it may want arguments as a text
                with suppress(TemplateError):
                    return TEMPLATES.render(source, {**known, "messages": plain}, now())
            raise RequestError(
                f"{self.source}: the chat template cannot take these messages ({error}); change their roles or contents"
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
        raise ModelError(f"{file}: add_bos_token = {show(add_bos)}, must be true, false or null")
    # Older exports name the special tokens in a file of their own.
    named = read_json(path / "special_tokens_map.json", _REMEDY, optional=True) | fields
    special = {name: _token_text(value) for name, value in named.items() if name.endswith("_token")}
    special = {name: text for name, text in special.items() if text}
    eos_tokens = _eos_tokens(generation, config.vocab_size) | _eos_tokens(path / "config.json", config.vocab_size)
    eos = tokenizer.token_to_id(special.get("eos_token", ""))
    if eos is not None:
        eos_tokens |= {eos}
    templates = read_chat_templates(path, fields.get("chat_template"))
    return TokenizerBundle(path, tokenizer, add_bos, frozenset(eos_tokens), special, *templates)


def _probed(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that has shown that it can encode and decode."""
    tokenizer.decode(tokenizer.encode("A probe: 12 é\n").ids)
    return tokenizer


def _guarded(call: Callable[[], Any], what: str, error_type: type[DanceMoEError]) -> Any:
    """A call of tokenizers, whose errors are plain Exceptions, or panics that are no Exceptions at all."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise error_type(f"{what} ({reason[:200]}); export or download the tokenizer again") from None


def _valid(text: str) -> str:
    """JSON and command lines can hold halves of surrogate pairs, which are no characters and no tokenizer takes."""
    return text.encode(errors="replace").decode()


def _token_text(value: Any) -> str:
    """A special token is written as its text or as an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return _valid(text) if isinstance(text, str) else ""


def _eos_tokens(file: Path, vocab_size: int) -> set[int]:
    value = read_json(file, _REMEDY, optional=True).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ModelError(f"{file}: eos_token_id has {show(token)}, must be tokens from 0 to {vocab_size - 1}")
    return set(ids)
