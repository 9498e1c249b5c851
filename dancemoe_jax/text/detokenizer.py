"""Incremental detokenizer: text of tokens that come one by one, the same as decoding them all at once."""

from collections.abc import Sequence

from tokenizers import Tokenizer


class IncrementalDetokenizer:
    """The text of an output as its tokens come: each piece as soon as no later token can change it.

    A character cut between tokens waits for its rest; so does text that may be the beginning of a stop string. All
    pieces together are the text of all tokens, up to the first stop string to be complete.

    Args:
        stop: texts that end the output.
        context: tokens that the output continues; their last decide whether its first word begins with a space.

    Attributes:
        stop: as given; stopped: whether one of them has ended the output.

    >>> from dancemoe_jax.text.tokenizer import byte_tokenizer
    >>> detokenizer = IncrementalDetokenizer(byte_tokenizer(), stop=["!"])
    >>> [detokenizer.push(byte) for byte in "é 1!2".encode()], detokenizer.finish(), detokenizer.stopped
    (['', 'é', ' ', '1', '', ''], '', True)
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), context: Sequence[int] = ()):
        self._tokenizer, self.stop = tokenizer, tuple(stop)
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._bytes = _byte_tokens(tokenizer)
        self._window = self._last([token for token in context if token not in self._special])
        self._given = len(
            self._certain(self._tokenizer.decode(self._window))
        )  # characters of its text that are passed on
        self._withheld = ""
        self.stopped = False

    def push(self, *tokens: int) -> str:
        """Take the next tokens; the text that is certain now. One by one, `stopped` tells which of them was the last."""
        if self.stopped:
            return ""
        known = len(self._window)
        self._window += [token for token in tokens if token not in self._special]
        certain = len(self._window)
        while certain > known and self._window[certain - 1] in self._bytes:
            certain -= 1
        return self._certain_of(certain) if certain > known else ""

    def _certain_of(self, count: int) -> str:
        """The text that is certain now, and not passed on, of so many tokens of the window."""
        text = self._tokenizer.decode(self._window[:count])
        certain = self._certain(text)
        new = certain[self._given :]
        self._given = max(self._given, len(certain))
        if self._given == len(text) and len(self._window) == count >= 2 * _WINDOW:
            self._window = self._last(self._window)
            self._given = len(self._tokenizer.decode(self._window))
        return self._pass_on(new)

    def finish(self) -> str:
        """The text that was waiting for more: the output has ended, or goes on with something that is no text."""
        if self.stopped:
            return ""
        new = self._tokenizer.decode(self._window)[self._given :]
        self._given += len(new)
        text = self._pass_on(new) + self._withheld
        self._withheld = ""
        if self._window and self._window[-1] in self._bytes:  # no later token continues that run
            while self._window and self._window[-1] in self._bytes:
                self._window.pop()
            self._given = len(self._tokenizer.decode(self._window))
        return text

    def _last(self, tokens: list[int]) -> list[int]:
        """The last tokens, as many as those after them may depend on: no run of byte tokens is cut."""
        start = max(0, len(tokens) - _WINDOW)
        while start and tokens[start] in self._bytes:
            start -= 1
        return tokens[start:]

    def _certain(self, text: str) -> str:
        """A text without the mark at its end that the beginning of a character decodes to."""
        return text.removesuffix(_REPLACEMENT)

    def _pass_on(self, new: str) -> str:
        """Cut at a stop string; hold back what may become one."""
        text = self._withheld + new
        found = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            # The first to be complete, as if characters came one by one: how they came in tokens must not matter.
            self.stopped, self._withheld = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._withheld = text[len(text) - keep :]
        return text[: len(text) - keep]


_WINDOW = 8  # tokens that stay as context of the next one
_REPLACEMENT = "\ufffd"


def _byte_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that stand for a byte each where a tokenizer falls back to bytes; a run of them is decoded as a whole.

    Such a run is text if it is valid UTF-8, else a mark for each byte, so none of it is certain before its end.
    """
    if tokenizer.decoder is None or b"ByteFallback" not in tokenizer.decoder.__getstate__():
        return frozenset()
    found = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token for token in found if token is not None)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0
