"""From the JSON object on a line to a request, within limits that are checked before any work is done."""

import dataclasses
import threading
from collections.abc import Collection, Mapping
from typing import Any

from dancemoe_jax.inference.prompts import check_prompt
from dancemoe_jax.inference.sampling_params import SamplingParams
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.text.detokenizer import IncrementalDetokenizer
from dancemoe_jax.text.harmony import MARKS, Messages, read_messages, written
from dancemoe_jax.text.tokenizer import TokenizerBundle
from launch.engine.request import Request
from placement import InputError

MOST_STOPS, LONGEST_STOP = 64, 1024  # texts that end an answer, and characters of one
_MOST_STOP_TOKENS = 1024
_LONGEST_ID = 1024
_ENCODED_AT_ONCE = 2  # prompts: tokenizing takes memory in proportion
_DECODED_AT_ONCE = 256  # tokens of an answer, in a fraction of a millisecond
_FIELDS = {field.name for field in dataclasses.fields(SamplingParams)}
_KNOWN = _FIELDS | {"id", "server", "prompt", "messages"}


class Text:
    """An answer's text, from its tokens.

    Args:
        marks: how special tokens are written that are part of the text; the others are not.
        harmony: it is messages with headers (`dancemoe_jax.text.harmony`).
    """

    def __init__(
        self,
        stream: IncrementalDetokenizer,
        stop_token_ids: frozenset[int],
        marks: Mapping[int, str] | None = None,
        *,
        harmony: bool = False,
    ) -> None:
        self._stream, self._stop_token_ids = stream, stop_token_ids
        self._marks, self._harmony = marks or {}, harmony
        self._text, self._coming = "", list[int]()  # the text so far, and tokens that nobody has asked the text of

    def on_token(self, token: int) -> bool:
        """Take a token; whether a stop text has ended the answer."""
        if token in self._marks:
            self._text = self.text + self._stream.finish() + ("" if self._stream.stopped else self._marks[token])
        elif token not in self._stop_token_ids:
            self._coming.append(token)
            if self._stream.stop or len(self._coming) == _DECODED_AT_ONCE:
                self._decode()
        return self._stream.stopped

    @property
    def text(self) -> str:
        """So far, as much as is certain."""
        if self._coming:
            self._decode()
        return self._text

    @property
    def messages(self) -> Messages:
        """What it says, to whom."""
        return read_messages(self.text) if self._harmony else Messages(self.text, "", [])

    def finish(self) -> None:
        """There are no more tokens."""
        self._text = self.text + self._stream.finish()

    def _decode(self) -> None:
        self._text += self._stream.push(*self._coming)
        self._coming.clear()


