"""Tokenizers: the byte-level one that models trained here use, and any model directory's own with all that belongs to it.

Text to token ids and back, chat messages to a prompt, and output as it grows (`TextStream`). Knows no model weights.
"""

import dataclasses
import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
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
    # Files saved after training often carry the trainer's settings; served prompts are never cut or filled up silently.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@dataclasses.dataclass(frozen=True)
class TextCodec:
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
            now: what the template's `strftime_now` tells.
            variables: more of what the template knows (`tools`, `enable_thinking`, ...).

        Raises:
            ModelError: the model has no chat template, the messages are no conversation, or the template refuses them.
        """
        if self.chat_template is None:
            raise ModelError(f"{self.source}: has no chat template; give plain text, or add chat_template.jinja")
        known: dict[str, Any] = {"tools": None, "documents": None, **self.special, **variables}
        try:
            template = _template_environment(now).from_string(self.chat_template)
            return template.render(
                messages=_plain_messages(messages), add_generation_prompt=add_generation_prompt, **known
            )
        except ModelError:
            raise
        except Exception as error:  # a template is a program: it can fail in any way
            message = " ".join(str(error).split()) or type(error).__name__
            raise ModelError(
                f"{self.source}: the chat template cannot take these messages ({message}); change their roles or contents"
            ) from None


def load_codec(path: str | Path, config: ModelConfig) -> TextCodec:
    """A directory's `tokenizer.json`, and what `tokenizer_config.json`, `generation_config.json` and
    `chat_template.jinja` say where they exist.

    Raises:
        ModelError: a file is damaged, or names a token that the model does not have.
    """
    path = Path(path)
    tokenizer = load_tokenizer(path, config)
    file = path / "tokenizer_config.json"
    fields, generation = _read_object(file), path / "generation_config.json"
    add_bos = fields.get("add_bos_token")
    if not isinstance(add_bos, bool | None):
        raise ModelError(f"{file}: add_bos_token = {add_bos!r}, must be true, false or null")
    special = {name: _token_text(value) for name, value in fields.items() if name.endswith("_token")}
    special = {name: text for name, text in special.items() if text}
    eos_tokens = _eos_tokens(generation, config.vocab_size) | _eos_tokens(path / "config.json", config.vocab_size)
    eos = tokenizer.token_to_id(special.get("eos_token", ""))
    if eos is not None:
        eos_tokens |= {eos}
    template = _chat_template(path, fields.get("chat_template"))
    return TextCodec(path, tokenizer, add_bos, frozenset(eos_tokens), special, template)


class TextStream:
    """The text of an output as its tokens come: each piece as soon as no later token can change it.

    A character cut between tokens waits for its rest; so does text that may be the beginning of a stop string. All
    pieces together are the text of all tokens, up to the first stop string to be complete.

    Args:
        stop: texts that end the output.
        context: tokens that the output continues; their last decide whether its first word begins with a space.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), context: Sequence[int] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._window = [token for token in context[-_WINDOW:] if token not in self._special]
        self._given = len(self._tokenizer.decode(self._window))  # characters of the window's text that are passed on
        self._withheld = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take the next token; the text that is certain now."""
        if self.stopped or token in self._special:
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        # The beginning of a character decodes to replacement marks, one or one for each byte of it.
        certain = text.rstrip(_REPLACEMENT)
        if len(text) - len(certain) > _LONGEST_CHARACTER:
            certain = text
        new = certain[self._given :]
        self._given = max(self._given, len(certain))
        if self._given == len(text):
            self._shrink()
        return self._pass_on(new)

    def finish(self) -> str:
        """The output has ended: the text that was waiting for more."""
        new = self._tokenizer.decode(self._window)[self._given :]
        self._given += len(new)
        text = self._pass_on(new) + self._withheld
        self._withheld = ""
        return "" if self.stopped and not text else text

    def _shrink(self) -> None:
        """Forget old tokens, where the text from the newer ones on does not depend on them."""
        if len(self._window) < 2 * _WINDOW:
            return
        tail = self._window[-_WINDOW:]
        text = self._tokenizer.decode(tail)
        # Marks mean that the cut went through a character; somewhere it will not, but do not wait for ever.
        if _REPLACEMENT not in text or len(self._window) >= 8 * _WINDOW:
            self._window, self._given = tail, len(text)

    def _pass_on(self, new: str) -> str:
        """Cut at a stop string; hold back what may become one."""
        text = self._withheld + new
        ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            # The first to be complete, as if characters came one by one: how they came in tokens must not matter.
            self.stopped, self._withheld = True, ""
            return text[: min(ends)[1]]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._withheld = text[len(text) - keep :]
        return text[: len(text) - keep]


_WINDOW = 8  # tokens that stay as context of the next one
_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 3  # bytes of a UTF-8 character short of its last


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _valid(text: str) -> str:
    """JSON and command lines can hold halves of surrogate pairs, which are no characters and no tokenizer takes."""
    return text.encode(errors="replace").decode()


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    if not file.exists():
        return {}
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not readable as JSON ({error}); download it again or remove it") from None
    if not isinstance(fields, dict):
        raise ModelError(
            f"{file}: holds a {type(fields).__name__}, must be a JSON object; download it again or remove it"
        )
    return fields


def _token_text(value: Any) -> str:
    """A special token is written as its text or as an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _eos_tokens(file: Path, vocab_size: int) -> set[int]:
    value = _read_object(file).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ModelError(f"{file}: eos_token_id has {token!r}, must be tokens from 0 to {vocab_size - 1}")
    return set(ids)


def _chat_template(path: Path, field: Any) -> str | None:
    """A file of its own goes before the field of tokenizer_config.json: a text, or a list of named ones."""
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{file}: not readable as text ({error}); download it again or remove it") from None
    if isinstance(field, list):
        named = {entry.get("name"): entry.get("template") for entry in field if isinstance(entry, dict)}
        field = named.get("default", next(iter(named.values()), None))
    if not isinstance(field, str | None):
        raise ModelError(
            f"{path / 'tokenizer_config.json'}: chat_template is a {type(field).__name__}, must be a text or a list of "
            "objects with name and template"
        )
    return field


def _template_environment(now: Callable[[], datetime.datetime]) -> jinja2.Environment:
    """What chat templates expect to find, and nothing they could harm: no file, no attribute of Python's own objects."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own filter writes <, > and & as escapes for web pages, which models are not.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    environment.filters["tojson"] = to_json
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the model's own words for training; for serving it is nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Checked messages, with contents that are lists of text parts joined: not every template knows lists."""
    if not isinstance(messages, list) or not messages:
        raise ModelError("messages: must be a list of at least one object with role and content")
    plain = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ModelError(f"messages[{number}]: must be an object with a text as its role")
        content = message.get("content")
        if isinstance(content, list):
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            known = [text for text in texts if isinstance(text, str)]
            if len(known) < len(texts):
                raise ModelError(f"messages[{number}]: content has a part without text; only text can be served")
            content = "".join(known)
        if not isinstance(content, str | None):
            raise ModelError(f"messages[{number}]: content is a {type(content).__name__}, must be a text")
        plain.append({**message, "content": content})
    return plain