class RequestMaker:
    """Makes requests of a model."""

    def __init__(self, bundle: TokenizerBundle, config: ModelConfig) -> None:
        self._bundle, self._config, self._harmony = bundle, config, bundle.harmony
        added = bundle.tokenizer.get_added_tokens_decoder().items()
        self._special = {token.content: number for number, token in added if token.special}
        self._encoding = threading.Semaphore(_ENCODED_AT_ONCE)
        longest = max((len(token) for token in bundle.tokenizer.get_vocab(with_added_tokens=True)), default=1)
        self._most_characters = config.max_position * longest

    def make(self, given: dict[str, Any], server: int, arrival_s: float) -> tuple[Request, Text]:
        """A request of a server's user, and what gathers its text. A field that is null counts as not given.

        Raises:
            InputError, ModelError: a field is unknown, too large, or means nothing.
        """
        given = {key: value for key, value in given.items() if value is not None}
        if unknown := sorted(set(given) - _KNOWN):
            raise InputError(f"{unknown[0][:100]!r} is unknown; known are {', '.join(sorted(_FIELDS))}")
        return self.request(self.prompt(given), given, server, arrival_s, chat="messages" in given)

    def request(
        self,
        prompt: list[int],
        given: Mapping[str, Any],
        server: int,
        arrival_s: float,
        *,
        chat: bool = False,
        keep: Collection[str] = (),
    ) -> tuple[Request, Text]:
        """A request whose prompt is token ids already; of the rest only the sampling fields are looked at.

        Args:
            chat: the prompt is of messages; keep: special tokens that are part of the answer's text.

        Raises:
            InputError, ModelError: a field is too large, or means nothing.
        """
        check_prompt(self._config, prompt, "request")
        params = _params(given)
        own = set() if self._config.eos_token is None else {self._config.eos_token}
        stop_token_ids = frozenset(self._bundle.eos_tokens | own | set(params.stop_tokens))
        harmony = chat and self._harmony
        marks = {mark: mark for mark in keep} | ({mark: written(mark) for mark in MARKS} if harmony else {})
        marks = {self._special[mark]: text for mark, text in marks.items() if mark in self._special}
        marks = {token: text for token, text in marks.items() if token not in stop_token_ids}
        stream = IncrementalDetokenizer(self._bundle.tokenizer, params.stop, prompt)
        text = Text(stream, stop_token_ids, marks, harmony=harmony)
        request = Request(
            server,
            prompt,
            params.max_tokens,
            arrival_s,
            params=params,
            stop_token_ids=stop_token_ids,
            on_token=text.on_token,
        )
        return request, text

    def prompt(self, given: Mapping[str, Any], /, **variables: Any) -> list[int]:
        """Token ids of a prompt or of messages.

        Args:
            variables: more of what the chat template knows.

        Raises:
            InputError, ModelError: there is neither, or it cannot be encoded.
        """
        text, messages = given.get("prompt"), given.get("messages")
        if isinstance(text, str) and messages is None:
            self._check_length(len(text))
            with self._encoding:
                return self._bundle.encode(text)
        if isinstance(messages, list) and text is None:
            self._check_length(_characters(messages))
            with self._encoding:
                return self._bundle.encode_chat(messages, **variables)
        raise InputError("must have either a text prompt or a list messages")

    def _check_length(self, characters: int) -> None:
        """Before it is tokenized: no text of so many characters has so few tokens."""
        if characters > self._most_characters:
            raise InputError(
                f"a prompt of {characters} characters; {self._config.max_position} tokens fit the context, at most "
                f"{self._most_characters} characters; send a shorter one"
            )


def _characters(value: Any, depth: int = 0) -> int:
    """Of all texts in messages."""
    if isinstance(value, str):
        return len(value)
    if depth > 8:
        raise InputError("messages are nested too deeply")
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(_characters(part, depth + 1) for part in parts)


def _params(given: Mapping[str, Any]) -> SamplingParams:
    values: dict[str, Any] = {key: given[key] for key in _FIELDS if key in given}
    values |= {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    if isinstance(values.get("stop"), str):
        values["stop"] = (values["stop"],)
    stop, tokens = values.get("stop", ()), values.get("stop_tokens", ())
    if isinstance(stop, tuple) and (len(stop) > MOST_STOPS or any(len(str(text)) > LONGEST_STOP for text in stop)):
        raise InputError(f"stop: at most {MOST_STOPS} texts of {LONGEST_STOP} characters; send fewer or shorter ones")
    if isinstance(tokens, tuple) and len(tokens) > _MOST_STOP_TOKENS:
        raise InputError(f"stop_tokens: {len(tokens)} of them; send at most {_MOST_STOP_TOKENS}")
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if isinstance(values.get(name), int) and abs(values[name]) > 2**53:
            raise InputError(f"{name}: a number of {len(str(values[name]))} digits; send a smaller one")
    return SamplingParams(**values)


def identity(given: dict[str, Any], number: int) -> Any:
    """What an answer calls its line: its `id`, or its number where it has none.

    Raises:
        InputError: it is neither a text nor a number, or too long.
    """
    own = given.get("id")
    if own is None:
        return number
    if not isinstance(own, str | int) or len(str(own)) > _LONGEST_ID:
        raise InputError(f"id: must be a text or an integer of at most {_LONGEST_ID} characters")
    return own
